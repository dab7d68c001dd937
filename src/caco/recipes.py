"""Named settings. Each recipe's docstring states its source, hardware, hours and expected accuracy.

Recipes hold what belongs to a kind of data: view size and blur, bank size and rate, length of the warm start.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from caco.config import BankOptions, EncoderOptions, EngineOptions, MonitorOptions, OptimizerOptions, Pretrain, Views
from caco.errors import UsageError, did_you_mean
from caco.options import words

_QUICK_BANK = BankOptions(
    lr=15.0,
    final_lr=15.0,
    temperature=0.1,
    slot_temperature=0.1,
    warm_start_temperature=0.1,
    warm_start_key_momentum=0.9,
)
"""A bank that keeps up with its encoder in runs of some hundred steps (docs/tuning.md)."""


def _published_monitor(epochs: int) -> MonitorOptions:
    return MonitorOptions(knn_epochs=epochs, knn_first_epochs=20, knn_share=0.2)


def imagenet_200_b1024() -> Pretrain:
    """ResNet-50, ImageNet-1k, 200 epochs, batch 1,024, one pair of crops.

    Source: published README 1.1; paper arXiv:2203.14370. Expected linear top-1: 71.3 (published; not re-run by us).
    Hardware: 8 GPUs of 32 GB (published).
    """
    return Pretrain(
        recipe="imagenet-200-b1024",
        backbone="resnet50",
        epochs=200,
        batch_size=1024,
        lr=0.3,
        bank_size=65536,
        encoder=EncoderOptions(stem="standard"),
        monitor=_published_monitor(10),
    )


def imagenet_200_b4096() -> Pretrain:
    """ResNet-50, ImageNet-1k, 200 epochs, batch 4,096, one pair of crops.

    Source: published README 1.2 (its heading and table: 4,096 in all). Expected linear top-1: 72.0 (published; not
    re-run by us). Hardware: 4 machines of 8 GPUs of 32 GB (published).
    """
    return replace(imagenet_200_b1024(), recipe="imagenet-200-b4096", batch_size=4096, monitor=_published_monitor(20))


def imagenet_800_b4096() -> Pretrain:
    """ResNet-50, ImageNet-1k, 800 epochs, batch 4,096, one pair of crops.

    Source: third row of the published table. Expected linear top-1: 75.3 (published; not re-run by us).
    Hardware: 4 machines of 8 GPUs of 32 GB (published).
    """
    return replace(imagenet_200_b4096(), recipe="imagenet-800-b4096", epochs=800)


def imagenet_800_multicrop_b2048() -> Pretrain:
    """ResNet-50, ImageNet-1k, 800 epochs, batch 2,048, two views of 224 px and six of 96 px.

    Source: published README 2. Expected linear top-1: 75.7 (published; not re-run by us).
    Hardware: 4 machines of 8 GPUs of 32 GB (published).
    """
    return replace(
        imagenet_200_b1024(),
        recipe="imagenet-800-multicrop-b2048",
        epochs=800,
        batch_size=2048,
        views=Views(area=(0.14, 1.0), small=6, saturation=0.4, blur=(0.5, 0.5), solarize=(0.0, 0.0)),
        monitor=_published_monitor(50),
    )


def cifar() -> Pretrain:
    """ResNet-18 with the small stem for 32 px images (CIFAR-10, CIFAR-100): 200 epochs, batch 128, no blur.

    Source: ours (docs/tuning.md), tuned by a small backbone in runs of 4 epochs: SGD, a quick bank of few slots and a long
    warm start gained 5 points of kNN over the published LARS with 4,096 slots. Hardware: one GPU.
    Accuracy after 200 epochs: not yet measured by us.
    """
    return Pretrain(
        recipe="cifar",
        backbone="resnet18",
        epochs=200,
        batch_size=128,
        lr=0.24,
        bank_size=1024,
        views=Views(size=32, blur=(0.0, 0.0), solarize=(0.0, 0.2)),
        encoder=EncoderOptions(embedding=128, projector=1024, stem="small", centred=True, key_momentum=0.98),
        bank=replace(_QUICK_BANK, warm_start_steps="long"),
        optimizer=OptimizerOptions(name="sgd", final_lr=0.0024, warmup_epochs=2, weight_decay=5e-4),
        monitor=MonitorOptions(knn_epochs=5),
    )


def small_photos() -> Pretrain:
    """Hundreds to some thousands of own photos, one GPU or none: ResNet-18, 128 px, batch 64.

    Source: ours (docs/tuning.md): in few steps, plain SGD, a quick bank of few slots, a small batch and a long warm start
    each gained points of kNN over the published LARS, batch and share of slots. Hardware: one GPU, or a CPU and
    patience (a run says how long it will take).
    """
    return Pretrain(
        recipe="small-photos",
        backbone="resnet18",
        epochs="auto",
        batch_size=64,
        lr=0.24,
        bank_size=256,
        views=Views(size=128, blur=(0.5, 0.1)),
        encoder=EncoderOptions(embedding=128, projector=1024, centred=True, key_momentum=0.98),
        bank=replace(_QUICK_BANK, warm_start_steps="long"),
        optimizer=OptimizerOptions(name="sgd", final_lr=0.0024, warmup_epochs=2, weight_decay=1e-4),
        monitor=MonitorOptions(knn_epochs=10),
    )


def demo() -> Pretrain:
    """Drawn textures, a few minutes on two CPU cores (caco demo).

    Source: ours, tuned on the built-in textures (docs/tuning.md has every trial). A small bank and few steps ask for much
    that the published settings do not: hue and grey against the colour shortcut, plain SGD, small batches, a quick
    key encoder, and a warm start that lasts until the embeddings spread.
    """
    return Pretrain(
        recipe="demo",
        backbone="resnet10_narrow",
        precision="fp32",
        epochs=24,
        batch_size=64,
        lr=0.24,
        bank_size=128,
        views=Views(
            size=32,
            area=(0.4, 1.0),
            brightness=0.2,
            contrast=0.2,
            saturation=0.6,
            hue=0.5,
            jitter=0.9,
            gray=0.3,
            blur=(0.0, 0.0),
            solarize=(0.0, 0.2),
        ),
        encoder=EncoderOptions(embedding=64, projector=256, stem="standard", centred=True, key_momentum=0.98),
        bank=replace(_QUICK_BANK, warm_start_steps=400),
        optimizer=OptimizerOptions(name="sgd", final_lr=0.024, warmup_epochs=0, weight_decay=1e-4),
        engine=EngineOptions(layout="channels_last", convolution="direct", compile="off"),
        monitor=MonitorOptions(knn_epochs=8, log_steps=20),
    )


RECIPES: dict[str, Callable[[], Pretrain]] = {
    make().recipe: make
    for make in (
        imagenet_200_b1024,
        imagenet_200_b4096,
        imagenet_800_b4096,
        imagenet_800_multicrop_b2048,
        cifar,
        small_photos,
        demo,
    )
}


def find_recipe(name: str) -> Pretrain:
    """Return the settings that --recipe names: a recipe's, or those of a run (its folder, or its config.json).

    Raises UsageError with the nearest names for any other.
    """
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if name and (path.is_dir() or path.name == "config.json"):
        return _settings_of(path if path.is_dir() else path.parent)
    near = did_you_mean(name, RECIPES) or f" There are: {', '.join(RECIPES)}, and any folder of a run."
    raise UsageError(f"--recipe: no recipe is called {name!r}.{near}")


def _settings_of(folder: Path) -> Pretrain:
    """Return what a run computes, without what belongs to that run alone: on which images, where, and on what machine."""
    from caco.train.run_folder import read_config

    usual = Pretrain()
    apart = ("data", "val", "out", "device", "workers", "download", "distributed")
    try:
        settings = read_config(folder)
    except UsageError as error:
        raise UsageError(f"--recipe: {error}") from error
    faster_there = {name: getattr(usual.engine, name) for name in ("convolution", "decoder")}
    engine = replace(settings.engine, **faster_there)
    return replace(settings, engine=engine, **{name: getattr(usual, name) for name in apart})


def listing() -> str:
    """Return one line for each recipe: its name and the first line of its docstring."""
    width = max(map(len, RECIPES))
    return "\n".join(
        f"{name:{width}}  {(inspect.getdoc(make) or '').splitlines()[0]}" for name, make in RECIPES.items()
    )


def whole(name: str) -> str:
    """Return all there is to know of a recipe: source, hardware, accuracy, and every option as it is typed."""
    recipe = find_recipe(name)
    lines = [shlex.join(option) for option in words(replace(recipe, recipe="", device=""))]
    unset = {f"--no-{switch}" for switch in ("resume", "overwrite", "download")}
    options = " \\\n".join(line for line in lines if line not in unset)
    of_a_run = f"The settings of a run that began as {recipe.recipe}."
    about = inspect.getdoc(RECIPES[name]) if name in RECIPES else of_a_run
    return f"{name}\n\n{about}\n\nEvery option, to go behind caco pretrain --data FOLDER --out RUN:\n\n{options}"
