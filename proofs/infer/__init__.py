"""Proofs of the methods in :mod:`transfuse.infer`."""
