"""The fonts that texts are set in: families from Debian packages, some of them kept for evaluation only.

Fonts are looked for below the folders of ``SENSORIUM_TRAINING_FONTS`` (separated by colons), by default
``/usr/share/fonts``. The file names decide the split, so that a folder of copies serves as well.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from PIL import ImageFont

# File names start with a family's prefix. Families of one design (Liberation Sans and FreeSans both resemble Helvetica)
# stay on one side, so that a held-out font is really another one.
_TRAIN = ("DejaVu", "Liberation", "Free", "Lato", "Roboto", "OpenSans", "Comfortaa", "Hack", "Carlito", "EBGaramond")
_HELD_OUT = ("Caladea", "Cantarell", "FiraCode", "Inconsolata", "LinBiolinum_R", "LinLibertine_R", "LinLibertine_D")
# Hairline cuts vanish at 14 px, and these faces have no plain letters and digits.
_UNREADABLE = ("Hairline", "Thin", "ExtraLight", "MathTeX", "_K", "_RZ", "_M")


@cache
def font_paths(split: str) -> tuple[Path, ...]:
    """Font files of ``train`` or ``held_out``, in a fixed order.

    Raises:
        FileNotFoundError: no font of the split is installed.
    """
    prefixes = _TRAIN if split == "train" else _HELD_OUT
    folders = os.environ.get("SENSORIUM_TRAINING_FONTS", "/usr/share/fonts").split(":")
    files = {path.name: path for folder in folders for path in Path(folder).rglob("*.[ot]tf")}
    chosen = [
        files[name]
        for name in sorted(files)
        if name.startswith(prefixes) and not any(mark in name for mark in _UNREADABLE)
    ]
    if not chosen:
        raise FileNotFoundError(
            f"fonts for the {split} split: got none below {folders}, expected files such as {prefixes[0]}*. "
            "Install the Debian packages that training/README.md lists, or set SENSORIUM_TRAINING_FONTS."
        )
    return tuple(chosen)


@cache
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at a pixel size; loaded once per process."""
    return ImageFont.truetype(str(path), size)
