"""Every option of the commands that train (pretrain, demo), as typed dataclasses; `after_training` has the others.

No torch here: the command line is parsed, and its errors told, before anything heavy is imported.
The string under each field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Union

from caco.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Preparation, usual_resize

Auto = Literal["auto"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Views:
    """The random views of one image."""

    size: int = 224
    """Side of the large views, in pixels."""
    area: tuple[float, float] = (0.2, 1.0)
    """Least and largest share of the image's area in a large view."""
    large: int = 2
    """Number of large views; the first two are also seen by the key encoder."""
    small: int = 0
    """Number of small views (multi crop: 6)."""
    small_size: int = 96
    """Side of the small views, in pixels."""
    small_area: tuple[float, float] = (0.05, 0.14)
    """Least and largest share of the image's area in a small view."""
    brightness: float = 0.4
    """Brightness factor is drawn from 1 ± this."""
    contrast: float = 0.4
    """Contrast factor is drawn from 1 ± this."""
    saturation: float = 0.2
    """Saturation factor is drawn from 1 ± this."""
    hue: float = 0.1
    """Hue shift is drawn from ± this, in turns."""
    jitter: float = 0.8
    """Probability of the colour jitter (the four options above)."""
    gray: float = 0.2
    """Probability of dropping the colour."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of a Gaussian blur: in the first view, in all others."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, in pixels."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarising at 128: in the first view, in all others."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel (of pixels in 0-1), subtracted from every view."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, by which every view is divided."""
    evaluation_resize: Union[int, Auto] = "auto"
    """Evaluation only: the shorter side is resized to this before the centre crop, in pixels; auto: 256 for 224."""

    def resize(self) -> int:
        """Return the pixels that the shorter side has before the centre crop of an evaluation."""
        return usual_resize(self.size) if self.evaluation_resize == "auto" else self.evaluation_resize

    def preparation(self) -> Preparation:
        """Return how an image is prepared when an encoder of these views is evaluated."""
        return Preparation(self.size, self.resize(), self.mean, self.std)

    def augmentations(self) -> tuple[Augmentation, ...]:
        """Return one Augmentation for each view, large ones first."""

        def view(number: int, size: int, area: tuple[float, float]) -> Augmentation:
            first_or_other = 0 if number == 0 else 1
            return Augmentation(
                size=size,
                area=area,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
                hue=self.hue,
                jitter_probability=self.jitter,
                gray_probability=self.gray,
                blur_probability=self.blur[first_or_other],
                blur_sigma=self.blur_sigma,
                solarize_probability=self.solarize[first_or_other],
                flip_probability=self.flip,
            )

        large = [view(i, self.size, self.area) for i in range(self.large)]
        small = [view(self.large + i, self.small_size, self.small_area) for i in range(self.small)]
        return tuple(large + small)


@dataclass(frozen=True)
class BankOptions:
    """The bank of learnable positives and negatives."""

    lr: float = 3.0
    """Learning rate of the bank per 65,536 slots (the rate used is this x bank size / 65,536)."""
    final_lr: float = 3.0
    """The same at the last epoch (cosine from lr; constant if equal)."""
    momentum: float = 0.9
    """Momentum of the bank's SGD."""
    temperature: float = 0.08
    """Temperature of the loss that moves the encoder."""
    slot_temperature: float = 0.08
    """Temperature of the loss that moves the slots."""
    warm_start_steps: Union[int, Literal["auto", "long"]] = "auto"
    """Steps of contrast that fill the bank with keys; auto: until it is full; long: 1,000, at most 0.6 of the training's."""
    warm_start_temperature: float = 0.2
    """Temperature of that contrast."""
    warm_start_key_momentum: float = 0.999
    """Momentum of the key encoder in those steps."""
    sharded: bool = False
    """Each process keeps its share of the slots only (for banks of a million slots and more)."""


@dataclass(frozen=True)
class EncoderOptions:
    """The encoder and its momentum copy."""

    embedding: int = 256
    """Width of an embedding and of a slot."""
    projector: int = 2048
    """Width of the projector's two hidden layers."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """First layers of a ResNet; small: 3x3 convolution without pooling; auto: small when views are at most 64 px."""
    centred: bool = False
    """Start the projector's last layer with rows of mean 0: embeddings begin spread out, not in a narrow cone."""
    key_momentum: float = 0.99
    """Momentum of the key encoder in the first epoch."""
    key_momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """How that momentum goes on: a cosine to 1 over the run, or constant."""


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer of the encoder."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """lars is the published one; adamw suits transformers."""
    final_lr: float = 0.003
    """Learning rate at the last epoch, per 256 images (cosine from --lr)."""
    warmup_epochs: int = 10
    """Epochs over which the learning rates grow to their full value."""
    momentum: float = 0.9
    """Momentum (lars, sgd)."""
    weight_decay: float = 1.5e-6
    """Weight decay (not on biases and norms)."""


@dataclass(frozen=True)
class EngineOptions:
    """How images are decoded and the encoder is computed. Same mathematics; only rounding, speed and memory differ."""

    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Order of pixels and channels in memory; auto: channels_last, unless a trial at the start of a long run says otherwise."""
    convolution: Literal["auto", "direct", "winograd"] = "auto"
    """winograd (CPU, numba): a quarter of the products of 3 x 3 filters; auto: tried at the start of a long run."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: tried (not with winograd) in a run of over two hours (GPU: five minutes), kept if it pays."""
    cuda_graph: bool = True
    """One GPU: launch a step's kernels all at once, as a CUDA graph, unless a step takes over half of the GPU's memory."""
    decoder: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu: it decodes JPEG files and makes the views; auto: tried in a run of over five minutes for which threads are too slow."""
    checkpointing: bool = False
    """Compute each block's activations again in backward: far less memory, about a third more time."""
    keep_heap: bool = True
    """CPU: keep freed memory for the next step instead of giving it back (faster, some more memory)."""


