from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transfuse.core.errors import InputError, StoreError
from transfuse.datasets import draw, glyph_domains, glyph_tasks, glyphs, load
from transfuse.datasets.fonts import FAMILIES, PACKAGES, faces
from transfuse.datasets.glyphs import SCRIPTS, cache_folder

ImageFont = pytest.importorskip("PIL.ImageFont")
DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
needs_fonts = pytest.mark.skipif(not DEJAVU.is_dir(), reason="needs apt install fonts-dejavu-core")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five of DejaVu's files as a user's own fonts, the families of which are split by a hash."""
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"):
        (fonts / f"{name}.ttf").write_bytes((DEJAVU / f"{name}.ttf").read_bytes())
    return fonts


def test_scripts_are_as_long_as_alphabets() -> None:
    assert [len(SCRIPTS[s]) for s in ("latin", "greek", "cyrillic", "digits")] == [26, 24, 32, 10]
    assert all(len(set(letters)) == len(letters) for letters in SCRIPTS.values())
    assert SCRIPTS["greek"].lower() == SCRIPTS["greek-small"]
    assert SCRIPTS["cyrillic"].lower() == SCRIPTS["cyrillic-small"]


def test_every_kind_of_font_has_families_for_every_part() -> None:
    found = {(kind, part) for kind, part, _ in FAMILIES.values()}
    assert found == {(k, p) for k in ("serif", "sans", "mono") for p in ("train", "validate", "test")}


@needs_fonts
class TestGlyphs:
    def test_pictures_are_ink_on_black(self, folder: Path) -> None:
        drawn = draw("digits", fonts=folder, size=20)
        assert drawn.images.shape == (50, 20, 20) and drawn.images.dtype == torch.uint8
        assert drawn.images.amax(dim=(1, 2)).min() > 200
        assert drawn.images[:, 0].max() == 0 and 0.03 < (drawn.images > 127).float().mean() < 0.4
        assert drawn.labels.tolist() == [*range(10)] * 5
        assert drawn.missing == 0

    def test_bold_faces_have_more_ink(self, folder: Path) -> None:
        drawn = draw("digits", fonts=folder)
        bold = torch.tensor(["bold" in f.styles for f in drawn.faces])[drawn.face]
        assert drawn.images[bold].float().mean() > 1.2 * drawn.images[~bold].float().mean()

    def test_a_letter_that_a_font_lacks_is_counted_and_never_a_box(self, folder: Path, monkeypatch: Any) -> None:
        monkeypatch.setitem(SCRIPTS, "odd", "A\U00013000")  # an Egyptian hieroglyph
        drawn = draw("odd", fonts=folder)
        assert drawn.missing == 5
        assert drawn.labels.tolist() == [0] * 5

    def test_the_first_copy_is_upright_and_the_others_differ(self, folder: Path) -> None:
        one, three = draw("digits", fonts=folder), draw("digits", fonts=folder, copies=3)
        assert three.images[::3].equal(one.images)
        assert not three.images[1::3].equal(one.images) and not three.images[1::3].equal(three.images[2::3])
        assert not three.images.equal(draw("digits", fonts=folder, copies=3, seed=1).images)
        moved = (three.images[1::3].float() - one.images.float()).abs().mean() / one.images.float().mean()
        assert moved < 1.2, "a copy should still show the letter"

    def test_a_letter_does_not_depend_on_the_others_drawn(self, folder: Path) -> None:
        both = draw(["digits", "latin"], fonts=folder, copies=2)
        alone = draw("latin", fonts=folder, copies=2)
        assert both.images[both.labels >= 10].equal(alone.images)

    def test_families_are_in_one_part_only(self, folder: Path) -> None:
        found = faces(fonts=folder)
        parts: dict[str, set[str]] = {}
        for face in found:
            parts.setdefault(face.family, set()).add(face.part)
        assert all(len(p) == 1 for p in parts.values()) and len(parts) == 3
        splits = glyphs("digits", fonts=folder)
        assert splits.validate is None, "three families are too few for three parts"
        assert len(splits.train) + len(splits.test) == 50

    def test_test_fonts_are_unseen_where_the_packages_are_installed(self) -> None:
        if len(faces()) < 100:
            pytest.skip("needs the packages of FAMILIES")
        splits = glyphs("digits")
        assert [len(p) for p in (splits.train, splits.validate, splits.test)] == [1050, 180, 400]
        train, test = ({f.family for f in faces() if f.part == part} for part in ("train", "test"))
        assert not train & test
        domains = glyph_domains("serif", "sans", "digits")
        assert {len(domains.source), len(domains.train)} == {280, 670}

    def test_tasks_are_scripts(self, folder: Path) -> None:
        tasks = glyph_tasks(["digits", "greek"], fonts=folder)
        assert list(tasks.train) == list(tasks.test) == ["digits", "greek"]
        assert [part.tensors[1].max().item() for part in tasks.train.values()] == [9, 23]

    def test_recipes_can_load_it(self, folder: Path) -> None:
        splits = load("glyphs", script=["digits", "greek"], size=16, fonts=str(folder))
        assert len(splits.classes) == 34 and splits.train.tensors[0].shape[1:] == (1, 16, 16)


@needs_fonts
class TestCache:
    def test_a_second_call_reads_what_the_first_wrote(self, folder: Path, own_cache: Path) -> None:
        first = draw("digits", fonts=folder)
        (file,) = cache_folder().iterdir()
        assert file.parent == own_cache / "transfuse" / "glyphs"
        assert load_file(file)["images"].equal(first.images)
        stamp = file.stat().st_mtime_ns
        again = draw("digits", fonts=folder)
        assert again.images.equal(first.images) and again.missing == first.missing
        assert file.stat().st_mtime_ns == stamp

    def test_a_changed_font_or_argument_is_another_entry(self, folder: Path) -> None:
        draw("digits", fonts=folder)
        os.utime(folder / "DejaVuSans.ttf", ns=(1, 1))
        draw("digits", fonts=folder)
        draw("digits", fonts=folder, size=30)
        assert len(list(cache_folder().iterdir())) == 3

    def test_a_broken_entry_is_drawn_again(self, folder: Path) -> None:
        first = draw("digits", fonts=folder)
        (file,) = cache_folder().iterdir()
        file.write_bytes(file.read_bytes()[:1000])
        assert draw("digits", fonts=folder).images.equal(first.images)
        assert load_file(file)["images"].equal(first.images)

    def test_a_cache_that_cannot_be_written_is_no_error(self, folder: Path, own_cache: Path) -> None:
        own_cache.write_text("a file, not a folder")
        assert len(draw("digits", fonts=folder).images) == 50

    def test_a_relative_cache_home_is_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        assert cache_folder() == Path.home() / ".cache/transfuse/glyphs"


class TestErrors:
    def test_no_font_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transfuse.datasets.fonts.system_folders", list)
        with pytest.raises(InputError, match=f"no fonts were found: apt install {PACKAGES[0]}"):
            glyphs()

    def test_a_folder_without_fonts_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.ttf").write_text("no font")
        with pytest.raises(InputError, match=f"no 'bold' fonts were found in {tmp_path}"):
            glyphs(style="bold", fonts=tmp_path)

    @needs_fonts
    def test_a_part_without_fonts_is_named(self, folder: Path) -> None:
        for file in folder.glob("*S*if*"):
            file.unlink()
        with pytest.raises(InputError, match="no installed font that has digits is for t"):
            glyphs("digits", fonts=folder)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"script": "latim"}, "no script 'latim'; did you mean 'latin'"),
            ({"style": "sans itallic"}, "unknown style 'itallic' of a font; did you mean 'italic'"),
            ({"size": 7}, "size of 8 or more"),
            ({"copies": 0}, "copies of 1 or more"),
        ],
    )
    def test_wrong_arguments_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            glyphs(**arguments)

    def test_a_missing_folder_is_named(self) -> None:
        with pytest.raises(StoreError, match="there is no folder /nowhere"):
            glyphs(fonts="/nowhere")
