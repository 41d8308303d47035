"""What stands behind each method, for the catalogue: the files that test it and what its proofs found."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from proofs.proof import HERE
from proofs.result import ProofResult
from transfuse.core.catalogue import PACKAGE, entries

INDEX = PACKAGE / "core" / "evidence.json"
ROOT = HERE.parent


def gather(results: list[ProofResult]) -> dict[str, Any]:
    """By the name of the method; nothing in it is typed by hand."""
    used = {path.relative_to(ROOT).as_posix(): _names(path) for path in sorted(ROOT.glob("tests/**/test_*.py"))}
    return {
        entry.name: {
            "tests": [path for path, names in used.items() if entry.name in names],
            "proofs": [_found(result, entry.name) for result in results if entry.name in result.proves],
        }
        for entry in sorted(entries(), key=lambda entry: entry.name)
    }


def _found(result: ProofResult, name: str) -> dict[str, Any]:
    """Gain and verdict are null where the method is what others are compared with."""
    gain, verdict = result.about(name) or (None, None)
    return {
        "name": result.name,
        "verdict": verdict,
        "metric": result.metric,
        "baseline": result.baseline,
        "gain": gain and gain.mean,
        "low": gain and gain.low,
        "high": gain and gain.high,
        "seeds": len(result.seeds),
    }


def _names(path: Path) -> set[str]:
    """The names that a test file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
