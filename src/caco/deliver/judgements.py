"""What `caco knn` and `caco linear` found out about a run, kept in its folder for its report: `results/*.json`.

One file for each distinct judgement, so that two commands may write at once; the newest of each wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caco.after_training import BASELINES, Judging, Knn, Linear
from caco.data.source import ImageSource
from caco.errors import CacoError
from caco.evaluate.encoder import UsableEncoder
from caco.files import holds_run, replace_json
from caco.objects import NO_OBJECTS, Objects
from caco.options import words
from caco.seen import TrainedOn
from caco.train.run_folder import read_config

FOLDER = "results"

HELD_OUT = "held out: "
"""What the name of --val begins with where a share of --data has its place."""

SETTINGS = {
    "knn": ("neighbours", "temperature"),
    "linear": ("protocol", "epochs", "lr", "probe_batch_size", "momentum", "weight_decay"),
}
"""Options of each judge that its result depends on, besides those of images and encoder."""

SAME = ("judge", "data", "val", "labels", "size", "precision", "seed", "settings")
"""What must be the same in two results for the encoder alone to explain their difference."""


def check_beside(options: Judging) -> None:
    """Raise UsageError when --beside does not name a run."""
    if options.beside:
        read_config(Path(options.beside))


def circumstances(options: Knn | Linear, encoder: UsableEncoder, train: ImageSource) -> dict[str, Any]:
    """Return what accuracies do not say themselves: the judge and its settings, and which encoder it judged."""
    assert encoder.card is not None
    judge = type(options).__name__.lower()
    settings = {name: getattr(options, name) for name in SETTINGS[judge]}
    return {
        "judge": judge,
        "baseline": options.run if options.run in BASELINES and not Path(options.run).exists() else "",
        "backbone": "" if encoder.backbone is None else encoder.card.backbone,
        "step": encoder.card.step,
        "classes": len(train.classes),
        "precision": str(encoder.precision).removeprefix("torch."),
        "seed": options.seed,
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
    }


def how_to_repeat(options: Knn | Linear, train: ImageSource, val: ImageSource, objects: Objects) -> dict[str, Any]:
    """Return what a kept result has besides: by which labels, and how another encoder is judged in the same way."""
    return {
        "labels": [_fingerprint(train), _fingerprint(val)],
        "options": _typed(options) if objects == NO_OBJECTS else None,
    }


def _typed(options: Knn | Linear) -> list[str]:
    """Return the options with which another encoder is judged in the same way, as typed; images are named apart."""
    apart = replace(options, run="", weights="", out="", backbone="", data="", val="", beside="")
    apart = replace(apart, head="") if isinstance(apart, Linear) else apart
    return [word for option in words(apart, type(options)()) for word in option]


def _fingerprint(source: ImageSource) -> str:
    """Return a checksum of the labels: arrays all have one name, and a folder may change."""
    return f"{zlib.crc32(np.ascontiguousarray(source.labels, np.int64).tobytes()):08x}"


def place(images: str) -> str:
    """Return the name of images, with the whole path where it is one: the same from every folder."""
    return os.path.abspath(images) if os.path.exists(images) else images


def keep(result: Mapping[str, Any], options: Knn | Linear) -> None:
    """Keep a result in the folder of the run that was judged, and of the one that it stands beside.

    A folder that refuses is named on stderr: the result is printed all the same.
    """
    judged = Path(options.run)
    folders = [judged] if holds_run(judged) else []
    beside = Path(options.beside)
    if options.beside and not any(os.path.samefile(beside, folder) for folder in folders):
        folders.append(beside)
    for folder in folders:
        kept = {"own": folder is judged, **result}
        kept |= {name: place(kept[name]) for name in ("data", "val")}
        who = [] if kept["own"] else [kept["baseline"] or os.path.abspath(kept["run"]), kept["backbone"]]
        identity = json.dumps([who, *(kept[name] for name in SAME)], sort_keys=True)
        name = f"{kept['judge']}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"
        try:
            replace_json(folder / FOLDER / name, kept)
        except CacoError as error:
            print(f"not kept for the report of {folder}: {error}", file=sys.stderr)
        else:
            print(f"kept for the report of {folder}")


@dataclass(frozen=True)
class Judged:
    """One encoder's result, in percent."""

    name: str
    own: bool
    """Of the run itself."""
    baseline: str
    """random, pixels, or "" for neither."""
    step: int
    top1: float
    interval: tuple[float, float]
    top5: float


