"""A set of small images of one size, decoded once and held as a whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from caco.data.broken import BrokenImages
from caco.data.load import load_decoded, load_or_next
from caco.data.parameters import NEVER_SHRUNK
from caco.data.source import ImageSource
from caco.memory import free_memory

RESIDENT_SHARE = 0.25
"""Share of the free memory that such a set may take."""


def decode_whole_set(
    source: ImageSource, broken: BrokenImages, workers: int, device: torch.device, local_size: int = 1
) -> UInt8[Tensor, "N H W 3"] | None:
    """Return all images, uint8 [N, H, W, 3], in main memory, if they are of one size and fit there and on the device.

    local_size: processes of this machine that do the same. None for all other sets, and for images of more than
    NEVER_SHRUNK pixels. Those are decoded at a size that depends on the view, so a set held whole would give other
    views; and what fits in memory must not decide what is learned.
    """
    shape: tuple[int, ...] | None = None
    for index in np.unique(np.linspace(0, len(source) - 1, 32).astype(int)):
        # Only its size matters here: it is decoded as small as can be.
        probe = load_or_next(source, int(index), broken, partial(load_decoded, source, shrink=lambda height, width: 8))
        if probe.height * probe.width > NEVER_SHRUNK or shape not in (None, (probe.height, probe.width, 3)):
            return None
        shape = probe.height, probe.width, 3
    assert shape is not None
    if len(source) * int(np.prod(shape)) > RESIDENT_SHARE * free_memory(device) / local_size:
        return None
    images = np.empty((len(source), *shape), dtype=np.uint8)

    def fill(first: int) -> bool:
        for index in range(first, min(first + 256, len(source))):
            image = load_or_next(source, index, broken, source.load)
            if image.shape != shape:
                return False
            images[index] = image
        return True

    with ThreadPoolExecutor(workers) as pool:
        for same in pool.map(fill, range(0, len(source), 256)):
            if not same:
                pool.shutdown(cancel_futures=True)
                return None
    return torch.from_numpy(images)
