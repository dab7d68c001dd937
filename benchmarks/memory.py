"""How much memory a training step needs at its peak: reckoned from the shapes of all its tensors, without a GPU.

    python benchmarks/memory.py [--quick] [--backbone resnet50] [--size 224] [--out FILE.json]
    python benchmarks/memory.py --check      (one row, against what torch's allocator says of a real step on this CPU)

A real step of caco (`caco.train.step.train_step`, LARS, bf16) runs on tensors without content, of which every one is counted
from the operator that makes it until it is freed: weights, gradients, optimizers, bank, views (the step's and the two batches
made ahead), activations. Not counted: what operators take for themselves while they work (cuDNN's workspaces), the CUDA
context (some 0.5 GiB) and gaps between blocks. Leave a tenth.
"""

from __future__ import annotations

import argparse
import weakref
from functools import partial
from typing import Any

import torch
from measure import arguments, save, table
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caco.backbone import create_backbone
from caco.config import EncoderOptions, EngineOptions, Pretrain, Views
from caco.distributed.world import World
from caco.optim import encoder_optimizer
from caco.train.meters import Meters
from caco.train.prepare import create_state
from caco.train.state import TrainingState
from caco.train.step import Rates, compute_gradients, train_step

CPU = torch.device("cpu")
AHEAD = 2
"""Batches of views that are made ahead of a step (`caco.data.prefetch`)."""


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: UntypedStorage) -> None:
        name, size = id(storage), storage.nbytes()
        if name in self._known:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._known[name]

        self._known[name] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def configuration(
    options: argparse.Namespace, batch: int, small: int, checkpointing: bool, accumulate: int
) -> Pretrain:
    return Pretrain(
        backbone=options.backbone,
        batch_size=batch,
        bank_size=options.bank,
        accumulate=accumulate,
        precision=options.precision,
        views=Views(size=options.size, small=small, small_size=options.small_size),
        encoder=EncoderOptions(embedding=options.embedding, projector=options.projector),
        engine=EngineOptions(layout="channels_last", compile="off", checkpointing=checkpointing),
    )


def reckon(config: Pretrain) -> int:
    """Return the most bytes that a step of a run has at a time."""
    model = create_state(config, create_backbone(config.backbone, config.views.size), World(CPU)).model.train()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(), Live() as live:
        model._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
        state = TrainingState(
            model,
            encoder_optimizer("lars", model.encoder, 0.1, 0.9, 1e-4),
            torch.optim.SGD([model.bank.weight], lr=3.0, momentum=0.9),
            Meters(config.bank_size, CPU),
        )
        ahead = [views_of(config) for _ in range(AHEAD)]
        steps(state, config)
        del ahead
    return live.most


def views_of(config: Pretrain) -> list[Tensor]:
    return [
        torch.randn(config.batch_size, 3, augmentation.size, augmentation.size).contiguous(
            memory_format=torch.channels_last
        )
        for augmentation in config.views.augmentations()
    ]


def steps(state: TrainingState, config: Pretrain) -> None:
    """Take two steps: the first makes the optimizers' buffers."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    gradients = partial(compute_gradients, state.model, state.model, precision=dtype, accumulate=config.accumulate)
    for _ in range(2):
        train_step(state, gradients, views_of(config), Rates(0.1, 3.0, 0.99), 0.99)


def allocated(config: Pretrain) -> int:
    """Return the most bytes that torch's CPU allocator has given out at a time in two real steps."""
    from torch.profiler import ProfilerActivity, profile

    backbone: nn.Module = create_backbone(config.backbone, config.views.size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = create_state(config, backbone, World(CPU))
        state.model.train()
        ahead = [views_of(config) for _ in range(AHEAD)]
        steps(state, config)
    del ahead
    sizes, total, most = [], 0, 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            sizes.append((event.start_ns(), event.nbytes()))
    for _, size in sorted(sizes, key=lambda entry: entry[0]):
        total += size
        most = max(most, total)
    return most


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the two large views, pixels")
    parser.add_argument("--small-size", type=int, default=96)
    parser.add_argument("--bank", type=int, default=65_536, help="slots")
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--projector", type=int, default=2048)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--check", action="store_true", help="batch 16: reckoned, and measured in a real step on this CPU"
    )
    options = parser.parse_args()
    if options.check:
        config = configuration(options, 16, 0, False, 1)
        reckoned, measured = reckon(config), allocated(config)
        print(f"batch 16: reckoned {reckoned / 2**30:.3f} GiB, measured {measured / 2**30:.3f} GiB")
        save(options, {"reckoned": reckoned, "measured": measured})
        return
    batches = (16, 32) if options.quick else (256, 512, 1024, 2048, 4096)
    ways = [(0, False, 1), (0, True, 1), (0, False, 4), (0, True, 4), (0, False, 8), (6, False, 1), (6, True, 1)]
    results = {way: {batch: reckon(configuration(options, batch, *way)) for batch in batches} for way in ways}
    rows = [
        (
            ("multi-crop" if small else "two views")
            + ", checkpointing" * again
            + f", --accumulate {parts}" * (parts > 1),
            *(f"{size / 2**30:.1f}" for size in sizes.values()),
        )
        for (small, again, parts), sizes in results.items()
    ]
    print(table((f"{options.backbone}, {options.size} px, GiB", *map(str, batches)), rows))
    save(options, {"results": [{"way": way, "bytes": sizes} for way, sizes in results.items()]})


if __name__ == "__main__":
    main()
