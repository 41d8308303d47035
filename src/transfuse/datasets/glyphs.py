"""Characters drawn with real fonts: a font style is a domain, a script is a task, a letter is a class.

The fonts themselves are in :mod:`transfuse.datasets.fonts`. Drawings are kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core import rng
from transfuse.core.errors import InputError, StoreError, nearest
from transfuse.core.files import make_folder, temporary
from transfuse.datasets.fonts import PACKAGES, PARTS, Face, faces
from transfuse.datasets.splits import Splits

SCRIPTS = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "latin-small": "abcdefghijklmnopqrstuvwxyz",
    "greek": "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ",
    "greek-small": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ",
    "cyrillic-small": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "digits": "0123456789",
}
"""Scripts by name. Letters of different scripts may look the same (A is one in three of them)."""
EM, BASELINE = 0.8, 0.74
"""Size of the font, and height of the line that letters stand on, as shares of the picture."""
TURN, SCALE, SHIFT = 10.0, 0.15, 0.07
"""The most by which a further copy is turned (degrees), resized, and moved (share of the picture)."""
FORMAT = 1
"""Raised when drawings change, so that older ones in the cache are not used."""


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Drawings with what they show.

    Attributes:
        images: `(glyphs, size, size)` bytes, ink is 255.
        labels: `(glyphs,)` position in `characters`; face: `(glyphs,)` position in `faces`.
        missing: how many characters a face lacked; they are left out, never drawn as a box.
    """

    images: Tensor
    labels: Tensor
    face: Tensor
    faces: Sequence[Face]
    characters: str
    missing: int

    def part(self, name: str) -> TensorDataset:
        """The drawings with fonts of one part, as inputs `(1, size, size)` in [0, 1] and labels."""
        own = torch.tensor([face.part == name for face in self.faces])[self.face]
        return TensorDataset(self.images[own].unsqueeze(1).float() / 255, self.labels[own])


def glyphs(
    script: str | Sequence[str] = "latin",
    style: str = "",
    size: int = 28,
    copies: int = 1,
    seed: int = 0,
    fonts: str | Path | None = None,
) -> Splits:
    """Characters drawn with the installed fonts: inputs float32 `(1, size, size)` in [0, 1], ink is 1.

    Train, validate and test are different font families, fixed in :data:`~transfuse.datasets.fonts.FAMILIES`; there
    is no validate part where a style has no font for it. All
    letters stand on one line at one font size, so capitals are larger than small letters. The name of the data says
    how many fonts there were, and how many letters they lacked.

    Args:
        script: a name in :data:`SCRIPTS`, or several, whose letters are then numbered on.
        style: words that describe the fonts to use, such as `"serif"` or `"sans bold"`, see
            :func:`~transfuse.datasets.fonts.faces`; by default all.
        size: of the pictures, in pixels.
        copies: how often each letter is drawn with each font; all but the first are turned, resized and moved a
            little at random.
        seed: of those changes.
        fonts: a folder with the user's own fonts; by default those that Debian packages install.

    Raises:
        InputError: no font was found (it names the packages), a part of the data has none or a class of train has no
            letter, an unknown script or style, or `size` or `copies` below 8 and 1.
        MissingExtraError: Pillow is not installed.
        StoreError: the folder of fonts does not exist.
    """
    drawn = draw(script, style, size, copies, seed, fonts)
    parts = {part: drawn.part(part) for part in PARTS}
    for part in ("train", "test"):
        if len(parts[part]) == 0:
            raise InputError(
                f"no installed font {f'of the style {style!r} ' if style else ''}that has {script} is for {part}: use "
                f"a wider style, or apt install {' '.join(PACKAGES)}"
            )
    counts = parts["train"].tensors[1].bincount(minlength=len(drawn.characters))
    if absent := [c for c, count in zip(drawn.characters, counts.tolist(), strict=True) if count == 0]:
        raise InputError(f"no font to train with has the letters {''.join(absent)}: use other fonts or another script")
    names = script if isinstance(script, str) else " + ".join(script)
    name = f"{names} glyphs of {len(drawn.faces)} {f'{style} ' if style else ''}fonts ({drawn.missing} missing)"
    return Splits(parts["train"], parts["validate"] or None, parts["test"], tuple(drawn.characters), name)


def glyph_domains(
    source: str = "serif",
    target: str = "sans",
    script: str | Sequence[str] = "latin",
    size: int = 28,
    copies: int = 1,
    seed: int = 0,
    fonts: str | Path | None = None,
) -> Splits:
    """Letters in two styles of font: a labelled source, and the train, validate and test parts of a target.

    Args:
        source: style of the source domain; the train part of its families is :attr:`Splits.source`.
        target: style of the target domain.
        script, size, copies, seed, fonts: as in :func:`glyphs`.

    Raises:
        InputError, MissingExtraError, StoreError: as :func:`glyphs`.
    """
    there, here = (glyphs(script, style, size, copies, seed, fonts) for style in (source, target))
    return replace(here, source=there.train, name=f"{there.name} -> {here.name}")


