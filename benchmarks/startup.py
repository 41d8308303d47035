"""How long a user waits before anything happens, in whole processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import Result, alternate

COMMAND_SECONDS = 0.5
"""What a command that only prints may take."""
IMPORTS = {
    "import transfuse": "import transfuse",
    "import KD": "from transfuse import transfer; from transfuse.distill import KD",
}
COMMANDS = {"transfuse --help": ["--help"], "transfuse methods": ["methods"]}


def measure(repeats: int | None, smoke: bool) -> Result:
    """Compare every import with `import torch`, and every command with half a second."""
    result = Result("startup")
    repeats, warmup = (1, 0) if smoke else (repeats or 7, 1)
    theirs = partial(seconds, [sys.executable, "-c", "import torch"])
    for label, code in IMPORTS.items():
        ours = partial(seconds, [sys.executable, "-c", code])
        result.add(f"{label} / import torch", 1.10, alternate(ours, theirs, repeats, warmup))
    for label, arguments in COMMANDS.items():
        ours = partial(seconds, [str(script()), *arguments])
        pairs = alternate(ours, lambda: COMMAND_SECONDS, repeats, warmup)
        result.add(f"{label} / {COMMAND_SECONDS} s", 1.0, pairs)
        result.ratios[f"{label} imports torch"] = [float(imports_torch(arguments))]
        result.limits[f"{label} imports torch"] = 0.0
    return result


def seconds(command: Sequence[str]) -> float:
    """Wall time of a process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def imports_torch(arguments: Sequence[str]) -> bool:
    """Whether the command loads torch."""
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(script()), *arguments], capture_output=True, text=True, check=True
    )
    return process.stderr.split()[-1] == "True"


def script() -> Path:
    """The console script, beside the interpreter."""
    return Path(sys.executable).with_name("transfuse")
