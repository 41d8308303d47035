"""What every family stands on: batches, streams, runs, taps, methods, phases, the trainer, checkpoints, the catalogue.

Authors of methods read :mod:`~transfuse.core.method` first. Mathematics is in :mod:`transfuse.losses`.
"""
