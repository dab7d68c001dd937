"""Every option of the commands that use a finished encoder or its run: judge it, embed with it, export it, look at it.

Typed dataclasses as in `config`, which holds the options of the training itself; no torch here either.
The string under each field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Union

from caco.config import Auto, DistributedOptions, Precision

BASELINES = ("random", "pixels")
"""What can be judged in place of a run: no training, and no encoder at all."""
LEAST_TEMPERATURE = 0.0125
"""Of kNN votes: exp(1 / temperature) must stay within float32."""


@dataclass(frozen=True)
class Evaluation:
    """Options shared by all commands that use a finished encoder."""

    run: str = field(default="", metadata={"positional": "RUN|FILE"})
    """A run folder, a backbone or checkpoint file, timm:NAME, random (untrained --backbone), or pixels (no encoder)."""
    weights: str = ""
    """The same by the name that pretrain has for it: a file, or timm:NAME to download from timm's hub."""
    data: str = ""
    """Images: a folder, Parquet or tar files (globs allowed), a torchvision set by name, or textures."""
    out: str = ""
    """File for the result."""
    overwrite: bool = False
    """Replace files that are there by --out (and --head)."""
    backbone: str = ""
    """timm name, for a FILE that does not say it, or for random; NAME.TAG also says how pictures are prepared."""
    size: int = 0
    """Side of the centre crop in pixels; 0: as the encoder was trained (random, pixels: 224)."""
    mean: tuple[float, ...] = ()
    """Mean of each channel (of pixels in 0-1), three numbers; without it the encoder's own, ImageNet's if unknown."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, in the same way."""
    device: str = "auto"
    """auto (NVIDIA's GPU, else the CPU), cpu, cuda, cuda:1, mps (never tried), ..."""
    precision: Precision = "auto"
    """Arithmetic of the encoder; auto: bf16 on GPUs that have it, else fp32."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: Union[int, Auto] = "auto"
    """Threads that decode; auto: one per core."""
    seed: int = 0
    """Seed of splits, heads and resampling."""
    download: bool = False
    """Allow a torchvision set to be downloaded."""
    distributed: DistributedOptions = DistributedOptions()


@dataclass(frozen=True)
class Judging(Evaluation):
    """Options shared by the commands that judge an encoder by labels."""

    val: str = ""
    """Labelled images to judge by; without it, a stratified share of --data is held out."""
    held_out: float = 0.2
    """Share of --data to judge by when there is no --val."""
    beside: str = ""
    """A run folder whose report shows this result, too; random and pixels then are as its encoder (model, size, ...)."""


@dataclass(frozen=True)
class Knn(Judging):
    """Judge an encoder by the labels of each image's nearest neighbours."""

    neighbours: tuple[int, ...] = (20,)
    """Neighbours that vote; several numbers give several results, the first is the headline."""
    temperature: float = 0.2
    """A neighbour's vote weighs exp(cosine / temperature)."""


@dataclass(frozen=True)
class Linear(Judging):
    """Judge an encoder by a linear classifier on its frozen features."""

    protocol: Literal["cached", "reference"] = "cached"
    """cached: features once, many learning rates, chosen on part of train; reference: the published protocol."""
    epochs: int = 100
    """Passes over the training features."""
    lr: Union[float, Auto] = "auto"
    """Learning rate (per 256 images in the reference protocol); auto: a grid, or 0.025 in the reference protocol."""
    probe_batch_size: int = 0
    """Images per step of the classifier; 0: by the number of images (16 to 1,024), 4,096 in the reference protocol."""
    momentum: float = 0.9
    """Momentum of the classifier's optimizer."""
    weight_decay: float = 0.0
    """Weight decay of the classifier (reference protocol only)."""
    head: str = ""
    """File (.safetensors) for the trained classifier: weight [classes, features], bias, and the names of the classes."""


@dataclass(frozen=True)
class Embed(Evaluation):
    """Write one feature vector for each image."""

    normalise: bool = False
    """Scale every vector to unit length."""


@dataclass(frozen=True)
class Export:
    """Write an encoder in the format of another library, or of the published CaCo code."""

    run: str = field(default="", metadata={"positional": "RUN|FILE"})
    """A run folder, a backbone or checkpoint file."""
    weights: str = ""
    """The same by the name that pretrain has for it: a file (caco, published CaCo)."""
    format: Literal["timm", "torchvision", "reference"] = "timm"
    """timm, torchvision: a state dict of the backbone; reference: the published checkpoint, with bank and projector."""
    out: str = ""
    """File to write: .safetensors or .pth; reference: .pth.tar."""
    overwrite: bool = False
    """Replace the file that is there by --out."""
    backbone: str = ""
    """timm name, for a FILE that does not say it; NAME.TAG also says how pictures are prepared."""


@dataclass(frozen=True)
class Report:
    """Write a page to look at: curves, views, neighbours, and what each slot attracts."""

    run: str = field(default="", metadata={"positional": "RUN"})
    """A run folder."""
    images: int = 2000
    """Images looked at for the galleries, at most."""
    device: str = "auto"
    """auto (NVIDIA's GPU, else the CPU), cpu, cuda, cuda:1, mps (never tried), ..."""
