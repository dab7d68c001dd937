"""The published `linear.py`: its flags, translated onto `caco linear` in the reference protocol."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caco.after_training import Linear
from caco.checks import check_numbers
from caco.cli import exit_status
from caco.errors import UsageError
from caco.reference.command import linear_command, machines, resources
from caco.reference.flags import Flag, Flags, check_file, read_flags
from caco.reference.main import NOT_NEEDED

FLAGS = (
    Flag("data", "", "folder that holds train/ and val/, each with a folder for each class"),
    Flag("arch", "resnet50", "backbone, where the checkpoint does not say it", ("-a",)),
    Flag("pretrained", "", "checkpoint or run folder to judge; none: an untrained backbone"),
    Flag("workers", 32, "threads on all machines that decode and augment", ("-j",)),
    Flag("epochs", 100, "passes over the training images"),
    Flag("batch_size", 4096, "images per step of the classifier", ("-b",)),
    Flag("lr", 0.1, "learning rate per 256 images", ("--learning_rate",)),
    Flag("momentum", 0.9, "momentum"),
    Flag("wd", 0.0, "weight decay", ("--weight_decay",)),
    Flag("seed", 0, "seed of the classifier and of the crops"),
    Flag("size", 0, "ours: side of the crops in pixels; 0: as the encoder was trained"),
    Flag("resume", "", "with --evaluate: the checkpoint.pth.tar of a classifier"),
    Flag("evaluate", False, "only judge a classifier that is already trained", ("-e",)),
    Flag("world_size", -1, "machines"),
    Flag("rank", -1, "number of this machine, from 0"),
    Flag("dist_url", "tcp://224.66.41.62:23456", "tcp://HOST:PORT of machine 0"),
    Flag("nproc", None, "ours: processes on this machine; none: one for each GPU, or one", kind=int),
    Flag("gpu", None, "use only this GPU", kind=int),
    Flag("start_epoch", 0, "epoch to begin with", idle="a classifier is trained in one go"),
    Flag("print_freq", 10, "steps between two records", ("-p",), idle="one line for each epoch"),
    Flag("dist_backend", "nccl", "means of exchange", idle="NCCL on GPUs, gloo on CPUs"),
    Flag("multiprocessing_distributed", False, "one process for each GPU", idle="always so"),
    Flag("dataset", "ImageNet", "name of the data", idle="never used by the published code; " + NOT_NEEDED),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the published command line and return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return exit_status(lambda: _main(given), "linear.py")


def _main(arguments: list[str]) -> None:
    about = "Judge an encoder as the published CaCo code does; prints the caco command that does the same."
    flags = read_flags("linear.py", about, FLAGS, arguments, "-")
    if flags.resume and not flags.evaluate:
        raise UsageError(
            "--resume: a classifier is trained in one go; leave it out, or add --evaluate to judge the file"
        )
    import torch

    from caco.judge import linear
    from caco.reference.classifier import evaluate_classifier, write_checkpoint

    config = translate(flags, torch.cuda.device_count(), os.cpu_count() or 1)
    check_numbers(config)
    if flags.evaluate:
        top1, top5 = evaluate_classifier(Path(flags.resume or result_folder(flags) / "checkpoint.pth.tar"), config)
    else:
        print(linear_command(config), flush=True)
        report = linear(config)
        if report is None:  # another process prints the result
            return
        top1, top5 = report["top1"], report["top5"]
        write_checkpoint(result_folder(flags) / "checkpoint.pth.tar", config, report)
    print(f" * Acc@1 {top1:.3f} Acc@5 {top5:.3f}")


def translate(flags: Flags, gpus: int, cores: int) -> Linear:
    """Return the configuration that the flags ask for. Raises UsageError."""
    if not flags.data:
        raise UsageError("--data is missing: the folder that holds train/ and val/")
    if flags.pretrained:
        check_file("--pretrained", flags.pretrained)
    device, processes, workers = resources(flags, gpus, cores)
    folder = result_folder(flags)
    return Linear(
        run=flags.pretrained or "random",
        data=str(Path(flags.data) / "train"),
        val=str(Path(flags.data) / "val"),
        out=str(folder / "result.json"),
        overwrite=True,  # as the published program does
        head=str(folder / "head.safetensors"),
        backbone=flags.arch if "arch" in flags.given or not flags.pretrained else "",
        size=flags.size,
        device=device,
        workers=workers,
        seed=flags.seed,
        precision="fp32",  # the published arithmetic
        protocol="reference",
        epochs=flags.epochs,
        lr=flags.lr,
        probe_batch_size=flags.batch_size,
        momentum=flags.momentum,
        weight_decay=flags.wd,
        distributed=machines(flags.world_size, flags.rank, flags.dist_url, processes),
    )


def result_folder(flags: Flags) -> Path:
    """Return the published folder of results, beside the checkpoint (its batch size is the whole one, not a GPU's)."""
    pretrained = Path(flags.pretrained).resolve() if flags.pretrained else Path.cwd() / "random"
    beside = pretrained if pretrained.is_dir() else pretrained.parent
    rounded = f"{flags.lr:.3f}"
    lr = rounded if float(rounded) == flags.lr else f"{flags.lr:g}"
    return beside / "linear_lars" / f"bs_{flags.batch_size}" / f"lr_{lr}" / f"wd_{flags.wd}"
