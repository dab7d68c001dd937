"""Every kind of image file becomes the picture it shows; every unusable one says why."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from caco.data import decode
from caco.data.decode import BrokenImage, Shrink, decode_rgb
from caco.errors import CacoError

# Four patches of 24 x 32 pixels: red, green / blue, grey. Every turn and flip of it is another picture.
RED, GREEN, BLUE, GREY = (230, 20, 30), (40, 200, 60), (20, 50, 220), (128, 128, 128)


@pytest.fixture(autouse=True, params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds with the extra `fast` and without it."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decode, "simplejpeg", None)


def picture() -> np.ndarray:
    rows = [np.repeat(np.array([pair], np.uint8), 32, axis=1) for pair in ((RED, GREEN), (BLUE, GREY))]
    return np.repeat(np.concatenate(rows), 24, axis=0)


def grey_picture() -> np.ndarray:
    """Brightness 0, 64 / 160, 255."""
    return np.repeat(np.repeat(np.array([[0, 64], [160, 255]], np.uint8), 24, axis=0), 32, axis=1)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by(factor: int) -> Shrink:
    return lambda height, width: factor


def patches(pixels: np.ndarray) -> np.ndarray:
    """The middle colour of each quarter, int [2, 2, 3]: away from the seams, where JPEG rings."""
    height, width = pixels.shape[:2]
    return pixels[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2].astype(int)


def assert_shows(data: bytes, expected: object, tolerance: int = 0, size: tuple[int, int] = (48, 64)) -> None:
    pixels = decode_rgb(data, "picture").pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*size, 3)
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    colours = np.broadcast_to(np.asarray(expected).reshape(2, 2, -1), (2, 2, 3))
    assert np.abs(patches(pixels) - colours).max() <= tolerance, patches(pixels)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG put together by hand: Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_16_bit(values: np.ndarray, colour: int) -> bytes:
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    return png(width, height, 16, colour, b"".join(b"\0" + row.tobytes() for row in rows))


COLOURS = [RED, GREEN, BLUE, GREY]


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 8),
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("PPM", {}, 0),
    ],
)
def test_colour(kind: str, options: dict[str, object], tolerance: int) -> None:
    assert_shows(encoded(Image.fromarray(picture()), kind, **options), COLOURS, tolerance)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "PPM"])
def test_grey(kind: str) -> None:
    assert_shows(encoded(Image.fromarray(grey_picture()), kind), [0, 64, 160, 255], 2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit(kind: str) -> None:
    bits = Image.fromarray(grey_picture()).point(lambda value: 255 * (value > 100), "1")
    assert bits.mode == "1"
    assert_shows(encoded(bits, kind), [0, 0, 255, 255])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palette(kind: str) -> None:
    indexed = Image.fromarray(picture()).quantize(4)
    assert indexed.mode == "P"
    assert_shows(encoded(indexed, kind), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour_lies_on_white(kind: str) -> None:
    indexed = Image.fromarray(picture()).quantize(4)
    data = encoded(indexed, kind, transparency=indexed.getpixel((0, 0)))
    assert_shows(data, [(255, 255, 255), GREEN, BLUE, GREY])


def test_palette_with_half_transparent_colours_lies_on_white() -> None:
    indexed = Image.fromarray(picture()).quantize(4)
    alpha = bytearray([255] * 4)
    alpha[indexed.getpixel((0, 0))] = 128
    alpha[indexed.getpixel((63, 47))] = 0
    faded = [round(255 - (255 - channel) * 128 / 255) for channel in RED]
    assert_shows(encoded(indexed, "PNG", transparency=bytes(alpha)), [faded, GREEN, BLUE, (255, 255, 255)], 1)


def test_grey_and_colour_png_with_one_transparent_colour() -> None:
    assert_shows(encoded(Image.fromarray(grey_picture()), "PNG", transparency=64), [0, 255, 160, 255])
    white = (255, 255, 255)
    assert_shows(encoded(Image.fromarray(picture()), "PNG", transparency=BLUE), [RED, GREEN, white, GREY])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(kind: str) -> None:
    alpha = np.repeat(np.repeat(np.array([[255, 128], [0, 64]], np.uint8), 24, axis=0), 32, axis=1)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(np.dstack([picture(), alpha])), kind, **options)
    shares = np.array([255, 128, 0, 64])[:, None] / 255
    assert_shows(data, np.rint(255 - (255 - np.array(COLOURS)) * shares), 1)


def test_grey_with_alpha_lies_on_white() -> None:
    alpha = np.full((48, 64), 128, np.uint8)
    data = encoded(Image.merge("LA", [Image.fromarray(grey_picture()), Image.fromarray(alpha)]), "PNG")
    assert_shows(data, np.rint(255 - (255 - np.array([0, 64, 160, 255])) * 128 / 255), 1)


def ink() -> np.ndarray:
    """uint8 [48, 64, 4]: the picture as cyan, magenta, yellow and no black."""
    return np.dstack([255 - picture(), np.zeros((48, 64), np.uint8)])


def test_cmyk_tiff() -> None:
    assert_shows(encoded(Image.fromarray(ink(), "CMYK"), "TIFF"), COLOURS)


def test_cmyk_jpeg_with_adobe_marker_is_upside_down_ink() -> None:
    data = encoded(Image.fromarray(ink(), "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert_shows(data, COLOURS, 4)


def test_cmyk_jpeg_without_adobe_marker_is_ink_as_it_is() -> None:
    data = encoded(Image.fromarray(255 - ink(), "CMYK"), "JPEG", quality=95)  # Pillow writes its complement: plain ink
    marker = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[marker + 2 : marker + 4])[0]
    assert_shows(data[:marker] + data[marker + 2 + length :], COLOURS, 4)


def test_ycck_jpeg() -> None:
    # Adobe's YCCK holds YCbCr of (C, M, Y) and the complement of K; Pillow's complement is undone here, and the byte
    # that says how the four channels are coded is changed from 0 (CMYK) to 2 (YCCK).
    luminance = np.asarray(Image.fromarray(ink()[..., :3]).convert("YCbCr"))
    data = bytearray(encoded(Image.fromarray(np.dstack([255 - luminance, ink()[..., 3]]), "CMYK"), "JPEG", quality=95))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    assert_shows(bytes(data), COLOURS, 5)


def test_16_bit_png_is_scaled_not_clipped() -> None:
    assert_shows(png_16_bit(grey_picture().astype(np.uint16) * 257, colour=0), [0, 64, 160, 255])
    assert_shows(png_16_bit(picture().astype(np.uint16) * 257, colour=2), COLOURS)
    opaque = np.dstack([picture(), np.full((48, 64), 255, np.uint8)])
    assert_shows(png_16_bit(opaque.astype(np.uint16) * 257, colour=6), COLOURS)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(np.uint16, 257), (np.int32, 257), (np.int32, 1), (np.float32, 1 / 255), (np.float32, 1), (np.float32, 257)],
)
def test_deep_grey_tiff_is_scaled_not_clipped(dtype: type, factor: float) -> None:
    values = (grey_picture() * float(factor)).astype(dtype)
    assert_shows(encoded(Image.fromarray(values), "TIFF"), [0, 64, 160, 255], 1)


def test_float_tiff_of_odd_range_is_stretched_and_has_no_holes() -> None:
    values = grey_picture() * np.float32(10) - np.float32(1000)
    assert_shows(encoded(Image.fromarray(values), "TIFF"), [0, 64, 160, 255], 1)
    values = grey_picture() / np.float32(255)
    values[:24, :32] = np.nan
    assert_shows(encoded(Image.fromarray(values), "TIFF"), [0, 64, 160, 255], 1)
    flat = encoded(Image.fromarray(np.full((48, 64), -5, np.float32)), "TIFF")
    assert_shows(flat, [0, 0, 0, 0])


def test_12_bit_tiff_is_scaled_by_its_own_range() -> None:
    values = np.rint(grey_picture() * (4095 / 255)).astype(np.uint16)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    strip = packed.astype(np.uint8).tobytes()
    tags = [(256, 3, 64), (257, 3, 48), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    tags += [(278, 3, 48), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert_shows(data.ljust(122, b"\0") + strip, [0, 64, 160, 255], 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    # The undoing of each turn, as the EXIF standard words it: where row 0 and column 0 of the stored picture are.
    stored = {
        1: lambda upright: upright,
        2: lambda upright: upright[:, ::-1],
        3: lambda upright: upright[::-1, ::-1],
        4: lambda upright: upright[::-1],
        5: lambda upright: upright.transpose(1, 0, 2),
        6: lambda upright: np.rot90(upright, 1),
        7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
        8: lambda upright: np.rot90(upright, -1),
    }[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert_shows(data, COLOURS, {"PNG": 0, "TIFF": 0, "JPEG": 10, "WEBP": 12}[kind])


def test_damaged_exif_is_no_reason_to_lose_an_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(picture()), "JPEG", quality=95, exif=exif)
    place = data.index(b"Exif\0\0") + 6
    assert_shows(data[:place] + b"XX\0\0\0\0\0\0" + data[place + 8 :], COLOURS, 4)


def test_first_of_several_frames() -> None:
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    for kind, options in (("GIF", {}), ("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert_shows(data, COLOURS)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_shrink_decodes_jpeg_smaller(factor: int) -> None:
    large = Image.fromarray(picture()).resize((301, 203), Image.Resampling.NEAREST)
    data = encoded(large, "JPEG", quality=95)
    asked = []
    decoded = decode_rgb(data, "picture", shrink=lambda height, width: asked.append((height, width)) or factor)
    assert asked == [(203, 301)]
    assert decoded[1:] == (203, 301, factor)
    pixels = decoded.pixels
    assert pixels.shape == (-(-203 // factor), -(-301 // factor), 3)
    assert np.abs(patches(pixels) - np.array(COLOURS).reshape(2, 2, 3)).max() <= 5
    whole = decode_rgb(encoded(large, "PNG"), "picture", shrink=by(factor))
    assert (whole.pixels.shape, *whole[1:]) == ((203, 301, 3), 203, 301, 1)


def test_shrink_asks_with_the_upright_size_and_never_makes_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(picture()[:9, :60]), "JPEG", exif=exif)
    asked = []
    decoded = decode_rgb(data, "picture", shrink=lambda height, width: asked.append((height, width)) or 8)
    assert asked == [(60, 9)]
    assert (decoded.pixels.shape, *decoded[1:]) == ((8, 2, 3), 60, 9, 8)
    with pytest.raises(ValueError, match="not 3"):
        decode_rgb(data, "picture", shrink=by(3))


JPEG = encoded(Image.fromarray(picture()), "JPEG")
BOMB = png(30000, 30000, 8, 0, b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Dear reader, this is no picture.\n" * 9, "not an image .* b'Dear reader,"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:20], "truncated|not an image"),
        (encoded(Image.fromarray(picture()), "PNG")[:90], "truncated|damaged"),
        (encoded(Image.fromarray(picture()), "BMP")[:900], "truncated"),
        (encoded(Image.fromarray(picture()), "TIFF")[:900], "truncated|damaged|not an image"),
        (encoded(Image.fromarray(picture()), "WEBP")[:60], "truncated|damaged|not an image"),
        (BOMB, "too large"),
        (encoded(Image.fromarray(picture()[:7]), "PNG"), "too small: 7 x 64"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n", "not an image"),
    ],
)
def test_broken(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode_rgb(data, "folder/name.jpg")
    assert caught.value.key == "folder/name.jpg"
    assert str(caught.value) == f"folder/name.jpg: {caught.value.reason}"
    assert isinstance(caught.value, CacoError)
    assert "\n" not in str(caught.value)


def test_any_damage_ends_in_broken_image_or_pixels() -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    outcomes = {"pixels": 0, "broken": 0}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"):
        whole = encoded(noise, kind)
        for _ in range(150):
            data = bytearray(whole)
            reach = int(generator.choice([40, 400, len(data)]))
            for place in generator.integers(0, min(reach, len(data)), 3):
                data[place] = generator.integers(0, 256)
            try:
                assert decode_rgb(bytes(data), kind).pixels.dtype == np.uint8
                outcomes["pixels"] += 1
            except BrokenImage:
                outcomes["broken"] += 1
    assert min(outcomes.values()) > 50


def by_each(data: bytes, factor: int, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray | str]:
    """What simplejpeg and what Pillow makes of a JPEG: pixels, or why it is broken."""
    outcomes: list[np.ndarray | str] = []
    for module in (pytest.importorskip("simplejpeg"), None):
        monkeypatch.setattr(decode, "simplejpeg", module)
        try:
            outcomes.append(decode_rgb(data, "picture", by(factor)).pixels)
        except BrokenImage as problem:
            outcomes.append(problem.reason)
    return outcomes


def grain(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(height)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    return np.clip(np.asarray(coarse) + generator.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("decoder", ["simplejpeg"], indirect=True)
class TestTheTwoDecoders:
    @pytest.mark.parametrize("factor", [1, 2, 4, 8])
    @pytest.mark.parametrize(
        "options",
        [
            {"quality": 90},
            {"quality": 30, "subsampling": 0},
            {"quality": 75, "subsampling": 1},
            {"quality": 100, "progressive": True},
            {"quality": 90, "restart_marker_rows": 1},
            {"quality": 90, "keep_rgb": True},
            {"quality": 90, "icc_profile": b"a profile, not applied"},
        ],
    )
    def test_give_the_same_pixels(self, options: dict, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for shape in ((375, 500), (203, 301), (8, 37)):
            for pixels in (grain(*shape), grain(*shape)[:, :, 0]):
                fast, slow = by_each(encoded(Image.fromarray(pixels), "JPEG", **options), factor, monkeypatch)
                assert not isinstance(slow, str)
                np.testing.assert_array_equal(fast, slow)

    def test_agree_on_damaged_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where simplejpeg sees a flaw, Pillow decides: no truncated file passes, and none is lost that it can show."""
        generator = np.random.default_rng(0)
        broken = 0
        for options in ({}, {"progressive": True}):
            whole = encoded(Image.fromarray(grain(47, 61)), "JPEG", **options)
            for number in range(300):
                data = bytearray(whole[: generator.integers(2, len(whole))] if number % 3 == 0 else whole)
                for place in generator.integers(0, len(data), number % 3):
                    data[place] = generator.integers(0, 256)
                fast, slow = by_each(bytes(data), 1, monkeypatch)
                assert isinstance(fast, str) or not isinstance(slow, str)
                np.testing.assert_array_equal(fast, slow)
                broken += isinstance(fast, str)
                assert number % 3 or isinstance(fast, str)
        assert 200 < broken < 500

    def test_simplejpeg_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(Image.fromarray(grain(40, 60)), "JPEG", exif=exif)
        monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded by Pillow"))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded by Pillow"))
        assert decode_rgb(data, "picture", by(4)).pixels.shape == (15, 10, 3)


