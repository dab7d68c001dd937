"""Run by test_gpu_kernels.py: prints the relative errors of the kernels as JSON."""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dense_bank import dense_loss
from file_sets import jpeg, smooth, write_set
from torch import nn
from torch.nn import functional as F

from caco import bank_kernels, fused
from caco.bank_kernels import search
from caco.config import Views
from caco.data import file_maker
from caco.data.broken import BrokenImages
from caco.data.crop_kernel import crop_images
from caco.data.decode import decode_rgb
from caco.data.file_maker import FromFiles
from caco.data.makers import FromSource, RandomViews
from caco.data.parameters import draw_parameters
from caco.data.render import Stages, make_views, render_with_torch, to_device
from caco.data.source import open_source
from caco.data.view_kernel import small_views
from caco.lars_kernels import Table
from caco.loss import cooperative_adversarial_loss
from caco.optim import LARS
from caco.slots import Unsharded
from caco.views import Augmentation


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.detach().double() - exact).norm() / exact.norm())


def bank() -> dict[str, float]:
    """Errors of search, loss and both gradients; sizes that the blocks divide, and others."""

    for name in ("softmax", "logits", "of_queries", "pulls_on_slots"):
        setattr(bank_kernels, name, partial(getattr(bank_kernels, name), factors=torch.float32))
    fused.of_loss = fused.of_parts = lambda weight, products: bank_kernels
    deviation = {"their own check": float(fused._problem(torch.device("cpu"), 48, 60, 700) != "")}
    by_kernel = of_losses("loss by a kernel")
    Unsharded.size = 2  # as if there were another process: its kernels are those of the products alone
    return deviation | by_kernel | of_losses("plain loss")


def of_losses(how: str) -> dict[str, float]:
    errors = {}
    for queries, size, width, number in ((100, 700, 48, 2), (64, 256, 128, 3), (10, 70, 200, 2), (1, 90, 33, 1)):
        torch.manual_seed(0)
        query, weight = F.normalize(torch.randn(queries, width), dim=1), 3 * torch.randn(size, width)
        positives, weights = torch.randint(size, (queries, number)), torch.rand(queries, number)
        cosines = query.double() @ F.normalize(weight.double(), dim=1).T
        weights[:, 1:2] *= 0  # as a view of which one key counts
        positives[::2, 0] = cosines.argmax(dim=1)[::2]
        for temperatures in ((0.08, 0.08), (0.08, 0.1)):
            exact = query.double().requires_grad_(), weight.double().requires_grad_()
            loss = dense_loss(*exact, positives, weights.double(), *temperatures)
            loss.backward()
            ours = query.clone().requires_grad_(), weight.clone().requires_grad_()
            result = cooperative_adversarial_loss(*ours, positives, weights, *temperatures)
            result.loss.backward()
            name = f"{how}, {queries} queries, {size} x {width}, {temperatures}"
            errors[f"loss, {name}"] = relative(result.loss, loss.detach())
            errors[f"gradient of queries, {name}"] = relative(ours[0].grad, exact[0].grad)
            errors[f"gradient of slots, {name}"] = relative(ours[1].grad * Unsharded.size, exact[1].grad)
            hit = cosines.gather(1, positives) == cosines.amax(dim=1, keepdim=True)
            errors[f"hits, {name}"] = float((result.hit != hit).sum())
        found, place = bank_kernels.nearest(query, weight, weight.norm(dim=1, keepdim=True).reciprocal())
        errors[f"cosine, {name}"] = relative(found, cosines.amax(dim=1))
        errors[f"nearest, {name}"] = float((place != cosines.argmax(dim=1)).sum())
    return errors


