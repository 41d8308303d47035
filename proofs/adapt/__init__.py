"""Proofs of the family of domain adaptation."""
