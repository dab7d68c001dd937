"""Folders of encoded images of many kinds, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def smooth(seed: int, height: int, width: int) -> Image.Image:
    """Return a picture of soft colours: decoders differ little on it."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def write_set(folder: Path, plain: int = 9) -> dict[str, bytes]:
    """Write plain JPEG files of many sizes, and one of each other kind; return them by name."""
    sizes = [(40 + 7 * (number % 9), 90 - 5 * (number % 9)) for number in range(plain)]
    files = {f"{number:02d}.jpg": jpeg(smooth(number, *size)) for number, size in enumerate(sizes)}
    turned = Image.Exif()
    turned[0x0112] = 6
    png = io.BytesIO()
    smooth(20, 50, 40).save(png, "PNG")
    files |= {
        "grey.jpg": jpeg(smooth(21, 200, 120).convert("L")),
        "inks.jpg": jpeg(smooth(22, 48, 56).convert("CMYK")),
        "progressive.jpg": jpeg(smooth(23, 61, 47), progressive=True),
        "turned.jpg": jpeg(smooth(24, 48, 70), exif=turned),
        "picture.png": png.getvalue(),
        "truncated.jpg": jpeg(smooth(25, 60, 60))[:-200],
        "nothing.jpg": b"",
    }
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files
