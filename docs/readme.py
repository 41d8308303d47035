"""`python docs/readme.py FOLDER`: put the table of a run into README.md, so that no number is typed by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from transfuse.report import Report, summary

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- --8<-- \[start:quickstart\].*?-->\n).*(<!-- --8<-- \[end:quickstart\] -->)", re.DOTALL)


def table(folder: Path) -> str:
    """The table and verdict of a run, as a terminal of 80 columns shows them."""
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(summary(Report.read(folder / "report.json")))
    return "\n".join(line.rstrip() for line in captured.get().strip().splitlines())


def main(folder: Path) -> None:
    """Replace what is between the marks in README.md."""
    block = f"```text\n{table(folder)}\n```\n"
    text = TABLE.sub(lambda found: found[1] + block + found[2], README.read_text(encoding="utf-8"))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