def glyph_tasks(
    scripts: Sequence[str] = ("latin", "greek", "cyrillic"),
    style: str = "",
    size: int = 28,
    copies: int = 1,
    seed: int = 0,
    fonts: str | Path | None = None,
) -> Splits:
    """One task per script: train, validate and test are dicts by script, the labels of each counted from 0.

    Args:
        scripts: names in :data:`SCRIPTS`, in order.
        style, size, copies, seed, fonts: as in :func:`glyphs`.

    Raises:
        InputError, MissingExtraError, StoreError: as :func:`glyphs`.
    """
    tasks = {script: glyphs(script, style, size, copies, seed, fonts) for script in scripts}
    parts: dict[str, Any] = {part: {script: getattr(task, part) for script, task in tasks.items()} for part in PARTS}
    return Splits(**parts, name=", ".join(task.name for task in tasks.values()))


def draw(
    script: str | Sequence[str] = "latin",
    style: str = "",
    size: int = 28,
    copies: int = 1,
    seed: int = 0,
    fonts: str | Path | None = None,
) -> Glyphs:
    """Every letter with every face, from the cache where it was drawn before; arguments as :func:`glyphs`."""
    if size < 8 or copies < 1:
        raise InputError(f"glyphs need size of 8 or more and copies of 1 or more, found {size} and {copies}")
    scripts = [script] if isinstance(script, str) else list(script)
    for name in scripts:
        if name not in SCRIPTS:
            raise InputError(f"there is no script {name!r}; {nearest(name, SCRIPTS)}")
    characters = "".join(SCRIPTS[name] for name in scripts)
    found = faces(style, fonts)
    file = cache_folder() / f"{_key(found, characters, size, copies, seed)}.safetensors"
    drawn = _load(file) or _render(found, characters, size, copies, seed)
    if not file.exists():
        with suppress(StoreError):  # a cache that cannot be written costs time, and nothing else
            make_folder(file.parent)
            _save(file, drawn)
    missing = len(found) * len(characters) * copies - len(drawn["images"])
    return Glyphs(drawn["images"], drawn["labels"].long(), drawn["face"].long(), found, characters, missing // copies)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/transfuse/glyphs`, by default in `~/.cache`; a relative path there is ignored."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "transfuse" / "glyphs"


def _key(found: Sequence[Face], *arguments: Any) -> str:
    """Changes whenever a font file, the drawing program or an argument does."""
    import PIL

    files = [(str(f.path), f.path.stat().st_size, f.path.stat().st_mtime_ns) for f in found]
    return hashlib.sha256(json.dumps([FORMAT, PIL.__version__, files, arguments]).encode()).hexdigest()[:32]


def _load(file: Path) -> Mapping[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError):  # not there, or broken: drawn again, and written anew
        with suppress(OSError):
            file.unlink()
        return None


def _save(file: Path, drawn: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with temporary(file) as partial:
        save_file(dict(drawn), partial)


def _render(found: Sequence[Face], characters: str, size: int, copies: int, seed: int) -> dict[str, Tensor]:
    images, labels, owners = [], [], []
    for number, face in enumerate(found):
        pen = _Pen(face.path, size)
        for label, character in enumerate(characters):
            if not pen.has(character):
                continue
            draws = random.Random(rng.derive(seed, face.family, face.name, character))
            images += pen.draw(character, copies, draws)
            labels += [label] * copies
            owners += [number] * copies
    return {
        "images": torch.stack(images) if images else torch.zeros(0, size, size, dtype=torch.uint8),
        "labels": torch.tensor(labels, dtype=torch.int16),
        "face": torch.tensor(owners, dtype=torch.int16),
    }


class _Pen:
    """Draws with one font, at twice the resolution, so that turned letters are as smooth as upright ones."""

    def __init__(self, path: Path, size: int):
        from PIL import ImageFont

        self.side = 2 * size
        self.font = ImageFont.truetype(path, self.side * EM, layout_engine=ImageFont.Layout.BASIC)
        self.box = self._ink("\uffff")  # no character, so every font draws what stands for one it lacks

    def has(self, character: str) -> bool:
        ink = self._ink(character)
        return any(ink[1]) and ink != self.box

    def draw(self, character: str, copies: int, draws: random.Random) -> list[Tensor]:
        """Pictures `(size, size)` of a character: the first as it is, the others changed at random."""
        from PIL import Image, ImageDraw

        plain = Image.new("L", (self.side, self.side))
        at = (self.side / 2, self.side * BASELINE)
        ImageDraw.Draw(plain).text(at, character, fill=255, font=self.font, anchor="ms")
        images = [plain]
        for _ in range(copies - 1):
            turn, scale, right, down = (draws.uniform(-most, most) for most in (TURN, SCALE, SHIFT, SHIFT))
            matrix = _inverse(math.radians(turn), 1 + scale, right * self.side, down * self.side, self.side / 2)
            images.append(plain.transform(plain.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
        halves = [image.reduce(2) for image in images]
        return [torch.frombuffer(bytearray(h.tobytes()), dtype=torch.uint8).view(h.height, h.width) for h in halves]

    def _ink(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask = self.font.getmask(character)
        return mask.size, bytes(mask)


def _inverse(turn: float, scale: float, right: float, down: float, middle: float) -> tuple[float, ...]:
    """Where each pixel of a picture comes from that is turned and scaled about its middle, then moved."""
    a, b = math.cos(turn) / scale, math.sin(turn) / scale
    x, y = middle + right, middle + down
    return a, b, middle - a * x - b * y, -b, a, middle + b * x - a * y
