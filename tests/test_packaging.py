"""What is installed: light to import, typed, and complete."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling import build
from packaging.requirements import Requirement

import transfuse

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "accelerate", "transformers", "datasets", "pandas", "sklearn", "PIL", "plotly", "pydantic")
EXTRAS = ("transformers", "datasets", "pandas", "pyarrow", "sklearn", "PIL", "tensorboard", "mkdocs")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_library_imports_nothing_heavy() -> None:
    assert python(f"import sys, transfuse; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


def test_works_without_any_extra() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"  # None in sys.modules: an import fails
    code = f"""{blocked}
import torch, transfuse
from transfuse.distill import KD
from transfuse.models import MLP
data = torch.rand(64, 4)
result = transfuse.transfer(KD(), MLP(4), MLP(4), data, validate=data, compare=["shuffled teacher"], steps=1)
print(result.report.verdict)
"""
    assert python(code).strip() in ("arrived", "no effect", "negative transfer")


def test_public_names_are_found_on_first_use() -> None:
    loaded = "print('torch' in sys.modules)"
    code = f"import sys, transfuse; {loaded}; transfuse.transfer; {loaded}"
    assert python(code).split() == ["False", "True"]
    for name in transfuse.__all__:
        assert getattr(transfuse, name).__name__ == name
        assert name in dir(transfuse)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'teleport'"):
        _ = transfuse.teleport


def test_version_is_that_of_the_metadata() -> None:
    assert transfuse.__version__ == importlib.metadata.version("transfuse")


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    found = map(Requirement, importlib.metadata.requires("transfuse") or [])
    return [requirement for requirement in found if requirement.name != "transfuse"]


APART = {"flwr"}
"""Wants older versions of what is pinned here, so it is installed in an environment of its own."""


def test_every_dependency_is_pinned_in_a_version_that_the_package_accepts() -> None:
    pinned = {c.name.lower(): next(iter(c.specifier)).version.removesuffix(".*") for c in constraints()}
    for requirement in declared():
        if requirement.name in APART:
            continue
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_the_library_sets_no_upper_bounds() -> None:
    assert {s.operator for requirement in declared() for s in requirement.specifier} == {">="}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel of this checkout, built by the back-end that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return set(zipfile.ZipFile(folder / build.build_wheel(str(folder))).namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel: set[str]) -> None:
    package = ROOT / "src"
    files = {str(p.relative_to(package)) for p in (package / "transfuse").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"transfuse/py.typed", "transfuse/report/template.html.j2"} <= files
    files |= {f"transfuse/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert {name for name in wheel if ".dist-info/" not in name} == files


def test_the_wheel_holds_the_licence(wheel: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
