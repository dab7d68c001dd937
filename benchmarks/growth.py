"""How the cost of a step grows: with the images of an epoch, with the slots of the bank, with the batch.

    python benchmarks/growth.py [--quick] [--parts images slots batch] [--out FOLDER]

images  the loader's time for a batch of 256 views in the middle of an epoch, and for the first one, which draws the epoch's
        order; pictures of 8 px in memory, so that two million fit, and one view of 16 px.
slots   the bank's part of a step at batch 256, two views, width 128: positives, loss, gradients, SGD with momentum.
batch   a whole training step: ResNet-18 with the small stem, 32 px, 4,096 slots.

Each point is a median. The exponent is the slope of the fitted line in the log-log chart: 0 means that the cost does not
grow, 1 that it grows in proportion; it is fitted to all points and to the last three. The charts are written as SVG.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measure import Others, arguments, describe, save, synchronise, table, take_turns

from caco.backbone import create_backbone
from caco.bank import Bank
from caco.data.arrays import ArraySource
from caco.data.broken import BrokenImages
from caco.data.loader import TrainingViews
from caco.device import choose_device
from caco.distributed.world import World
from caco.model import CaCo, view_pairs
from caco.recipes import find_recipe
from caco.train.prepare import create_state
from caco.train.step import compute_gradients, rates_at, train_step

Curves = dict[str, dict[int, float]]
"""Name of a curve → size → seconds."""


def by_images(quick: bool, device: torch.device) -> Curves:
    """Time the loader on epochs of more and more images."""
    sizes = [1 << power for power in ((10, 12, 14) if quick else range(11, 22, 2))]
    augmentation = replace(find_recipe("cifar").views, size=16).augmentations()[0]
    pixels = np.random.default_rng(0).integers(0, 256, (sizes[-1], 8, 8, 3), dtype=np.uint8)
    curves: Curves = {"a batch in mid-epoch": {}, "the first batch": {}}
    for size in sizes:
        views = TrainingViews.create(
            ArraySource(pixels[:size]),
            [augmentation],
            (0.5, 0.5, 0.5),
            (0.25, 0.25, 0.25),
            batch_size=256,
            seed=0,
            workers=World(device).worker_count("auto"),
            device=device,
            broken=BrokenImages(size, 0.0),
        )
        firsts, others = [], []
        for epoch in range(4 if quick else 9):
            began = perf_counter()
            batches = views.batches(epoch, 0, min(views.steps_per_epoch, 100))
            next(batches)
            synchronise(device)
            firsts.append(perf_counter() - began)
            began = perf_counter()
            count = sum(1 for _ in batches)
            synchronise(device)
            others.append((perf_counter() - began) / count)
        curves["the first batch"][size] = median(firsts[1:])
        curves["a batch in mid-epoch"][size] = median(others[1:])
    return curves


def by_slots(quick: bool, device: torch.device) -> Curves:
    """Time the bank's part of a step with more and more slots."""
    batch, width = 256, 128
    sizes = [1 << power for power in (range(10, 14) if quick else range(10, 19))]
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(batch, width, generator=generator).to(device).requires_grad_() for _ in range(2)]

    def step(slots: int) -> Callable[[], None]:
        bank = Bank(slots, width).to(device)
        model = CaCo(torch.nn.Identity(), bank, view_pairs(2, 0))
        optimizer = torch.optim.SGD(bank.parameters(), lr=0.1, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            compute_gradients(model, model, embeddings, torch.float32)
            optimizer.step()

        return run

    curve = {}
    for slots in sizes:  # one after another: all banks at once would not be in the cache as one alone is
        curve[slots] = take_turns({"step": step(slots)}, rounds=5 if quick else 9, warm_up=2, device=device)[
            "step"
        ].median
    return {"positives, loss, gradients, step": curve}


def by_batch(quick: bool, device: torch.device) -> Curves:
    """Time a whole training step with larger and larger batches."""
    sizes = [1 << power for power in ((2, 3, 4) if quick else range(3, 9))]
    config = find_recipe("cifar")
    rates = rates_at(config, config.optimizer.warmup_epochs)
    curve = {}
    for batch in sizes:
        state = create_state(replace(config, batch_size=batch), create_backbone("resnet18", 32), World(device))
        views = [torch.randn(batch, 3, 32, 32).to(device, memory_format=torch.channels_last) for _ in range(2)]

        def step(state: Any = state, views: list[torch.Tensor] = views) -> None:
            gradients = partial(compute_gradients, state.model, state.model, precision=torch.float32)
            train_step(state, gradients, views, rates, rates.key_momentum)

        curve[batch] = take_turns({"step": step}, rounds=3, warm_up=1, device=device)["step"].median
    return {"whole step, fp32": curve}


PARTS: dict[str, tuple[Callable[[bool, torch.device], Curves], str]] = {
    "images": (by_images, "images in an epoch"),
    "slots": (by_slots, "slots"),
    "batch": (by_batch, "images in a batch"),
}


def exponent(curve: Mapping[int, float], last: int | None = None) -> tuple[float, float]:
    """Return slope and offset of the line through the (last) points in the log-log plane, base 10, by least squares."""
    points = sorted(curve.items())[-last if last else None :]
    x, y = (np.log10([point[place] for point in points]) for place in range(2))
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)


