"""The folder of a run: when it may be used, and what stands in it from the start.

config.json       every setting, resolved
environment.json  versions, devices, command, job (a list: one entry for each start)
metrics.jsonl, speed.jsonl, train.log, skipped.txt, checkpoints/, export/, results/, report.html
.lock (`train/lock.py`), .overwrite (`CONDEMNED`)
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from caco.config import Pretrain
from caco.distributed.membership import job_name
from caco.errors import UsageError, command_line
from caco.files import PLACES, TEMPORARY, check_writable, holds_run, replace_json
from caco.options import flatten, from_dictionary, override
from caco.train.lock import LOCK, RunLock

# What a resumed run may change: these have no part in the mathematics.
FREE_TO_CHANGE = ("out", "device", "workers", "resume", "overwrite", "download", "data", "val")
FREE_GROUPS = ("engine.", "monitor.", "distributed.")
NOT_FREE = ("engine.decoder",)  # another decoder's pixels are others

CONDEMNED = ".overwrite"
"""In the folder of a run that is to be deleted, until it is: preparing the new one may take minutes, and be interrupted."""

RESOLVED = ("epochs", "precision", "engine.layout", "engine.convolution", "engine.compile", "engine.decoder")
"""Options that a run writes into its config.json with a value in place of "auto"."""

WRITTEN = (
    *("environment.json", "metrics.jsonl", "speed.jsonl", "train.log", "index.npz", "skipped.txt"),
    *("checkpoints/step-*.pt", "checkpoints/best.pt", "export/backbone.safetensors"),
    *("results/knn-*.json", "results/linear-*.json"),
    *(f"{place}{TEMPORARY}" for place in PLACES),
    *("report.html", "gallery.png", "demo.json", "checkpoint_*.pth.tar", "events.out.tfevents.*"),
    CONDEMNED,
    "config.json",  # last: it is what makes a folder a run's
)
"""All that a run, and what comes after it, writes into its folder of its own accord."""


def decide_start(config: Pretrain, restarted: bool = False) -> Pretrain:
    """Return the configuration with which the run begins or goes on. Raises UsageError where it may not.

    Restarted, by torchrun after a process was lost or by SLURM after a requeue: the command is the same, so the same run
    goes on, computed as it began; but not the one that `--overwrite` was to delete and has not yet. To be resumed, and nothing
    is saved yet: it begins anew, which comes to the same, for all follows from its settings. Else: as asked.
    """
    folder = Path(config.out)
    condemned = config.overwrite and (folder / CONDEMNED).exists()
    if restarted and holds_run(folder) and not condemned:
        config = as_decided(replace(config, resume=True, overwrite=False), read_config(folder))
    check_run_folder(config)
    if config.resume and not _has_saved(folder):
        if not restarted:
            check_same_mathematics(read_config(folder), config)
        print(f"the run in {folder} had saved no checkpoint yet: it begins anew, the same", file=sys.stderr)
        return replace(config, resume=False, overwrite=True)
    if config.overwrite and holds_run(folder):
        (folder / CONDEMNED).touch()
    return config


def check_run_folder(config: Pretrain) -> None:
    """Raise UsageError when the run's folder may not be used as asked."""
    folder = Path(config.out)
    is_run = holds_run(folder)
    if config.resume and not is_run:
        raise UsageError(f"--resume: there is no run in {folder}; leave --resume out to start one")
    if folder.is_file() or is_of_others(folder):
        raise UsageError(f"--out {folder} exists and is not a run of caco; choose another folder")
    if is_run and not config.resume and not config.overwrite:
        raise UsageError(f"--out {folder} holds a run; go on with --resume, or delete it with --overwrite")
    if is_run and config.overwrite and config.weights:
        weights = Path(config.weights).resolve()
        if folder.resolve() in (weights, *weights.parents):
            raise UsageError(
                f"--weights {config.weights} lies in the run that --overwrite deletes; choose another --out"
            )
    check_writable("--out", folder / "config.json")


def is_of_others(folder: Path) -> bool:
    """Return whether a folder holds something, and no run: nothing is written there."""
    return folder.is_dir() and not holds_run(folder) and any(path.name != LOCK for path in folder.iterdir())


def as_decided(config: Pretrain, saved: Pretrain) -> Pretrain:
    """Return the configuration with what the saved one has decided in place of each "auto": it is not decided again."""
    asked, decided = flatten(config), flatten(saved)
    return override(config, {name: decided[name] for name in RESOLVED if asked[name] == "auto"})


def open_run_folder(config: Pretrain, lock: RunLock) -> Path:
    """Return the run's folder, taken by `lock`, ready for a new run (the old one is deleted) or for `--resume`.

    Raises UsageError as `check_run_folder` does, or when the folder is in use.
    """
    check_run_folder(config)  # again: another run may have come and gone here while this one was prepared
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    lock.take(folder)
    if config.resume:
        (folder / CONDEMNED).unlink(missing_ok=True)
    else:
        _delete_run(folder)
    return folder


