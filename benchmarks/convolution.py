"""One 3 × 3 convolution, forward and backward: Winograd's against torch's own, in time and in rounding (CPU).

    python benchmarks/convolution.py [--quick] [--precision bf16] [--products] [--out FILE.json]

Both take turns in one process, with the kept heap that every run of caco has. Rounding: relative error of result and gradients
against float64, the largest of the three. With --precision bf16 maps are bfloat16, and torch's filters, too. The first
seven rows are those of a ResNet-18 at 32 px, the last is too narrow to gain.
With --products only the products in the middle of it, of 192 tiles and by one thread, against torch.bmm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import arguments, describe, save, table, take_turns
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from caco.cpu_kernels.products import multiply, panel_width
from caco.precision import PRECISIONS
from caco.train.heap import keep_heap
from caco.winograd.convolution import convolve

SHAPES = (
    *((64, 64, 32, 1), (128, 128, 16, 1), (256, 256, 8, 1), (512, 512, 4, 1)),
    *((64, 128, 32, 2), (128, 256, 16, 2), (256, 512, 8, 2)),
    *((64, 64, 56, 1), (128, 128, 56, 2), (256, 256, 14, 1), (64, 64, 8, 1), (32, 32, 16, 1)),
)
"""Channels in and out, pixels a side of what goes in, stride."""

Convolution = Callable[[Tensor, Tensor, int], Tensor]
CONVOLUTIONS: dict[str, Convolution] = {
    "direct": lambda maps, weight, stride: F.conv2d(maps, weight.to(maps.dtype), padding=1, stride=stride),
    "winograd": convolve,
}


def tensors(
    images: int, inputs: int, outputs: int, side: int, stride: int, precision: torch.dtype
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Return maps, filters as torch draws them, the stride, and the gradient of the result."""
    maps, pull = (
        torch.randn(images, channels, pixels, pixels).to(precision).contiguous(memory_format=torch.channels_last)
        for channels, pixels in ((inputs, side), (outputs, side // stride))
    )
    weight = torch.nn.Conv2d(inputs, outputs, 3).weight.detach().contiguous(memory_format=torch.channels_last)
    return maps.requires_grad_(), weight.requires_grad_(), stride, pull


def both_ways(convolution: Convolution, maps: Tensor, weight: Tensor, stride: int, pull: Tensor) -> tuple[Tensor, ...]:
    result = convolution(maps, weight, stride)
    return result.detach(), *torch.autograd.grad(result, (maps, weight), pull)


def rounding(convolution: Convolution, maps: Tensor, weight: Tensor, stride: int, pull: Tensor) -> float:
    """Return the largest error of result and gradients, of the first eight images."""
    maps, pull = maps[:8].detach().requires_grad_(), pull[:8]
    exact = [tensor.detach().double().requires_grad_() for tensor in (maps, weight)]
    truth = both_ways(CONVOLUTIONS["direct"], exact[0], exact[1], stride, pull.double())
    found = both_ways(convolution, maps, weight, stride, pull)
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True))


def compare_products(options: argparse.Namespace) -> None:
    """Print the GFLOP/s of the 36 products of a block of tiles, by `products.py` and by torch's batched product."""
    torch.set_num_threads(1)
    rows, results, tiles = [], {}, 192
    for channels in (64, 128, 256, 512):
        left, right = torch.randn(36, tiles, channels), torch.randn(36, channels, channels)
        found = torch.empty_like(left)
        panels = in_panels(left), in_panels(right), torch.empty(left.numel()).numpy()
        work = {
            "products.py": partial(multiply_all, *panels, tiles, channels),
            "torch.bmm": partial(torch.bmm, left, right, out=found),
        }
        seconds = take_turns(work, 3 if options.quick else 30)
        assert torch.allclose(torch.from_numpy(in_panels(found)), torch.from_numpy(panels[2]), atol=1e-3)
        speeds = {name: 2e-9 * 36 * tiles * channels**2 / min(taken.all) for name, taken in seconds.items()}
        results[channels] = speeds
        rows.append((str(channels), *(f"{speed:.0f}" for speed in speeds.values())))
    print(table(("channels; GFLOP/s of the fastest turn", *work), rows))
    save(options, {"products": results})


def in_panels(matrices: Tensor) -> np.ndarray:
    """Return matrices [36, rows, columns] as `products.py` has them, flat."""
    return matrices.unflatten(2, (-1, panel_width(4))).transpose(1, 2).contiguous().flatten().numpy()


@njit(nogil=True)
def multiply_all(left, right, result, tiles, channels):  # type: ignore[no-untyped-def]
    width = panel_width(4)
    for place in range(36):
        multiply(
            left, place * tiles * channels, tiles * width,
            right, place * channels * channels, channels * width,
            result, place * tiles * channels, tiles * width,
            tiles, channels, channels, False,
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="default: 256")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--products", action="store_true", help="only the products of a block of tiles")
    options = parser.parse_args()
    if options.products and options.precision != "fp32":
        parser.error("--products are those of float32")
    if options.products:
        return compare_products(options)
    images, rounds = options.images or (16 if options.quick else 256), 1 if options.quick else 5
    keep_heap()
    torch.manual_seed(0)
    print(describe())
    rows, results = [], {}
    for inputs, outputs, side, stride in SHAPES:
        given = tensors(images, inputs, outputs, side, stride, PRECISIONS[options.precision])
        seconds = take_turns({name: partial(both_ways, one, *given) for name, one in CONVOLUTIONS.items()}, rounds)
        direct, winograd = (seconds[name].median for name in CONVOLUTIONS)
        errors = {name: rounding(one, *given) for name, one in CONVOLUTIONS.items()}
        shape = f"{inputs} to {outputs} channels, {side} px" + (", stride 2" if stride == 2 else "")
        results[shape] = {"seconds": {name: taken.as_json() for name, taken in seconds.items()}, "errors": errors}
        rows.append(
            (
                shape,
                f"{1000 * direct:,.1f}",
                f"{1000 * winograd:,.1f}",
                f"{direct / winograd:.2f}",
                *(f"{error:.1e}" for error in errors.values()),
            )
        )
    columns = ("forward and backward", "direct, ms", "winograd, ms", "times", "rounding, direct", "rounding, winograd")
    print(table(columns, rows))
    save(options, {"images": images, "results": results})


if __name__ == "__main__":
    main()
