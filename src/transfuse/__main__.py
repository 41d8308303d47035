"""`python -m transfuse`, and `accelerate launch -m transfuse run recipe.yaml`."""

from __future__ import annotations

from transfuse.cli import app

if __name__ == "__main__":
    app(prog_name="transfuse")
