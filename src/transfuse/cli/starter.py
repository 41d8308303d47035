"""The recipe that `transfuse new` writes, and a method's line in it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from string import Template

from transfuse.core.catalogue import PACKAGE, Entry, find
from transfuse.core.errors import InputError
from transfuse.core.files import write_atomically

TAP = "layer2"
"""What stands for an argument that has no default: such arguments name layers, and the starter's models have this."""

STARTER = Template("""\
# A recipe that runs as it stands. Change it line by line, and try each change with: transfuse check $file
# Paths are relative to this file.

name: $name

# How knowledge moves. `transfuse methods` lists the methods, `transfuse show $method` explains this one.
# A list of methods is added up; each may have a weight, a number or {linear: [0, 1]}.
method: $line

# The model that knows. A model is a name of transfuse.models (mlp, small-cnn, resnet8, ...), a function of your
# own, `models.py:build` or `package.module:build`, or a local Hugging Face folder, `huggingface: FOLDER`.
source:
  model: small-cnn
  args: {width: 16}
  # Trained on labels first. If yours is trained already, leave this out and name its file: weights: teacher.safetensors
  train: {epochs: 10, lr: 0.003, data: {name: digits}}

# The model that learns: every seed starts from its own initial weights.
target:
  model: small-cnn
  args: {width: 4}

# What it learns from: a data set of transfuse.datasets (digits, image-folder, table, hf, text, ...) or a function
# of your own, `data.py:load`, that returns (train, validate, test). Here, 50 images keep their labels.
data:
  name: digits$labels

# How every arm trains: epochs or steps, batch_size, optimizer, schedule, precision, ...
training:
  epochs: 20
  lr: 0.01

# What the method is compared with, under the same budget: scratch, finetune, shuffled teacher, or other methods.
compare: [$compare]

# Every arm is trained once per seed; more seeds make the verdict surer.
seeds: [0, 1, 2]

# Where everything is written; by default runs/NAME.
out: runs/$name
""")


RECIPES = next(p for p in (PACKAGE / "recipes", PACKAGE.parent.parent / "recipes") if p.is_dir())
"""Recipes of the families, and of methods that need one of their own: in the package, or beside it in a checkout."""
FILLED: dict[str, object] = {
    "novel": 5,
    "shape": [1, 8, 8],
    "mix": {"english": 0.5, "questions": 0.5},
    "start": {"english": 1.0},
    "end": {"questions": 1.0},
}
"""What stands for other arguments without a default, as the recipe of their family needs them."""
PYTHON_ONLY = (
    "AdapterFusion", "ByteSpanKD", "CrossDConv", "LowRankClone", "MasterASR", "NearSwap", "NeuronSpecialization",
    "Passthrough", "ScaLearn", "SortedLogitsKD", "Subquadratic", "Swing", "TinyViT", "TokAlign",
)  # fmt: skip
"""Methods with data or models made in Python: two readings of a text, how private tokens are, stored views, a teacher
with other mixers, larger and smaller Llamas, banks of adapters, tasks, networks for volumes. Merges of one model
with the base are here as well: `transfuse merge` is there for them."""
BESIDE = {"adapt": "[SourceOnly]", "continual": "[{name: FineTune}]", "synthesize": "[shuffled teacher]"}
"""What methods of a family are compared with."""


def method_line(name: str, alone: bool = True) -> str:
    """A method as it stands in a recipe, with its arguments at their defaults."""
    from transfuse.recipe import accepts

    found = find(name)
    given = {
        key: FILLED.get(key, TAP) if value is inspect.Parameter.empty else value for key, value in accepts(name).items()
    }
    line = f"{{{', '.join(f'{key}: {_yaml(value)}' for key, value in {'name': found.name, **given}.items())}}}"
    # What carries no outputs teaches no head, so labels do.
    return line if alone or found.card.carries in ("outputs", "nothing") else f"[{{name: Labels}}, {line}]"


def write(file: Path, method: str) -> None:
    """Write the starter recipe.

    Raises:
        InputError: the file exists, or there is no such method.
        StoreError: it cannot be written.
    """
    entry = find(method)
    if file.exists():
        raise InputError(f"{file} exists already and is left as it is: name another file")
    own = RECIPES / f"{entry.name.lower()}.yaml"
    if entry.name in PYTHON_ONLY:
        raise _not_in_a_recipe(entry)
    if own.exists():
        text = own.read_text(encoding="utf-8")
    elif entry.card.tasks == ("language-model",) and entry.family == "distill":
        text = _with_method((RECIPES / "language.yaml").read_text(encoding="utf-8"), entry, "[scratch]")
    elif entry.family == "distill":
        text = _distillation(file, entry)
    elif f"name: {entry.name}" in (text := (RECIPES / f"{entry.family}.yaml").read_text(encoding="utf-8")):
        text = text if _judges(text, entry.name) else _with_method(text, entry)
    elif entry.family == "measure":
        raise _not_in_a_recipe(entry)
    else:
        text = _with_method(text, entry)
    write_atomically(file, text)


def _not_in_a_recipe(entry: Entry) -> InputError:
    return InputError(
        f"{entry.name} needs more than a recipe can say: use it from Python, `transfuse show {entry.name}` says how"
    )


def _distillation(file: Path, entry: Entry) -> str:
    """The starter with a comment on every line."""
    return STARTER.substitute(
        file=file.name,
        name=file.stem,
        method=entry.name,
        line=method_line(entry.name, alone=False),
        labels="" if entry.card.data == "labelled" else "\n  args: {labels: 50}",
        compare="scratch" if entry.card.teacher == "none" else "scratch, shuffled teacher",
    )


def _judges(text: str, name: str) -> bool:
    """Whether a recipe's own method is this one, and nothing is added to it."""
    import yaml

    method = yaml.safe_load(text)["method"]
    return isinstance(method, dict) and method["name"] == name


def _with_method(text: str, entry: Entry, beside: str | None = None) -> str:
    """The recipe of a family with another of its methods."""
    beside = "[]" if entry.card.control else beside or BESIDE.get(entry.family, "[]")
    for key, comment, value in (
        ("method", f"# How knowledge moves; `transfuse show {entry.name}` explains it.", method_line(entry.name)),
        ("compare", "# What the method is compared with.", beside),
    ):
        block = re.compile(rf"(?:^#[^\n]*\n)*^{key}:.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
        if found := block.search(text):
            text = f"{text[: found.start()]}{comment}\n{key}: {value}{text[found.end() :]}"
    return text


def _yaml(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
