"""One small experiment per method: does what the paper claims come out here? `python -m proofs list`.

A proof is a file `proofs/<family>/<name>.py` that declares `PROOF`; its result is `proofs/results/<name>.json`, all
seeds of all arms. Read `proof.py` first, then any proof. Speed is measured in `benchmarks`, not here. The library
does not import this package.
"""
