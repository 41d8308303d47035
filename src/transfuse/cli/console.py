"""Where the command line speaks."""

from __future__ import annotations

import os

from rich.console import Console

SILENT = int(os.environ.get("RANK", "0")) > 0
"""Whether this is not the first of several processes."""

out = Console(quiet=SILENT, soft_wrap=False)
err = Console(quiet=SILENT, stderr=True)


def say(console: Console, text: str) -> None:
    """Print text as it is: a name such as `[red]` is a name, and long lines are left whole."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
