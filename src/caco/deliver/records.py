"""What a run has written down, read back: for people to look at, nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caco.config import Pretrain
from caco.deliver.charts import Series
from caco.evaluate.confidence import STANDARD_ERRORS

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the records of a .jsonl file; none when it is not there. A line that is not whole is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def curve(records: Sequence[Record], kind: str, value: str, name: str, *, by: str = "step", scale: float = 1) -> Series:
    """Return one value of all records of a kind ("" for records without kinds) as a curve; epochs count from 1.

    Of several records at one place (a resumed run) the last counts.
    """
    points: dict[float, float] = {}
    for record in records:
        if record.get("kind", "") == kind and by in record and value in record:
            points[record[by] + (1 if by == "epoch" else 0)] = scale * record[value]
    return Series(name, list(points), list(points.values()))


@dataclass(frozen=True)
class Trend:
    """How a loss went: the means of the first and of the last third of its records."""

    first: float
    last: float
    fell: bool
    """By more than the scatter of the records explains (95 %)."""


def loss_trend(losses: Sequence[float]) -> Trend | None:
    """Return how a loss went; None for fewer than six records: a third needs two, or its scatter cannot be told."""
    third = len(losses) // 3
    if third < 2:
        return None
    first, last = np.array(losses[:third]), np.array(losses[-third:])
    scatter = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third)
    return Trend(float(first.mean()), float(last.mean()), bool(first.mean() - last.mean() > STANDARD_ERRORS * scatter))


@dataclass(frozen=True)
class RunSummary:
    """The run in a few numbers, as far as it got; None: not measured (yet)."""

    step: int
    steps: int | None
    """Of the whole run; None before the first epoch has ended."""
    epoch: int
    """Epochs completed."""
    epochs: int | str
    loss: float | None
    positive_probability: float | None
    feature_spread: float | None
    slots_used: int | None
    """In the last complete epoch."""
    slot_perplexity: float | None
    choices: int | None
    """Positives chosen in that epoch."""
    knn: float | None
    """Top-1, percent."""
    best_knn: float | None
    first_knn: float | None
    """Of the first check; None with fewer than two."""
    queries: int | None
    """Images that the last check judged."""
    trend: Trend | None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch == self.epochs


def summarise(records: Sequence[Record], config: Pretrain) -> RunSummary:
    """Return the run in a few numbers, from the records of metrics.jsonl."""
    last = {record["kind"]: record for record in records if "kind" in record and "step" in record}
    train, epoch, knn = last.get("train", {}), last.get("epoch", {}), last.get("knn", {})
    done = epoch["epoch"] + 1 if epoch else 0
    per_epoch = epoch["step"] // done if done else None
    top1 = curve(records, "knn", "top1", "kNN", by="epoch").y
    return RunSummary(
        step=max(train.get("step", 0), epoch.get("step", 0)),
        steps=per_epoch * config.epochs if per_epoch and isinstance(config.epochs, int) else None,
        epoch=done,
        epochs=config.epochs,
        loss=train.get("loss"),
        positive_probability=train.get("positive_probability"),
        feature_spread=train.get("feature_spread"),
        slots_used=epoch.get("slots_used"),
        slot_perplexity=epoch.get("slot_perplexity"),
        choices=2 * config.batch_size * per_epoch if per_epoch else None,
        knn=knn.get("top1"),
        best_knn=max(top1) if top1 else None,
        first_knn=top1[0] if len(top1) > 1 else None,
        queries=knn.get("queries"),
        trend=loss_trend(curve(records, "train", "loss", "loss").y),
    )


def uninformed_loss(config: Pretrain) -> float:
    """Return the loss of an encoder that cannot tell the slots apart: the weights of all pairs sum to 2."""
    return 2 * math.log(config.bank_size)