def _delete_run(folder: Path) -> None:
    """Delete what a run has written, and nothing else: say what is left. Raises UsageError when that is refused."""
    try:
        for pattern in WRITTEN:
            for path in folder.glob(pattern):
                path.unlink()
        for path in (folder / "checkpoints", folder / "export", folder / "results"):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
    except OSError as error:
        raise UsageError(f"--overwrite: {error.filename} cannot be deleted: {error.strerror}") from error
    left = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5:,} more" if len(left) > 5 else "")
        print(f"left as it is in {folder}, not written by the run: {shown}", file=sys.stderr)


def _has_saved(folder: Path) -> bool:
    """Return whether a run has anything to go on from, or to lose: a checkpoint, readable or not, or its result."""
    return any((folder / "checkpoints").glob("*.pt")) or any((folder / "export").glob("*"))


def read_config(folder: Path) -> Pretrain:
    """Return the configuration of the run in a folder. Raises UsageError when there is none, or it is damaged."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        engine = content.setdefault("engine", {})  # so older runs began, and so they go on:
        engine.setdefault("convolution", "direct")
        engine.setdefault("decoder", "cpu")
        return from_dictionary(Pretrain, content)
    except FileNotFoundError:
        raise UsageError(f"there is no run in {folder} (no config.json)") from None
    except (ValueError, TypeError, AttributeError, UsageError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def write_config(folder: Path, config: Pretrain) -> None:
    """Write config.json."""
    replace_json(folder / "config.json", dataclasses.asdict(replace(config, resume=False, overwrite=False)))


def check_same_mathematics(saved: Pretrain, wanted: Pretrain) -> None:
    """Raise UsageError when a resumed run is asked to compute something else than it began."""
    before, after = flatten(saved), flatten(wanted)
    changed = [
        f"--{name.replace('_', '-')} {after[name]} (the run has {before[name]})"
        for name in before
        if after[name] != before[name] and not _is_free_to_change(name)
    ]
    if changed:
        longer = ""
        began, asked = saved.epochs, wanted.epochs
        if isinstance(began, int) and isinstance(asked, int) and asked > began:  # the rates have come to their end
            start = ("--recipe", wanted.out, "--weights", wanted.out)
            more = ("--start-epoch", str(began), "--epochs", str(asked), "--data", wanted.data, "--out", "FOLDER")
            anew = command_line("pretrain", *start, *more)
            if wanted.backbone == "own":
                same = f"recipe={wanted.out!r}, weights={wanted.out!r}, start_epoch={began}, epochs={asked}"
                anew = f"caco.pretrain(..., backbone=module, {same}) in Python"
            longer = f"; to train a finished run for longer: {anew}"
        raise UsageError(f"--resume cannot change {'; '.join(changed)}; start a new run for that{longer}")


def _is_free_to_change(option: str) -> bool:
    return option in FREE_TO_CHANGE or (option.startswith(FREE_GROUPS) and option not in NOT_FREE)


def is_of_job(folder: Path, job: str) -> bool:
    """Return whether a job (`job_name`) was the last to start the run in a folder, as far as environment.json tells."""
    entries = _environment(folder / "environment.json")
    return not entries or entries[-1].get("job", "") == job


def _environment(path: Path) -> list[dict[str, Any]]:
    """Return the entries of environment.json; none where it is not there yet, or damaged: a record for people."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def write_environment(folder: Path, device: str, processes: int) -> None:
    """Add an entry on this start to environment.json: versions, machine, command, commit of the source."""
    import numpy
    import PIL
    import timm
    import torch
    import torchvision

    import caco

    path = folder / "environment.json"
    entries = _environment(path)
    entries.append(
        {
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": sys.argv,
            "job": job_name(os.environ),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or device,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "caco": caco.__version__,
            "commit": _commit(),
            "packages": {m.__name__: m.__version__ for m in (torch, torchvision, timm, numpy, PIL)},
        }
    )
    replace_json(path, entries)


def _commit() -> str | None:
    """Return the commit of caco's source, "+" behind it when changed since; None outside a checkout."""
    source = Path(__file__).resolve().parents[1]
    if Path(_git(source, "rev-parse", "--show-toplevel")) / "src" / "caco" != source:
        return None  # installed below another project's checkout, whose commit tells nothing of caco
    return _git(source, "describe", "--always", "--dirty=+", "--abbrev=12") or None


def _git(folder: Path, *arguments: str) -> str:
    """Return what git answers in a folder; an empty text where it has no answer, or is not there."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()
