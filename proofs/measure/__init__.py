"""Proofs of the measures in :mod:`transfuse.measure`."""