def searches() -> dict[str, float]:
    """Errors of the search where half precision cannot tell slots apart, of which some are equal."""
    errors = {}
    for keys, size, width, directions, most_groups in (
        *((70, 700, 48, 5, 2048), (64, 2000, 64, 700, 4), (33, 1100, 130, 20, 3), (3, 100, 20, 1, 1)),
        (129, 128, 128, 128, 2048),
    ):
        torch.manual_seed(size)
        search.MOST_GROUPS = most_groups
        rows = 30 * F.normalize(torch.randn(directions, width), dim=1).repeat(-(-size // directions), 1)[:size]
        weight = rows + 30e-4 * torch.randn(size, width)
        weight[size // 2 :: 7] = weight[: len(weight[size // 2 :: 7])]
        key = F.normalize(weight[torch.randint(size, (keys,))] / 30 + 0.05 * torch.randn(keys, width), dim=1)
        unit = F.normalize(weight.double(), dim=1)
        found, place = bank_kernels.nearest(key, weight, weight.norm(dim=1, keepdim=True).reciprocal())
        cosines = key.double() @ unit.T
        name = f"{keys} keys, {size} x {width}, {directions} directions, {most_groups} groups"
        gaps = cosines.amax(dim=1) - cosines.gather(1, place[:, None])[:, 0]
        errors[f"not the largest, {name}"] = float(gaps.max())
        errors[f"cosine, {name}"] = relative(found, cosines.amax(dim=1))
        first = [int((weight == row).all(dim=1).nonzero()[0]) for row in weight[place]]
        errors[f"not the first of equals, {name}"] = float((place != torch.tensor(first)).sum())
    return errors


def lars() -> dict[str, float]:
    """Errors of each tensor after some steps; laid out in two ways, of many sizes, one of zeros."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 3, 3, 3), (70, 100), (13,), (1, 1), (9000,), (3, 5000))]
    start += [torch.zeros(5, 4), torch.randn(4, 6, 1, 1), torch.randn(2, 3, 5, 5)]
    start[0] = start[0].contiguous(memory_format=torch.channels_last)
    plain = [nn.Parameter(tensor.double()) for tensor in start]
    optimizer = LARS(plain, lr=0.3, momentum=0.9, weight_decay=1e-2)
    buffers, table = [torch.zeros_like(tensor) for tensor in start], Table()
    for _ in range(4):
        gradients = [torch.randn_like(tensor) for tensor in start]
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.double()
        optimizer.step()
        assert table.write(start, gradients, buffers)
        table.move(0.3, 0.9, 1e-2, 0.001)
    assert not table.write(start[:1], [torch.randn(8, 3, 3, 3)], buffers[:1])  # not laid out alike
    return {f"tensor {number}": relative(one, two) for number, (one, two) in enumerate(zip(start, plain, strict=True))}


def views() -> dict[str, float]:
    """Largest differences of a pixel; images and views of several sides, both published augmentations."""
    errors = {}
    for height, width, size in ((32, 32, 32), (20, 18, 16), (40, 64, 33)):
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8))
        for view, augmentation in enumerate(Views(size=size).augmentations()):
            for epoch in range(2):
                drawn = draw_parameters(
                    augmentation, height, width, seed=0, epoch=epoch, indices=np.arange(8), view=view
                )
                work = images, *to_device(images.device, drawn, (0.4, 0.5, 0.6), (1.0, 0.9, 0.8)), size
                plain = make_views(*work, Stages.of_augmentation(augmentation))
                ours = small_views(*work)
                assert ours.is_contiguous(memory_format=torch.channels_last)
                errors[f"{height} x {width}, {size}, {view}, {epoch}"] = float((ours - plain).abs().max()) / 10
    return errors


def crops() -> dict[str, float]:
    """Largest differences of a pixel; images of many sizes together, enlarged and made smaller, whole and cropped."""
    errors, random = {}, np.random.default_rng(0)
    sides = (20, 30), (64, 9), (33, 65), (8, 8), (128, 40)
    images = [random.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    heights, widths = np.array(sides).T
    for size in (8, 17, 32):
        for area in ((0.08, 1.0), (1.0, 1.0), (0.02, 0.05)):
            only_crop = replace(Augmentation.crop_and_flip(size), area=area)
            drawn = draw_parameters(only_crop, heights, widths, seed=0, epoch=0, indices=np.arange(5), view=0)
            if area[0] == 0.08:  # in fractions of a pixel
                drawn = drawn.shrunk(np.array([2, 1, 2, 1, 4]))
            plain, ours = (torch.empty(5, 3, size, size, memory_format=torch.channels_last) for _ in range(2))
            render_with_torch(images, drawn, (0.0,) * 3, (1.0,) * 3, plain)
            crop_images(tensors, to_device(ours.device, drawn, (0.0,) * 3, (1.0,) * 3)[0], ours)
            errors[f"{size}, {area}"] = float((ours - plain).abs().max())
    return errors


def files() -> dict[str, float]:
    """Largest differences of views between `FromFiles` and `FromSource`, of files of many kinds; Pillow in nvJPEG's place.

    Of the files that are plain it refuses one, which the CPU then has to decode, and one that is broken behind its header.
    """
    asked, refused, told = [], jpeg(smooth(3, 61, 75)), []
    file_maker.logging.getLogger("caco.data.file_maker").addFilter(lambda record: told.append(record) is not None)

    def decode(files: list[bytes], device: torch.device) -> list[torch.Tensor | None]:
        asked.extend(files)
        pixels = [None if data in (refused, wrong) else decode_rgb(data, "").pixels for data in files]
        return [None if one is None else torch.from_numpy(one).permute(2, 0, 1).contiguous() for one in pixels]

    file_maker.decode_jpegs, file_maker.FILES_AT_ONCE = decode, 4
    errors = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        written = write_set(Path(folder, "set"))
        assert refused in written.values()
        codes = written["05.jpg"].index(b"\xff\xc4") + 5
        wrong = written["05.jpg"][:codes] + b"\xff" * 8 + written["05.jpg"][codes + 8 :]
        Path(folder, "set", "05.jpg").write_bytes(wrong)
        source = open_source(Path(folder, "set"))
        views = RandomViews(Views(size=16, small=1, small_size=8).augmentations(), (0.4,) * 3, (0.2,) * 3, seed=1)
        met = [BrokenImages(len(source), 0.5) for _ in range(2)]
        ours = FromFiles(source, views, met[0], torch.device("cpu"), compiled=False)
        plain = FromSource(source, views, met[1], torch.device("cpu"))
        for epoch in range(2):
            indices = np.random.default_rng(epoch).permutation(len(source))
            for view, (one, other) in enumerate(
                zip(ours(indices, epoch, pool), plain(indices, epoch, pool), strict=True)
            ):
                assert one.is_contiguous(memory_format=torch.channels_last)
                errors[f"view {view}, epoch {epoch}"] = float((one - other).abs().max()) / 10
        assert sorted(met[0]._reasons) == sorted(met[1]._reasons), "the broken ones are told"
        assert len(met[0]) == 3
    by_gpu = {name for name, data in written.items() if data in asked}
    assert by_gpu == {name for name in written if name[0].isdigit()} - {"05.jpg"}, by_gpu
    assert asked.count(refused) == asked.count(wrong) == 1
    assert len(told) == 1 and told[0].args[0] in ("03.jpg", "05.jpg")
    return errors


PARTS = {part.__name__: part for part in (files, bank, searches, lars, views, crops)}
print(json.dumps(PARTS[sys.argv[1]]()))
