"""`python -m proofs run NAME`, `list`, `table`, `index`, `annotate NAME`."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer

from proofs import table as drawing
from proofs.evidence import INDEX, gather
from proofs.proof import find, names
from proofs.result import ProofResult
from proofs.runner import RESULTS, record
from transfuse.core.errors import TransferError
from transfuse.core.files import write_atomically

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Name = Annotated[str, typer.Argument(help="a proof, see `list`")]
Out = Annotated[Path | None, typer.Option(help="file to write")]


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="a proof, see `list`")] = None,
    every: Annotated[bool, typer.Option("--all", help="run every proof")] = False,
    smoke: Annotated[bool, typer.Option(help="a few updates only, the result goes to a temporary folder")] = False,
    out: Out = None,
) -> None:
    """Run a proof and write its result, by default to proofs/results."""
    if (name is None) != every or (every and out):
        raise typer.BadParameter("give a name, or --all without --out")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if smoke else RESULTS
        if name is not None:
            typer.echo(record(name, smoke, out or folder / f"{name}.json"))
            return
        # Smoke runs share the cores; those whose times and numbers are kept have the machine for themselves.
        with ProcessPoolExecutor(os.cpu_count() if smoke else 1, multiprocessing.get_context("spawn")) as pool:
            found = names()
            for line in pool.map(record, found, repeat(smoke), [folder / f"{each}.json" for each in found]):
                typer.echo(line)


@app.command("list")
def list_proofs() -> None:
    """Show every proof, the method it is about, and the verdict of the result that is there."""
    for name in names():
        proof, path = find(name), RESULTS / f"{name}.json"
        verdict = ProofResult.read(path).verdict if path.exists() else "no result"
        typer.echo(f"{proof.family}/{name}: {', '.join(proof.proves)}: {verdict}")


@app.command()
def table(out: Out = None) -> None:
    """Draw the results page of the documentation, to the terminal by default."""
    text = drawing.page([ProofResult.read(path) for name in names() if (path := RESULTS / f"{name}.json").exists()])
    if out:
        write_atomically(out, text)
    else:
        typer.echo(text, nl=False)


@app.command()
def index() -> None:
    """Write the catalogue's evidence: the tests and the results of every method."""
    results = [ProofResult.read(path) for name in names() if (path := RESULTS / f"{name}.json").exists()]
    write_atomically(INDEX, json.dumps(gather(results), indent=1) + "\n")


@app.command()
def annotate(name: Name) -> None:
    """Copy the notes of a proof and the names of what it proves into the result; numbers stay as they are."""
    path, proof = RESULTS / f"{name}.json", find(name)
    ProofResult.read(path).model_copy(update={"notes": proof.notes, "proves": list(proof.proves)}).write(path)


if __name__ == "__main__":
    try:
        app()
    except TransferError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
