"""The published `main.py`: its flags, translated onto `caco pretrain`."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from caco.checks import check
from caco.cli import exit_status
from caco.config import Pretrain
from caco.errors import UsageError
from caco.files import holds_run
from caco.options import flatten, override
from caco.recipes import imagenet_200_b1024
from caco.reference.command import machines, nearest_recipe, pretrain_command, resources
from caco.reference.flags import Flag, Flags, check_file, read_flags

NOT_NEEDED = "not needed here"

FLAGS = (
    Flag("data", "data", "folder that holds train/ and val/, each with a folder for each class"),
    Flag("dataset", "ImageNet", "name of a folder below the log path; any data that is laid out like ImageNet"),
    Flag("log_path", "train_log", "folder in which each run gets its own"),
    Flag("arch", "resnet50", "backbone: any model name of timm or torchvision", ("-a",)),
    Flag("workers", 32, "threads on all machines that decode and augment", ("-j",)),
    Flag("epochs", 200, "passes over the images"),
    Flag("start_epoch", 0, "epoch at which the schedules begin; --resume sets it"),
    Flag("batch_size", 256, "images per step, over all machines", ("-b",)),
    Flag("lr", 0.03, "learning rate of the encoder per 256 images", ("--learning_rate",)),
    Flag("lr_final", 0.0003, "the same at the last epoch"),
    Flag("momentum", 0.9, "momentum of the encoder's optimizer"),
    Flag("wd", 1e-4, "weight decay", ("--weight_decay",)),
    Flag("warmup_epochs", 0, "epochs over which the learning rates grow"),
    Flag("print_freq", 10, "steps between two records", ("-p",)),
    Flag("resume", "", "start from this checkpoint, ours or a published one"),
    Flag("seed", 0, "seed of everything random"),
    Flag("moco_dim", 128, "width of an embedding"),
    Flag("mlp_dim", 2048, "width of the projector's hidden layers"),
    Flag("moco_m", 0.999, "momentum of the key encoder"),
    Flag("moco_m_decay", 0, "1: that momentum follows a cosine to 1"),
    Flag("moco_t", 0.12, "temperature of the encoder's loss"),
    Flag("mem_t", 0.02, "temperature of the bank's gradient"),
    Flag("cluster", 65536, "slots of the bank"),
    Flag("memory_lr", 3.0, "learning rate of the bank"),
    Flag("memory_lr_final", 0.03, "the same at the last epoch"),
    Flag("mem_momentum", 0.9, "momentum of the bank's optimizer"),
    Flag("mem_wd", 1e-4, "weight decay of the bank", idle="never used by the published code"),
    Flag("ad_init", 1, "1: fill the bank with keys first"),
    Flag("multi_crop", 0, "1: small crops too", ("--multicrop",)),
    Flag("nmb_crops", [1, 6], "multi crop: large crops besides the first, small crops"),
    Flag("size_crops", [224, 96], "multi crop: sides of the large and the small crops, in pixels"),
    Flag("min_scale_crops", [0.14, 0.05], "multi crop: least share of the image's area, large and small"),
    Flag("max_scale_crops", [1.0, 0.14], "multi crop: largest share of the image's area, large and small"),
    Flag("size", 224, "ours: side of the crops without multi crop, in pixels"),
    Flag("knn_freq", 1, "epochs between two kNN checks after the 20th"),
    Flag("knn_neighbor", 20, "neighbours that vote in the kNN check"),
    Flag("knn_batch_size", 128, "images per forward pass of the kNN check", idle=NOT_NEEDED),
    Flag("world_size", 1, "machines"),
    Flag("rank", 0, "number of this machine, from 0"),
    Flag("dist_url", "tcp://224.66.41.62:23456", "tcp://HOST:PORT of machine 0"),
    Flag("nproc", None, "ours: processes on this machine; none: one for each GPU, or one", kind=int),
    Flag("gpu", None, "use only this GPU", kind=int),
    Flag("nodes_num", 1, "machines, once more", idle="--batch_size is the whole batch, --world_size says the machines"),
    Flag("dist_backend", "nccl", "means of exchange", idle="NCCL on GPUs, gloo on CPUs"),
    Flag("multiprocessing_distributed", 1, "one process for each GPU", idle="always so"),
    Flag("type", 0, "kind of run", idle="it only named a folder"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the published command line and return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return exit_status(lambda: _main(given), "main.py")


def _main(arguments: list[str]) -> None:
    about = "Pre-train as the published CaCo code does; prints the caco command that does the same."
    flags = read_flags("main.py", about, FLAGS, arguments, "_")
    import torch

    from caco import commands
    from caco.deliver.export import write_reference

    config = go_on(start_from_file(translate(flags, torch.cuda.device_count(), os.cpu_count() or 1)))
    check(config)
    print(pretrain_command(config), flush=True)
    if config.bank_size != 65536:
        print(
            f"(--bank.lr and --bank.final-lr are per 65,536 slots; with {config.bank_size:,} the bank's rates are "
            f"{flags.memory_lr:g} and {flags.memory_lr_final:g}, as --memory_lr and --memory_lr_final say)",
            flush=True,
        )
    if commands.pretrain(config) is not None:
        path = write_reference(Path(config.out), int(config.epochs))
        next_command = ["python", "linear.py", "-a", config.backbone, "--pretrained", str(path), "--data", flags.data]
        print(f"In the published format: {path}. Next:\n  {shlex.join(next_command)}")


def translate(flags: Flags, gpus: int, cores: int) -> Pretrain:
    """Return the configuration that the flags ask for (docs/reference.md). Raises UsageError."""
    if flags.cluster < 1:
        raise UsageError(f"--cluster {flags.cluster}: must be at least 1")
    slots = 65536 / flags.cluster  # caco's bank rates are per 65,536 slots, the published ones are literal
    device, processes, workers = resources(flags, gpus, cores)
    options = {
        "data": str(Path(flags.data) / "train"),
        "val": str(Path(flags.data) / "val"),
        "backbone": flags.arch,
        "weights": flags.resume,
        "epochs": flags.epochs,
        "start_epoch": flags.start_epoch,
        "batch_size": flags.batch_size,
        "lr": flags.lr,
        "bank_size": flags.cluster,
        "device": device,
        "workers": workers,
        "seed": flags.seed,
        "precision": "fp32",  # the published arithmetic: neither autocast nor a compiler
        "engine.convolution": "direct",
        "engine.compile": "off",
        **(_multi_crop(flags) if flags.multi_crop else {"views.size": flags.size}),
        "encoder.embedding": flags.moco_dim,
        "encoder.projector": flags.mlp_dim,
        "encoder.key_momentum": flags.moco_m,
        "encoder.key_momentum_schedule": "cosine" if flags.moco_m_decay else "constant",
        "bank.lr": flags.memory_lr * slots,
        "bank.final_lr": flags.memory_lr_final * slots,
        "bank.momentum": flags.mem_momentum,
        "bank.temperature": flags.moco_t,
        "bank.slot_temperature": flags.mem_t,
        "bank.warm_start_steps": "auto" if flags.ad_init else 0,
        "optimizer.final_lr": flags.lr_final,
        "optimizer.warmup_epochs": flags.warmup_epochs,
        "optimizer.momentum": flags.momentum,
        "optimizer.weight_decay": flags.wd,
        "monitor.log_steps": flags.print_freq,
        "monitor.knn_epochs": flags.knn_freq,
        "monitor.knn_neighbours": flags.knn_neighbor,
        "distributed": machines(flags.world_size, flags.rank, flags.dist_url, processes),
    }
    config = override(imagenet_200_b1024(), options)
    config = replace(config, recipe=nearest_recipe(config))
    return replace(config, out=str(Path(flags.log_path) / flags.dataset / run_name(config)))


def _multi_crop(flags: Flags) -> dict[str, object]:
    """Return the views of `multi_crop=1` (docs/reference.md): symmetric, without solarising."""
    lists = {name: flags.values[name] for name in ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")}
    if {len(values) for values in lists.values()} != {2}:
        raise UsageError(
            f"{', '.join('--' + name for name in lists)}: each needs two numbers, for large and small crops"
        )
    number, size, least, most = lists.values()
    return {
        "views.size": size[0],
        "views.large": 1 + number[0],
        "views.small": number[1],
        "views.small_size": size[1],
        "views.area": (least[0], most[0]),
        "views.small_area": (least[1], most[1]),
        "views.saturation": 0.4,
        "views.blur": (0.5, 0.5),
        "views.solarize": (0.0, 0.0),
    }


def run_name(config: Pretrain) -> str:
    """Return a folder name that people can read; its last part differs when any other setting or the data does."""
    views = f"multi-crop-{config.views.large}+{config.views.small}" if config.views.small else "single-crop"
    settings = {
        name: value
        for name, value in flatten(replace(config, data=os.path.abspath(config.data), val="")).items()
        if not name.startswith(("monitor.", "distributed.")) and name not in ("recipe", "device", "workers")
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return (
        f"{config.backbone.replace('/', '-')}_{views}_epochs-{config.epochs}_batch-{config.batch_size}"
        f"_cluster-{config.bank_size}_lr-{config.lr:g}_t-{config.bank.temperature:g}_{digest}"
    )


def start_from_file(config: Pretrain) -> Pretrain:
    """Return the configuration with `--resume FILE` understood: the epochs that the file has done are not done again."""
    if not config.weights:
        return config
    path = check_file("--resume", config.weights)
    from caco.reference.checkpoint import read_snapshot

    snapshot = read_snapshot(path)
    if snapshot is None:
        raise UsageError(
            f"--resume: {path} is not a checkpoint of a run (to start from an encoder: caco pretrain --weights)"
        )
    print(f"main.py: going on from {path}, {snapshot.epoch} epochs done", file=sys.stderr)
    return replace(config, start_epoch=snapshot.epoch)


def go_on(config: Pretrain) -> Pretrain:
    """Return the configuration, resuming the run of the same settings that its folder holds, as the published code does."""
    if not holds_run(Path(config.out)):
        return config
    print(f"main.py: {config.out} holds a run of the same settings, which goes on", file=sys.stderr)
    from caco.train.run_folder import as_decided, read_config

    return as_decided(replace(config, resume=True), read_config(Path(config.out)))
