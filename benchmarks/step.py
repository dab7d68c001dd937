"""One step of CaCo, end to end, against the limit: the same backbone's bare passes, without loss, bank or optimizer.

    python benchmarks/step.py [--quick] [--precision fp32 bf16] [--out FILE.json]
    python benchmarks/step.py --backbone resnet50 --size 224 --batch 1024 --embedding 256 --projector 2048     (a GPU)

The limit is a forward and backward pass of the backbone (no projector) on both views and a forward pass without gradient
on both, in the same precision and layout. Step and limit take turns in one fresh process; rates are those of the median.
"step" is `caco.train.step.train_step` on batches that the loader makes meanwhile from pictures in memory, waiting included.
The stages are the same work taken apart, timed one after the other. An image is one sample: two views, four passes.
On a GPU both are CUDA graphs, as in a run (--no-cuda-graph: Python launches each kernel), and so is each stage: times are
those of the GPU, not of launching.
With small crops (--small 6) the limit has a forward and backward pass of each, too. With --convolution winograd (CPU)
the limit is still that of torch's own convolutions; "bare, winograd" are the same passes by Winograd's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from measure import Seconds, arguments, as_a_run, describe, fresh, gigabytes, save, table, take_turns
from stages import stage_times
from torch import Tensor, nn

from caco.backbone import create_backbone
from caco.config import EncoderOptions, EngineOptions, Pretrain, Views
from caco.data import makers
from caco.data.broken import BrokenImages
from caco.data.compiled import DeviceViews
from caco.data.loader import TrainingViews
from caco.data.source import ImageSource, open_source
from caco.device import choose_device
from caco.distributed.world import World
from caco.precision import PRECISIONS, autocast
from caco.train.captured import PLAIN_CALLS, captured
from caco.train.engine import search_kernels
from caco.train.heap import keep_heap
from caco.train.prepare import create_state
from caco.train.state import TrainingState
from caco.train.step import Rates, compute_gradients, rates_at, train_step
from caco.train.trials import compile_module
from caco.winograd.network import use_winograd


def configuration(options: argparse.Namespace, precision: str) -> Pretrain:
    """Return the published settings at the size asked for."""
    return Pretrain(
        data=options.data or f"textures:{options.batch * (8 if options.size <= 64 else 2)}",
        backbone=options.backbone,
        epochs=100,
        batch_size=options.batch,
        bank_size=options.bank,
        accumulate=options.accumulate,
        device=options.device,
        precision=precision,  # type: ignore[arg-type]
        views=Views(size=options.size, small=options.small, small_size=options.small_size, blur=(0.5, 0.5)),
        encoder=EncoderOptions(embedding=options.embedding, projector=options.projector),
        engine=EngineOptions(
            layout="channels_last",
            convolution=options.convolution,
            compile="on" if options.compile else "off",
            cuda_graph=not options.no_cuda_graph,
            checkpointing=options.checkpointing,
            decoder=options.decoder,
            keep_heap=not options.give_back,
        ),
    )


class Step:
    """Whole steps, on views that a loader makes ahead. (In stages: `stages.py`.)"""

    def __init__(self, config: Pretrain, source: ImageSource, plain_views: bool = False) -> None:
        device = choose_device(config.device)
        if device.type == "cpu" and config.engine.keep_heap:
            keep_heap()
        search_kernels(device)
        torch.manual_seed(0)
        self.state: TrainingState = create_state(
            config, create_backbone(config.backbone, config.views.size), World(device)
        )
        self.state.model.train()
        if config.engine.convolution == "winograd":
            use_winograd(self.state.model)
        if plain_views:
            makers.DeviceViews = partial(DeviceViews, compiled=False)  # type: ignore[misc, assignment]
        self.precision, self.accumulate = PRECISIONS[config.precision], config.accumulate
        model, how = self.state.model, {"precision": self.precision, "accumulate": self.accumulate}
        self.gradients = captured(
            partial(compute_gradients, model, model, **how), model.parameters(), config, World(device)
        )
        self.rates: Rates = rates_at(config, config.optimizer.warmup_epochs)
        self.loader = TrainingViews.create(
            source,
            config.views.augmentations(),
            config.views.mean,
            config.views.std,
            batch_size=config.batch_size,
            seed=0,
            workers=World(device).worker_count("auto"),
            device=device,
            broken=BrokenImages(len(source), 0.0),
        )
        if config.engine.decoder == "gpu":
            on_gpu = self.loader.gpu_maker()
            if on_gpu is None:
                raise SystemExit("--decoder gpu is for a GPU and --data with JPEG files of many sizes")
            self.loader.use(on_gpu)
        self.views = len(config.views.augmentations())
        self.batches: Iterator[list[Tensor]] = (batch.views for batch in self.loader.batches(0, 0, 10**6))

    def whole(self) -> None:
        train_step(self.state, self.gradients, next(self.batches), self.rates, self.rates.key_momentum)


def limit(backbone: nn.Module, config: Pretrain, views: Sequence[Tensor]) -> Callable[[], None]:
    """Return the passes that nothing can do without, captured if the step is."""

    def passes(views: Sequence[Tensor]) -> None:
        for part in range(config.accumulate):
            bare_passes(backbone, [view.chunk(config.accumulate)[part] for view in views], PRECISIONS[config.precision])

    return partial(captured(passes, (), config, World(views[0].device)), views)


def bare_passes(backbone: nn.Module, views: Sequence[Tensor], precision: torch.dtype) -> None:
    in_precision = autocast(views[0].device, precision)
    with in_precision, torch.no_grad():
        for view in views[:2]:
            backbone(view)
    for view in views:  # one after another: as fast as all forward and then all backward, with half the memory
        with in_precision:
            total = backbone(view).float().sum()
        total.backward()
    for parameter in backbone.parameters():
        parameter.grad = None


def repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


def step_memory(step: Step) -> int:
    """Return the peak memory of a whole step on a GPU, without the limit's, after two that make buffers."""
    for _ in range(PLAIN_CALLS - 1):
        step.whole()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step.whole()  # the last that is not captured; a graph's memory is the same, and kept
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def contestant(
    config: Pretrain, rounds: int, steps: int, in_stages: bool, with_limit: bool, plain_views: bool
) -> dict[str, Any]:
    """Run in a fresh process: return the seconds of a whole step, of the limit, and of each stage.

    steps: taken one after the other in each turn, as in a run, where a GPU need not wait for the next one's first kernel.
    """
    step = Step(config, open_source(config.data), plain_views)
    gpu = step_memory(step) if step.loader.device.type == "cuda" else None

    def in_turns(warm_up: int, **work: Callable[[], None]) -> dict[str, Any]:
        repeated = {name: partial(repeat, one, steps) for name, one in work.items()}
        turns = take_turns(repeated, rounds, warm_up, step.loader.device)
        return {name: Seconds(tuple(taken / steps for taken in turns[name].all)).as_json() for name in turns}

    rounds_of_stages = 10 if gpu else max(rounds // 2, 1)
    in_stages = in_stages and config.accumulate == 1  # a whole batch may not fit
    if config.engine.checkpointing or not with_limit:  # the limit keeps all activations, which may not fit
        turns = in_turns(1, step=step.whole)
        return {
            **turns,
            "limit": None,
            "stages": stage_times(step, rounds_of_stages) if in_stages else {},
            "gpu_bytes": gpu,
        }
    backbone = create_backbone(config.backbone, config.views.size)
    backbone.to(step.loader.device).to(memory_format=torch.channels_last).train()
    if config.engine.compile == "on":
        compile_module(backbone)
    views = next(step.batches)
    work = {"step": step.whole, "limit": limit(backbone, config, views)}
    if config.engine.convolution == "winograd":
        other = copy.deepcopy(backbone)
        use_winograd(other)
        work["bare, winograd"] = limit(other, config, views)
    turns = in_turns(PLAIN_CALLS + 1 if gpu else 2, **work)
    print("seconds, medians:", {name: row["median"] for name, row in turns.items()}, flush=True)
    del backbone, views, work
    stages = stage_times(step, rounds_of_stages) if in_stages else {}
    return {**turns, "stages": stages, "gpu_bytes": gpu}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="side of the two large views, pixels")
    parser.add_argument("--data", default="", help="pictures to train on (default: drawn textures, held in memory)")
    parser.add_argument("--decoder", choices=("cpu", "gpu"), default="cpu", help="of JPEG files")
    parser.add_argument("--small", type=int, default=0, help="number of small crops")
    parser.add_argument("--small-size", type=int, default=96)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--bank", type=int, help="slots")
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--projector", type=int, default=512)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn; on a GPU some, so that none waits")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--convolution", choices=("direct", "winograd"), default="direct")
    parser.add_argument("--compile", action="store_true", help="torch.compile, of the step's encoder and of the limit")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    parser.add_argument("--no-stages", action="store_true", help="no stages; so it is with --accumulate")
    parser.add_argument("--no-limit", action="store_true", help="no bare passes; compiling them takes long, too")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no-cuda-graph", action="store_true", help="GPU: Python launches each kernel")
    parser.add_argument(
        "--plain-views", action="store_true", help="GPU: do not compile the making of views, which takes half a minute"
    )
    parser.add_argument("--give-back", action="store_true", help="CPU: do not keep freed memory")
    options = parser.parse_args()
    if options.convolution == "winograd" and (options.compile or options.device != "cpu"):
        parser.error("--convolution winograd is for --device cpu, without --compile")
    options.batch = options.batch or (32 if options.quick else 256)
    options.bank = options.bank or (4096 if options.quick else 65_536)
    rounds = options.rounds or (1 if options.quick else 5)
    print(describe(options.device))
    results = {}
    for precision in options.precision:
        what = not options.no_stages, not options.no_limit, options.plain_views
        environment = as_a_run(not options.give_back) if options.device == "cpu" else {}
        run = fresh(
            contestant, configuration(options, precision), rounds, options.steps, *what, environment=environment
        )
        row, memory = run.result, run.result["gpu_bytes"] or run.family_bytes
        results[precision] = {**row, "others": run.others, "bytes": memory}
        whole = options.batch / row["step"]["median"]
        bare = options.batch / row["limit"]["median"] if row["limit"] else None
        of_limit = f"limit {bare:,.1f}, {whole / bare:.1%} of it" if bare else "limit not taken"
        title = f"{options.backbone}, {options.size} px, batch {options.batch}, {options.bank:,} slots, {precision}"
        print(f"\n{title}: {whole:,.1f} images/s, {of_limit}; peak {gigabytes(memory)} GB")
        if "bare, winograd" in row:
            fastest = options.batch / row["bare, winograd"]["median"]
            print(f"(bare passes by Winograd's convolutions: {fastest:,.1f} images/s, {whole / fastest:.1%} of them)")
        print(f"(other programs kept {run.others} cores busy)")
        total = sum(stage["median"] for stage in row["stages"].values())
        rows = [
            (name, f"{1000 * stage['median']:,.1f}", f"{stage['median'] / total:.1%}")
            for name, stage in row["stages"].items()
        ]
        if rows:
            print(table(("stage", "ms", "share"), rows))
        save(options, {"results": results})


if __name__ == "__main__":
    main()
