"""What a run has written down, read back: for people to look at, nothing is computed anew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco.config import Pretrain
from caco.deliver.charts import Series, percent
from caco.deliver.insight import Agreement
from caco.evaluate.health import Finding, verdict

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
    top1 = [record["top1"] for record in records if record.get("kind") == "knn"]
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
    )


@dataclass(frozen=True)
class Judgement:
    """How the run is, in plain words."""

    mood: str
    """good, warning, bad, or unknown."""
    headline: str
    reasons: tuple[str, ...]


def verdict_of(
    summary: RunSummary,
    config: Pretrain,
    rank: float | None = None,
    dimensions: int | None = None,
    agreement: Agreement | None = None,
) -> Judgement:
    """Return the verdict of `caco.evaluate.health` on what was measured, and whether raw pixels would do as well.

    rank, dimensions: RankMe of the embeddings. agreement: of neighbours in class, where there are labels.
    """
    if summary.feature_spread is None:
        return Judgement("unknown", "No training step has been recorded yet.", ())
    findings: tuple[Finding, ...] = verdict(
        slots=config.bank_size,
        used=summary.slots_used,
        perplexity=summary.slot_perplexity,
        choices=summary.choices,
        spread=summary.feature_spread,
        rank=rank,
        dimensions=dimensions,
    )
    wrong = [str(finding) for finding in findings]
    if agreement is not None and agreement.encoder <= agreement.pixels:
        wrong.append(
            f"nearest neighbours are of the same class in {percent(agreement.encoder)} of cases, by raw pixels in "
            f"{percent(agreement.pixels)}; {'train longer' if not wrong else 'mend that first'}"
        )
    if wrong:
        mood = "bad" if any(finding.collapsed for finding in findings) else "warning"
        headline = "This run has failed." if mood == "bad" else "This run could do better."
        return Judgement(mood, headline, tuple(map(_sentence, wrong)))
    reasons = [f"the embeddings are well spread ({summary.feature_spread:.2f} of 1)"]
    if summary.slots_used is not None:
        reasons.append(f"{summary.slots_used:,} of {config.bank_size:,} slots were chosen in the last epoch")
    if rank is not None and dimensions is not None:
        reasons.append(f"the embeddings use about {rank:.0f} of {dimensions:,} dimensions (RankMe)")
    return Judgement("good", "Healthy.", (_sentence("; ".join(reasons)),))


def uninformed_loss(config: Pretrain) -> float:
    """Return the loss of an encoder that cannot tell the slots apart: the weights of all pairs sum to 2."""
    return 2 * math.log(config.bank_size)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