@dataclass(frozen=True)
class MonitorOptions:
    """What is watched while the run goes on. Changes nothing in the mathematics."""

    log_steps: int = 10
    """Steps between two records in metrics.jsonl."""
    knn_epochs: int = 10
    """Epochs between two kNN checks, besides the one at the end; 0: none at all."""
    knn_first_epochs: int = 0
    """Check after every epoch up to this one, too."""
    knn_share: float = 1.0
    """Share of each training class, in path order, that the kNN check refers to (published: 0.2)."""
    knn_neighbours: int = 20
    """Neighbours that vote in the kNN check."""
    held_out: float = 0.1
    """Share of a labelled training set used as kNN queries when no --val is given."""
    checkpoint_minutes: float = 10.0
    """Time between two checkpoints, in minutes; one is also written at the end and when stopped."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept (besides the best by kNN)."""
    broken_share: float = 0.1
    """Share of broken images at which the run stops instead of skipping them."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install tensorboard)."""


@dataclass(frozen=True)
class DistributedOptions:
    """Processes and machines. Under torchrun or SLURM these are read from the environment instead."""

    processes: Union[int, Auto] = "auto"
    """Processes on this machine; auto: one for each GPU, or one."""
    machines: int = 1
    """Machines in all; the same command is started on each, with its own --distributed.machine."""
    machine: int = 0
    """Number of this machine, from 0."""
    address: str = ""
    """HOST:PORT of machine 0, the same on all machines."""
    timeout: float = 600.0
    """Longest wait for another process in an exchange, in seconds: then all stop; what one does alone may take longer."""


@dataclass(frozen=True)
class Pretrain:
    """Pre-train an encoder on images, with or without labels (labels are never trained on)."""

    data: str = ""
    """Training images: a folder, Parquet or tar files (globs allowed), a torchvision set by name, or textures."""
    val: str = ""
    """Labelled images for the kNN check while training; without it, a share of a labelled --data."""
    out: str = ""
    """Folder of the run."""
    recipe: str = "small-photos"
    """Named settings to start from (list: caco recipes), or those of a run (its folder); all other options override it."""
    backbone: str = "resnet18"
    """Any model name of timm, or of torchvision."""
    weights: str = ""
    """Start from this file (caco, published CaCo, timm, torchvision), or timm:NAME to download from timm's hub."""
    epochs: Union[int, Auto] = "auto"
    """Passes over the images; auto: about 20,000 steps, at least 50 and at most 800 epochs."""
    start_epoch: int = 0
    """Epoch at which the schedules begin, for a run that goes on from another's --weights."""
    batch_size: int = 128
    """Images per step, over all processes."""
    accumulate: int = 1
    """Parts in which a batch goes through, one after another, to save memory."""
    lr: float = 0.3
    """Learning rate of the encoder per 256 images (the rate used is this x batch size / 256)."""
    bank_size: int = 4096
    """Number of slots in the bank."""
    device: str = "auto"
    """auto (NVIDIA's GPU, else the CPU), cpu, cuda, cuda:1, mps (never tried), ..."""
    precision: Precision = "auto"
    """Arithmetic of the encoder; auto: bf16 on GPUs that have it; on a CPU fp32, or bf16 if a long run is 1.5 times faster."""
    workers: Union[int, Auto] = "auto"
    """Threads that decode and augment; auto: one per core. The views do not depend on it."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on with the run in --out, exactly where it stopped."""
    overwrite: bool = False
    """Delete the run that is in --out and start anew."""
    download: bool = False
    """Allow a torchvision set to be downloaded."""
    views: Views = Views()
    encoder: EncoderOptions = EncoderOptions()
    bank: BankOptions = BankOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    engine: EngineOptions = EngineOptions()
    monitor: MonitorOptions = MonitorOptions()
    distributed: DistributedOptions = DistributedOptions()


@dataclass(frozen=True)
class Demo:
    """Pre-train on built-in pictures and judge the result, in a few minutes on two CPU cores."""

    out: str = "runs/demo"
    """Folder of the run."""
    seed: int = 0
    """Seed of everything random."""
    overwrite: bool = False
    """Delete the run that is in --out and start anew."""
