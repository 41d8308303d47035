"""Proofs of data-free transfer."""
