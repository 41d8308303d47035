"""The command line: thin commands over recipes, transfers, reports and the catalogue.

Heavy imports are inside the commands, so that help and the catalogue answer at once. Results go to stdout,
progress and errors to stderr; under several processes only the first one speaks. What tables look like:
`tables.py`; the starter recipe: `starter.py`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Never

import typer
from typer.core import TyperGroup

from transfuse.cli.console import err, out, say
from transfuse.core.errors import InputError, TransferError

# What is left when the process ends is not worth a last search for garbage, which takes half a second with torch.
atexit.register(gc.freeze)


class Commands(TyperGroup):
    """Turns our errors into one message and an exit code, unless `--debug` asks for the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Exit code 2 for wrong input, 1 for other errors, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except TransferError as error:
            if ctx.params["debug"]:
                raise
            _fail(error, 2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt as stop:
            say(err, str(stop) or "stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="transfuse",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _version(asked: bool) -> None:
    if asked:
        from transfuse import __version__

        typer.echo(f"transfuse {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="TRANSFUSE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Move what one model knows into another, and show whether it arrived.

    Start with an example that runs:

        transfuse new recipe.yaml
        transfuse check recipe.yaml
        transfuse run recipe.yaml

    Exit codes: 0 done, 1 it failed, 2 something in the input is wrong, 130 stopped with Ctrl-C.
    """
    # Threads that wait for each other by spinning make small models several times slower as soon as another program
    # wants a core. OpenMP reads this when torch is imported, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
def run(
    recipe: RecipeFile,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for everything that is written, in the place of the recipe's `out`."),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", "--seeds", help="Seed in the place of the recipe's; repeat it for several."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds, if anything.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe describes, beside its baselines, and judge it.

    Example:

        transfuse run recipe.yaml --out runs/first --seed 0 --seed 1

    Stopped or killed, it goes on with `transfuse resume runs/first`. Afterwards open report.html in that folder;
    `transfuse report runs/first` shows the summary again. On several processes:

        accelerate launch -m transfuse run recipe.yaml
    """
    from transfuse.recipe import Recipe

    _run(Recipe.read(recipe, out=folder, seeds=seeds), resume, quiet, as_json)


@app.command()
def resume(folder: RunFolder, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Go on with a run that was stopped or killed; it ends as if nothing had happened.

    Example:

        transfuse resume runs/first

    The recipe is read from the folder. Finished trainings are kept, an interrupted one goes on from its newest
    checkpoint. Next: `transfuse report runs/first`.
    """
    from transfuse.recipe import Recipe

    _run(Recipe.of_run(folder), True, quiet, as_json)


@app.command()
def check(recipe: RecipeFile, as_json: AsJson = False) -> None:
    """Try a recipe without training: find errors, show shapes, and estimate memory and time.

    One batch goes through both models, and a few updates of every arm run on copies. Nothing is written.
    The exit code is 0 when the recipe would run and 1 when it would not.

    Example:

        transfuse check recipe.yaml

    Next: `transfuse run recipe.yaml`.
    """
    from transfuse.cli.tables import checked
    from transfuse.recipe import Recipe

    try:
        found = Recipe.read(recipe).check()
    except TransferError as error:
        if as_json:
            say(out, json.dumps({"ok": False, "error": str(error)}, indent=2))
            raise typer.Exit(1) from None
        _fail(error, 1)
    if as_json:
        say(out, json.dumps({"ok": True, **found}, indent=2))
        return
    if "measure" not in found:
        out.print(checked(found))
    say(out, f"This recipe runs. Next: transfuse run {recipe}")


@app.command()
def report(
    folder: RunFolder,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html anew from report.json.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show the summary of a finished run again, and draw its report.html anew.

    Example:

        transfuse report runs/first

    `--json` prints report.json for other programs. Next: open report.html in a browser; it needs no network.
    """
    from transfuse.report import Report, write_html

    if folder.is_dir() and not (folder / "report.json").exists():
        raise InputError(
            f"{folder} holds no report.json: if its run was stopped, transfuse resume {folder} finishes it"
        )
    found = Report.read(folder / "report.json")
    if html:
        write_html(found, folder / "report.html")
    _show(found, folder, as_json)


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family, for instance distill.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What you have: labelled, few-labelled, unlabelled, private or none.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="What your source gives: features, full (all logits), topk, sampled, text, weights, data (labelled, "
            "of another domain), tasks, clients or none."
        ),
    ] = None,
    want: Annotated[
        str | None,
        typer.Option(
            help="What you want: a smaller model, an adapted one, ...: smaller, merged, adapted, several-at-once, "
            "task-after-task, many-clients, new-classes, made-data, at-test-time, architecture or numbers."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="What your models do, for instance classification.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or those that fit your situation.

    The options describe what you have, and the list shows what works with it: with `--data unlabelled` every
    method that needs no labels, with `--teacher full` every method that is content with logits.

    Example:

        transfuse methods --data unlabelled --teacher full
        transfuse methods --want adapted --data unlabelled

    `--json` adds the files that test each method and what its proofs found. Next: `transfuse show KD`.
    """
    from transfuse.core.catalogue import select

    found = select(family, data, teacher, task, want)
    if as_json:
        say(out, json.dumps([entry.as_dict() for entry in found], indent=2))
        return
    if not found:
        say(out, "No method fits. Leave an option out to see more.")
        return
    from transfuse.cli.tables import catalogue

    out.print(catalogue(found))
    say(out, f"{len(found)} methods. `teacher` and `data` are the least that a method needs. Next: transfuse show NAME")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, for instance KD.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Explain one method: what it does, what it needs, where it is from, and its line in a recipe.

    Example:

        transfuse show KD

    Next: `transfuse new --method KD` writes a recipe with it.
    """
    from transfuse.cli.starter import method_line
    from transfuse.core.catalogue import find

    entry = find(name)
    line = method_line(entry.name)
    if as_json:
        say(out, json.dumps({**entry.as_dict(), "doc": entry.doc, "recipe": line}, indent=2))
        return
    from transfuse.cli.tables import card

    out.print(card(entry, line))
    say(out, f"Next: transfuse new --method {entry.name}")


@app.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
    method: Annotated[str, typer.Option(help="The method in it; `transfuse methods` lists them.")] = "KD",
) -> None:
    """Write a starter recipe that runs, with a comment on every line. It replaces nothing.

    Example:

        transfuse new recipe.yaml --method Hints

    Next: `transfuse check recipe.yaml`, then change its lines to your models and data.
    """
    from transfuse.cli.starter import write

    write(file, method)
    say(out, f"Wrote {file}. Next: transfuse check {file}, then transfuse run {file}")


@app.command()
def merge(
    recipe: RecipeFile,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the merged model, in the place of the recipe's `out`.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was killed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check that everything fits, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Merge models without a common ancestor, too.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge checkpoints that were trained from a common start, tensor by tensor, in little memory.

    Example:

        transfuse merge recipe.yaml --out merged

    A recipe says how, and what: \n\n
        method: {name: TIES, density: 0.3}\n
        base: models/base\n
        models: [models/a, models/b]

    With `lora: 16` what the merge changes in the base is written as an adapter of that rank; models may have adapters,
    too: {model: models/base, adapter: models/lora}. Recipes of mergekit's are read as they are. Models are folders of
    safetensors; every tensor is matched by its name and shape first, and what does not fit is listed. Next: load the
    folder with `from_pretrained`; see its README.md.
    """
    from transfuse.cli.tables import ledger
    from transfuse.recipe.merging import MergeRecipe

    found = MergeRecipe.read(recipe)
    for note in () if quiet else found.notes:
        say(err, f"Note: {note}")
    if dry_run:
        plan = found.plan(force)
        if as_json:
            say(out, json.dumps({"ok": True, "bytes": plan.bytes, "memory": plan.memory(), **plan.ledger.as_json()}))
        else:
            out.print(ledger(plan.ledger))
            rank = found.spec.lora
            size = f"{plan.bytes / 2**30:.2f} GB" if rank is None else f"an adapter of rank {rank}"
            say(out, f"This merge fits: {size} to write. Next: transfuse merge {recipe}")
        return
    with _bytes_done(not quiet) as progress:
        merged = found.run(folder, resume, force, None if quiet else lambda text: say(err, text), progress)
    if as_json:
        say(out, json.dumps({"folder": str(merged.folder), "lost": merged.lost, **merged.ledger.as_json()}))
    elif not quiet:
        out.print(ledger(merged.ledger))
        if merged.lost is None:
            say(out, f"Model: {merged.folder}")
        else:
            say(out, f"Adapter: {merged.folder}; {merged.lost['']:.1%} of the change is not in it. Load it with PEFT.")


@app.command()
def chat(
    student: Annotated[
        Path,
        typer.Argument(metavar="STUDENT", help="The folder of a run, or of a Hugging Face model.", show_default=False),
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this, and end; without it you are asked.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="What the model reads: bytes, smollm2 or a Hugging Face folder; by default its own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 says the most likely; 1 draws.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text, without a chat template.")] = False,
) -> None:
    """Talk to a language model that a run has trained.

    Example:

        transfuse chat runs/smollm2 --prompt "What is a list comprehension?"
        transfuse chat runs/smollm2

    The chat template of its tokenizer is used where there is one, and an answer ends with its end token. An empty
    line or Ctrl-D ends the conversation.
    """
    from transfuse.cli.conversation import Conversation

    talk = Conversation(student, tokenizer, plain, max_new_tokens, temperature, seed)
    talk.answer(prompt) if prompt is not None else talk.converse()


def _run(recipe: Any, resume: bool, quiet: bool, as_json: bool) -> None:
    from transfuse.progress import Progress

    finished = recipe.finished if resume else 0
    with _plain_warnings(), Progress(recipe.trainings, finished, not (quiet or as_json), err) as progress:
        result = recipe.run(resume, progress)
    if not quiet:
        _show(result.report, recipe.out, as_json)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as a sentence for the user, without the line of our code that gives them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(err, f"Warning: {message}")
        yield


def _show(report: Any, folder: Path, as_json: bool) -> None:
    from transfuse.report import summary

    if as_json:
        say(out, report.model_dump_json(indent=2, by_alias=True))
        return
    out.print(summary(report))
    say(out, "".join(f"\n{what}: {folder / name}" for what, name in FILES if (folder / name).exists()))


FILES = (("Report", "report.html"), ("Numbers", "report.json"), ("Model", "model.safetensors"))


@contextmanager
def _bytes_done(shown: bool) -> Iterator[Any]:
    """A bar of megabytes on a terminal."""
    from rich import progress as bars

    bar = bars.Progress(
        bars.TextColumn("merging"),
        bars.BarColumn(bar_width=20),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=err,
        disable=not (shown and err.is_terminal),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _fail(error: TransferError, code: int) -> Never:
    say(err, f"Error: {error}")
    raise typer.Exit(code) from None
