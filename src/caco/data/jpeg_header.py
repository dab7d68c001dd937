"""What a JPEG file's header says, read by compiled code: without Python's lock, which all threads that decode share.

It knows plain files only; whatever else it meets, `decode.py` asks Pillow.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit, types

from caco.compiled_code import kept

ODD = 0
"""Returned three times for a file that is not plain."""
END_WITHIN = 16
"""Bytes at the end of a file, among which the mark of its end is."""
EXIF, XMP, MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/", b"MPF\0"
ADOBE = b"Adobe"
UPRIGHT, ORIENTATION, SHORT = 1, 0x0112, 3

SIGNATURE = types.UniTuple(types.int64, 3)(types.Array(types.uint8, 1, "C", readonly=True))
inlined = njit(nogil=True, error_model="numpy", forceinline=True)


@inlined
@no_type_check
def number(data, at, size, is_little=False):
    """Return the whole number in some bytes, by default with the most significant one first."""
    result = 0
    for place in range(size):
        byte = data[at + size - 1 - place] if is_little else data[at + place]
        result = result << 8 | np.int64(byte)
    return result


@inlined
@no_type_check
def begins(data, at, stop, text):
    """Return whether a text stands at a place."""
    if at + len(text) > stop:
        return False
    for place in range(len(text)):  # noqa: SIM110 (of which numba makes nothing)
        if data[at + place] != text[place]:
            return False
    return True


@inlined
@no_type_check
def is_upright(data, start, stop):
    """Return whether EXIF data (TIFF) say so, or nothing of it; False for what cannot be read."""
    if stop - start < 8:
        return False
    is_little = data[start] == 0x49
    first = start + number(data, start + 4, 4, is_little)
    if first + 2 > stop:
        return False
    entries = number(data, first, 2, is_little)
    if first + 2 + 12 * entries > stop:
        return False
    for entry in range(entries):
        at = first + 2 + 12 * entry
        if number(data, at, 2, is_little) == ORIENTATION:
            is_number = number(data, at + 2, 2, is_little) == SHORT and number(data, at + 4, 4, is_little) == 1
            return is_number and number(data, at + 8, 2, is_little) == UPRIGHT
    return True


@kept(SIGNATURE)
@no_type_check
def plain_size(data):
    """Return height, width and `suits_engine` (0 or 1) of a JPEG file that is plain (`decode.PlainJpeg`), or ODD for all."""
    odd = (ODD, ODD, ODD)
    length = len(data)
    if length < 4 * END_WITHIN or data[0] != 0xFF or data[1] != 0xD8:
        return odd
    ends = False
    for at in range(length - END_WITHIN, length - 1):
        ends |= data[at] == 0xFF and data[at + 1] == 0xD9
    if not ends:
        return odd
    height, width, suits_engine, has_exif, at = ODD, ODD, ODD, False, 2
    while at + 4 <= length and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:  # filled up
            at += 1
            continue
        start, stop = at + 4, at + 2 + number(data, at + 2, 2)
        if stop > length or stop < start:
            return odd
        if kind == 0xDA:  # the picture begins
            return height, width, suits_engine
        if 0xC0 <= kind <= 0xC2:
            if height != ODD or stop - start < 9 or data[start] != 8:
                return odd
            height, width, channels = number(data, start + 1, 2), number(data, start + 3, 2), np.int64(data[start + 5])
            if stop - start < 6 + 3 * channels or (channels != 1 and channels != 3):
                return odd
            if channels == 3 and data[start + 6] == 82:  # called R, G, B: as it is
                return odd
            suits_engine = np.int64(kind == 0xC0 and channels == 3)
        elif kind == 0xE1:
            if begins(data, start, stop, EXIF):
                if has_exif or not is_upright(data, start + len(EXIF), stop):
                    return odd
                has_exif = True
            elif begins(data, start, stop, XMP):  # may tell how it lies, too
                return odd
        elif kind == 0xE2:
            if begins(data, start, stop, MPF):  # several pictures
                return odd
        elif kind == 0xEE:
            if begins(data, start, stop, ADOBE) and (stop - start < 12 or data[start + 11] == 0):
                return odd
        elif kind != 0xC4 and (kind < 0xDB or kind == 0xDC or kind == 0xDE or kind == 0xDF):
            return odd  # ways of coding that few read; a height that follows later
        at = stop
    return odd
