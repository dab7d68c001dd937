"""Small pictures: as text inside a page, and side by side in one PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from caco.data.decode import Pixels

COLUMNS = 2
"""Rows of pictures that stand side by side in a gallery's PNG."""

_INK, _QUIET, _PAPER, _YES = "#1f2328", "#6b7280", "#ffffff", "#2e9e6b"


@dataclass(frozen=True, eq=False)
class Row:
    """Pictures that belong together: uint8 [H, W, 3] each, a heading, and whether each agrees (None: unknown)."""

    heading: str
    detail: str
    pictures: Sequence[Pixels]
    agrees: Sequence[bool | None]


def data_uri(pixels: Pixels) -> str:
    """Return a picture (uint8 [H, W, 3]) as a JPEG inside a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=84, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shrunk(pixels: Pixels, longest: int) -> Pixels:
    """Return a picture whose longer side is at most `longest` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(image)


def gallery_picture(title: str, rows: Sequence[Row], most_bytes: int) -> bytes:
    """Return rows of pictures under a title as one PNG of at most `most_bytes` (smaller pictures where it must be).

    Raises ValueError when there are no rows, or even pictures of 24 pixels make too large a file.
    """
    if not rows:
        raise ValueError("a gallery needs at least one row")
    for side in (80, 72, 64, 56, 48, 40, 32, 24):
        image = _drawn(title, rows, side).quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= most_bytes:
            return buffer.getvalue()
    raise ValueError(f"a gallery of {len(rows)} rows does not fit into {most_bytes:,} bytes")


def _drawn(title: str, rows: Sequence[Row], side: int) -> Image.Image:
    margin, gap, between, heading = 20, 4, 28, 40
    longest = max(len(row.pictures) for row in rows)
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    column_width = max(longest * (side + gap) - gap, 200)
    width = 2 * margin + columns * column_width + (columns - 1) * between
    height = 2 * margin + 34 + lines * (heading + side + gap + 6)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), _fitting(title, width - 2 * margin, 18), fill=_INK, font=_font(18))
    for number, row in enumerate(rows):
        line, column = divmod(number, columns)
        left = margin + column * (column_width + between)
        top = margin + 34 + line * (heading + side + gap + 6)
        draw.text((left, top + 4), _fitting(row.heading, column_width, 14), fill=_INK, font=_font(14))
        draw.text((left, top + 21), _fitting(row.detail, column_width, 12), fill=_QUIET, font=_font(12))
        for place, (pixels, agrees) in enumerate(zip(row.pictures, row.agrees, strict=True)):
            x, y = left + place * (side + gap), top + heading
            small = side < min(pixels.shape[:2])
            method = Image.Resampling.LANCZOS if small else Image.Resampling.BICUBIC
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), method), (x, y))
            if agrees:
                draw.rectangle((x, y + side + 1, x + side - 1, y + side + 3), fill=_YES)
    return canvas


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitting(text: str, width: int, size: int) -> str:
    """Return as much of a text as fits, with … for the rest."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
