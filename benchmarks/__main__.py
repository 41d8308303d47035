"""`python -m benchmarks NAME`: run a benchmark, print a table, write JSON, and fail when a limit is broken."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path

from benchmarks.common import Result
from transfuse.core.files import write_atomically

BENCHMARKS = {
    "divergence": "fused divergences over the matrix products they need",
    "merge": "merging checkpoints on disk, beside mergekit and beside copying; memory",
    "startup": "importing the library and running small commands",
    "store": "a teacher store: steps from it, its size, its memory, building it",
    "step": "the trainer's step over a loop written by hand",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 when a median is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=BENCHMARKS)
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--repeats", type=int, metavar="N", help="pairs of measurements per comparison")
    parser.add_argument("--smoke", action="store_true", help="see whether it runs at all; limits do not count")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:12}{what}" for name, what in BENCHMARKS.items()))
        return 0
    if given.name is None:
        parser.error("name a benchmark, or ask for --list")
    if given.repeats is not None and given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}, it must be at least 1")
    result = importlib.import_module(f"benchmarks.{given.name}").measure(given.repeats, given.smoke)
    print(table(result))
    if given.json:
        write_atomically(given.json, json.dumps(result.as_json(), indent=2) + "\n")
    return int(bool(result.over) and not given.smoke)


def table(result: Result) -> str:
    """One line per comparison."""
    width = max(map(len, result.ratios))
    lines = [f"{'':{width}}  median     min     max   limit"]
    for label, ratios in result.ratios.items():
        numbers = (statistics.median(ratios), min(ratios), max(ratios), result.limits[label])
        note = "  OVER" if label in result.over else ""
        lines.append(f"{label:{width}}" + "".join(f"{number:8.3f}" for number in numbers) + note)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
