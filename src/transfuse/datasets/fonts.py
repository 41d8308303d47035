"""Fonts that Debian packages install: which family is for training and which for testing, and where the files are.

What is drawn with them is in :mod:`transfuse.datasets.glyphs`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transfuse.core.errors import InputError, MissingExtraError, StoreError, nearest
from transfuse.datasets.splits import cuts

PARTS = ("train", "validate", "test")
FRACTIONS = (0.6, 0.2, 0.2)
SUFFIXES = (".ttf", ".otf", ".ttc")
FAMILIES: dict[str, tuple[str, str, str]] = {
    "DejaVu Serif": ("serif", "train", "fonts-dejavu-extra"),
    "FreeSerif": ("serif", "train", "fonts-freefont-ttf"),
    "Liberation Serif": ("serif", "train", "fonts-liberation"),
    "Linux Libertine O": ("serif", "train", "fonts-linuxlibertine"),
    "PT Serif": ("serif", "train", "fonts-paratype"),
    "PT Serif Caption": ("serif", "train", "fonts-paratype"),
    "EB Garamond": ("serif", "validate", "fonts-ebgaramond"),
    "Old Standard TT": ("serif", "test", "fonts-oldstandard"),
    "GFS Didot": ("serif", "test", "fonts-gfs-didot"),
    "DejaVu Sans": ("sans", "train", "fonts-dejavu-extra"),
    "FreeSans": ("sans", "train", "fonts-freefont-ttf"),
    "Liberation Sans": ("sans", "train", "fonts-liberation"),
    "Liberation Sans Narrow": ("sans", "train", "fonts-liberation"),
    "Lato": ("sans", "train", "fonts-lato"),
    "Carlito": ("sans", "train", "fonts-crosextra-carlito"),
    "Open Sans": ("sans", "train", "fonts-open-sans"),
    "Open Sans Condensed": ("sans", "train", "fonts-open-sans"),
    "PT Sans": ("sans", "train", "fonts-paratype"),
    "PT Sans Caption": ("sans", "train", "fonts-paratype"),
    "PT Sans Narrow": ("sans", "train", "fonts-paratype"),
    "Comfortaa": ("sans", "train", "fonts-comfortaa"),
    "Linux Biolinum O": ("sans", "validate", "fonts-linuxlibertine"),
    "Play": ("sans", "validate", "fonts-play"),
    "Comic Neue": ("sans", "validate", "fonts-comic-neue"),
    "Roboto": ("sans", "test", "fonts-roboto-unhinted"),
    "Roboto Condensed": ("sans", "test", "fonts-roboto-unhinted"),
    "Jura": ("sans", "test", "fonts-jura"),
    "DejaVu Sans Mono": ("mono", "train", "fonts-dejavu-extra"),
    "FreeMono": ("mono", "train", "fonts-freefont-ttf"),
    "PT Mono": ("mono", "train", "fonts-paratype"),
    "Inconsolata": ("mono", "validate", "fonts-inconsolata"),
    "Linux Libertine Mono O": ("mono", "validate", "fonts-linuxlibertine"),
    "Anonymous Pro": ("mono", "test", "fonts-anonymous-pro"),
    "Liberation Mono": ("mono", "test", "fonts-liberation"),
}
"""Family -> its kind, the part of the data it is for, and the Debian package that has it.

Families of one design (a condensed cut, a derived family, two revivals of one typeface) are in one part, so that a
test font is a new design. Fixed by hand, so the split does not depend on what else is installed.
"""
PACKAGES = tuple(sorted({package for _, _, package in FAMILIES.values()}))
STYLES = ("serif", "sans", "mono", "upright", "italic", "light", "regular", "bold")
_BOLD = ("bold", "black", "heavy")
_LIGHT = ("light", "thin", "hairline")


@dataclass(frozen=True, slots=True)
class Face:
    """One font file.

    Attributes:
        family, name: what the font calls itself, for example `"Lato"` and `"Bold Italic"`.
        part: `"train"`, `"validate"` or `"test"`.
        styles: words that describe it, of :data:`STYLES`.
    """

    path: Path
    family: str
    name: str
    part: str
    styles: frozenset[str]


def faces(style: str = "", fonts: str | Path | None = None) -> list[Face]:
    """The installed faces that a style describes, by family and name.

    Args:
        style: words of :data:`STYLES` that must all be true, for example `"sans bold italic"`; `""` is every face.
        fonts: a folder of the user's own font files, whose families are then split by a hash of their names;
            None: the families of :data:`FAMILIES`, wherever the system keeps its fonts.

    Raises:
        MissingExtraError: Pillow is not installed.
        StoreError: there is no such folder.
        InputError: an unknown style, or no face fits; it says what to install.
    """
    words = style.split()
    for word in words:
        if word not in STYLES:
            raise InputError(f"unknown style {word!r} of a font; {nearest(word, STYLES)}")
    if fonts is not None and not Path(fonts).is_dir():
        raise StoreError(f"there is no folder {fonts}")
    known = FAMILIES if fonts is None else None
    found = [
        f for f in _read(system_folders() if fonts is None else [Path(fonts)], known) if f.styles.issuperset(words)
    ]
    if not found:
        wanted = f"{style!r} fonts" if style else "fonts"
        where = f" in {fonts}" if fonts is not None else f": apt install {' '.join(PACKAGES)}"
        raise InputError(f"glyphs are drawn with fonts, and no {wanted} were found{where}")
    return found


def system_folders() -> list[Path]:
    """Where a Linux desktop keeps fonts, the user's own first."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return [home / "fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]


def _read(folders: Iterable[Path], known: dict[str, tuple[str, str, str]] | None) -> list[Face]:
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise MissingExtraError("pillow", "data", "glyphs") from error
    named: dict[tuple[str, str], Path] = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
            try:
                family, name = ImageFont.truetype(path, 12, layout_engine=ImageFont.Layout.BASIC).getname()
            except OSError:
                continue  # no font that can be drawn
            if family and (known is None or family in known):
                named.setdefault((family, name or "Regular"), path)
    table = _by_hash({family for family, _ in named}) if known is None else known
    return [
        Face(path, family, name, table[family][1], _styles(table[family][0], name))
        for (family, name), path in sorted(named.items())
    ]


def _by_hash(families: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    order = sorted(families, key=lambda family: (zlib.crc32(family.encode()), family))
    begins = cuts(len(order), FRACTIONS)
    return {family: ("", PARTS[sum(i >= begin for begin in begins[1:3])], "") for i, family in enumerate(order)}


def _styles(kind: str, name: str) -> frozenset[str]:
    lower = name.lower()
    slant = "italic" if "italic" in lower or "oblique" in lower else "upright"
    weight = next((w for w, marks in (("bold", _BOLD), ("light", _LIGHT)) if any(m in lower for m in marks)), "regular")
    return frozenset({slant, weight, *([kind] if kind else [])})