WIDTH, HEIGHT, MARGIN = 560, 360, 56
COLOURS = ("#0b6e99", "#c4532b", "#4b8b3b")


def log_log_chart(curves: Curves, title: str, x_label: str) -> str:
    """Return a whole SVG file: seconds over sizes, both axes logarithmic, with the line fitted to all points, dashed."""
    x_low, x_high = _decades([size for curve in curves.values() for size in curve], whole=False)
    y_low, y_high = _decades([value for curve in curves.values() for value in curve.values()], whole=True)

    def place(size: float, seconds: float) -> tuple[float, float]:
        across = (math.log10(size) - x_low) / (x_high - x_low)
        up = (math.log10(seconds) - y_low) / (y_high - y_low)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="18" font-size="13">{escape(title)}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for power in range(round(y_low), round(y_high) + 1):
        _, y = place(10**x_low, 10.0**power)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{_seconds(10.0**power)}</text>')
    for size in sorted({size for curve in curves.values() for size in curve}):
        x, y = place(size, 10**y_low)
        parts.append(f'<path d="M{x:.1f} {y:.1f}v4" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 17:.1f}" text-anchor="middle">{_size(size)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        parts += _curve(name, curve, place, COLOURS[number % len(COLOURS)], 36 + 15 * number)
    return "\n".join([*parts, "</svg>\n"])


def _curve(
    name: str, curve: Mapping[int, float], place: Callable[[float, float], tuple[float, float]], colour: str, y: float
) -> Iterator[str]:
    """Yield points, fitted line, and the line of the legend at height y."""
    slope, offset = exponent(curve)
    (x1, y1), (x2, y2) = (place(size, 10 ** (offset + slope * math.log10(size))) for size in (min(curve), max(curve)))
    yield f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-dasharray="4 3"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(curve.items())))
    yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for point in points.split():
        cx, _, cy = point.partition(",")
        yield f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>'
    yield f'<text x="{MARGIN}" y="{y}" fill="{colour}">{escape(name)}: exponent {slope:.2f}</text>'


def _decades(values: Sequence[float], whole: bool) -> tuple[float, float]:
    """Return the decimal logarithms of an axis's ends: whole powers of ten, or the values' own."""
    low, high = math.log10(min(values)), math.log10(max(values))
    if not whole:
        return low, high
    return math.floor(low), max(math.ceil(high), math.floor(low) + 1)


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"


def _size(value: int) -> str:
    if value >= 1 << 20:
        return f"{value >> 20} Mi"
    return f"{value >> 10} Ki" if value >= 1024 else str(value)


def main() -> None:
    parser = arguments(__doc__, ("FOLDER", "write the charts and growth.json into this folder"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    options = parser.parse_args()
    device = choose_device(options.device)
    print(describe(device))
    result = {}
    for name in options.parts:
        measure, x_label = PARTS[name]
        with Others() as others:
            curves = measure(options.quick, device)
        show(name, x_label, curves, others.cores)
        result[name] = {"curves": curves, "others_cores": others.cores}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.svg").write_text(log_log_chart(curves, f"Cost by {x_label}", x_label))
    if options.out:
        save(argparse.Namespace(**{**vars(options), "out": options.out / "growth.json"}), result)


def show(name: str, x_label: str, curves: Curves, others: float | None) -> None:
    """Print each curve and its exponents."""
    sizes = sorted(next(iter(curves.values())))
    print(f"\n{name}: seconds by {x_label} (other programs kept {others} cores busy)\n")
    columns = ("", *(f"{size:,}" for size in sizes), "exponent", "of the last 3")
    rows = [
        (
            title,
            *(f"{curve[size]:.3g}" for size in sizes),
            f"{exponent(curve)[0]:.2f}",
            f"{exponent(curve, 3)[0]:.2f}",
        )
        for title, curve in curves.items()
    ]
    print(table(columns, rows), flush=True)


if __name__ == "__main__":
    main()