@dataclass(frozen=True)
class Comparison:
    """Results that only the encoder tells apart: the run's own first, then the best."""

    judge: str
    how: str
    """The judge and its settings, in words."""
    data: str
    val: str
    train_images: int
    val_images: int
    size: int
    classes: int
    seen: bool | None
    """Whether the run was trained on any of the judged images; None where that cannot be told."""
    judged: tuple[Judged, ...]
    options: tuple[str, ...] | None
    """With which another encoder is judged in the same way, as typed; None where that takes Python."""

    @property
    def missing(self) -> list[str]:
        """The baselines that have not been judged. (A linear classifier on pixels has too many weights to be one.)"""
        judged = {judged.baseline for judged in self.judged}
        return [name for name in (BASELINES if self.judge == "knn" else ("random",)) if name not in judged]

    @property
    def own(self) -> Judged | None:
        """The result of the run itself, if it was judged."""
        return next((judged for judged in self.judged if judged.own), None)


def read_comparisons(folder: Path) -> list[Comparison]:
    """Return all results kept in a run's folder, those that can be compared together; kNN first, the run's own first.

    A file that cannot be read, or is none of ours, is left out. Raises UsageError when the folder holds no run.
    """
    trained_on = TrainedOn(read_config(folder).data)
    groups: dict[str, list[tuple[Judged, Comparison]]] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            group = json.dumps([record[name] for name in SAME], sort_keys=True)
            groups.setdefault(group, []).append((_judged(record), _comparison(record)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    found = []
    for members in groups.values():
        members.sort(key=lambda member: (not member[0].own, -member[0].top1))
        first = members[0][1]
        images = (first.data, "train") if first.val.startswith(HELD_OUT) else (first.val, "val")
        found.append(replace(first, seen=trained_on.has(*images), judged=tuple(judged for judged, _ in members)))
    return sorted(found, key=lambda comparison: (comparison.judge, comparison.own is None, comparison.data))


def _comparison(record: Mapping[str, Any]) -> Comparison:
    """Return what all results that can be compared with this one have in common."""
    return Comparison(
        judge=record["judge"],
        how=_how(record),
        data=record["data"],
        val=record["val"],
        train_images=record["train_images"],
        val_images=record["val_images"],
        size=record["size"],
        classes=record["classes"],
        seen=None,
        judged=(),
        options=_options(record),
    )


def _options(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    if record["options"] is None:
        return None
    val = [] if record["val"].startswith(HELD_OUT) else ["--val", record["val"]]
    return ("--data", record["data"], *val, *record["options"])


def _judged(record: Mapping[str, Any]) -> Judged:
    low, high = record["top1_interval"]
    names = {"random": f"untrained {record['backbone']}", "pixels": "pixels"}
    name = "this run" if record["own"] else names.get(record["baseline"], record["run"])
    return Judged(
        name=name,
        own=record["own"],
        baseline=record["baseline"],
        step=record["step"],
        top1=float(record["top1"]),
        interval=(float(low), float(high)),
        top5=float(record["top5"]),
    )


def _how(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    if record["judge"] == "knn":
        how = f"kNN, {record['neighbours']} neighbours, temperature {settings['temperature']:g}"
    else:
        rate = "rate chosen on a part of train" if settings["lr"] == "auto" else f"rate {settings['lr']:g}"
        rate = "published protocol" if settings["protocol"] == "reference" else rate
        how = f"Linear classifier, {record['epochs']} epochs, {rate}"
    precision = record["precision"].replace("bfloat", "bf").replace("float", "fp")
    return f"{how}, {precision}, seed {record['seed']}"