def test_many_threads_see_the_same_and_no_filter_changes() -> None:
    files = [encoded(Image.fromarray(np.roll(picture(), shift, axis=1)), "JPEG") for shift in range(16)]
    alone = [decode_rgb(data, "picture").pixels for data in files]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: decode_rgb(files[number % 16], "picture").pixels, range(320)))
    assert all(np.array_equal(pixels, alone[number % 16]) for number, pixels in enumerate(together))
    assert list(warnings.filters) == filters


def test_pillow_does_not_warn_on_stderr_and_others_still_do(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encoded(Image.fromarray(picture()), "JPEG", exif=exif)
    place = data.index(b"Exif\0\0") + 6
    odd = data[: place + 8] + b"\xff\x7f" + data[place + 10 :]  # says there are 32,767 entries
    (tmp_path / "odd.jpg").write_bytes(odd)
    program = (
        "import sys, warnings; from caco.data.decode import decode_rgb\n"
        "decode_rgb(open(sys.argv[1], 'rb').read(), 'odd'); print(len(warnings.filters))\n"
        "warnings.warn('mine')\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "odd.jpg"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "EXIF" not in run.stderr
    assert "mine" in run.stderr
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(odd)).getexif()
    assert any("EXIF" in str(warning.message) for warning in heard)  # so there was something to silence
