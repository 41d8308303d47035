"""What the documentation shows is run. README: every block on its own; other pages: from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from transfuse.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = ["CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str = "python") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if "--8<--" not in block]


def run(code: str, name: str, names: dict[str, Any]) -> None:
    exec(compile(code, name, "exec", dont_inherit=True), names)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("number", range(len(blocks("README.md"))))
def test_every_block_of_the_readme_runs_on_its_own(number: int) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    run(blocks("README.md")[number], f"README.md, block {number}", names)
    if number == 0:
        assert names["result"].report.verdict == "arrived"
        assert {path.name for path in Path("student").iterdir()} == {
            "model.safetensors",
            "report.html",
            "report.json",
            "recipe.json",
        }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_page_runs_from_top_to_bottom(page: str) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for number, code in enumerate(blocks(page)):
        run(code, f"{page}, block {number}", names)


@pytest.mark.parametrize("page", [page for page in ("README.md", *PAGES) if blocks(page, "yaml")])
def test_every_recipe_that_is_shown_is_one(page: str, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        Recipe.read(path)
