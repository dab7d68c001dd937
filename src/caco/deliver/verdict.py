"""How a run is, in plain words: what is known, and no more. That nothing is wrong does not say that it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caco.config import Pretrain
from caco.deliver.charts import percent
from caco.deliver.insight import Agreement
from caco.deliver.judgements import Comparison
from caco.deliver.records import RunSummary, uninformed_loss
from caco.errors import counted
from caco.evaluate.confidence import is_above
from caco.evaluate.health import EARLY, Finding, faults
from caco.seen import TrainedOn
from caco.train.step import remarks_on_rates

SEEN = "on the images it was trained on"
PERHAPS_SEEN = "on images it may have been trained on"
OTHERS = "whether that holds for others, only labelled images that it has not seen tell"


FEW_STEPS = 300
"""Steps below which a run cannot be expected to have learnt (on 1,962 photos kNN was far above untrained after 300)."""


@dataclass(frozen=True)
class Verdict:
    """How the run is, in plain words."""

    mood: str
    """good, warning, bad, or unknown."""
    headline: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """What labels show of the encoder, against one without training."""

    mood: str
    headline: str
    said: str


def verdict_of(
    summary: RunSummary,
    config: Pretrain,
    *,
    rank: float | None = None,
    dimensions: int | None = None,
    agreement: Agreement | None = None,
    comparisons: Sequence[Comparison] = (),
) -> Verdict:
    """Return the verdict: what is wrong by `caco.evaluate.health`, else what labels show, else what the loss does.

    rank, dimensions: RankMe of the embeddings. agreement: of neighbours in class, where there are labels. comparisons:
    with baselines, where they were judged.
    """
    if summary.feature_spread is None:
        return Verdict("unknown", "No training step has been recorded yet.", ())
    findings = _findings(summary, config, rank, dimensions)
    evidence = _evidence(summary, config, agreement, comparisons)
    so_far: tuple[str, ...] = () if summary.finished else (f"{summary.epoch:,} of {summary.epochs} epochs are done",)
    if findings:
        mood = "bad" if any(finding.collapsed for finding in findings) else "warning"
        headline = "This run has failed." if mood == "bad" else "This run could do better."
        told = [*map(str, findings), *([evidence.headline.removesuffix("."), evidence.said] if evidence else [])]
        return _verdict(mood, headline, *so_far, *told)
    if evidence is not None:
        if config.weights and evidence.mood != "warning":
            so_far += (f"it began from {config.weights}, whose part in this only tells when judged beside it",)
        remarks = _remarks(summary, config) if evidence.mood != "good" else ()
        return _verdict(evidence.mood, evidence.headline, *so_far, evidence.said, *remarks, *_signs(summary, config))
    return _by_loss(summary, config, so_far)


def _findings(summary: RunSummary, config: Pretrain, rank: float | None, dimensions: int | None) -> tuple[Finding, ...]:
    """Return what is wrong; nothing before EARLY steps of its own, which those before --start-epoch are not."""
    per_epoch = summary.steps // config.epochs if summary.steps and isinstance(config.epochs, int) else 0
    if summary.step - config.start_epoch * per_epoch < EARLY:
        return ()
    return faults(
        slots=config.bank_size,
        used=summary.slots_used,
        perplexity=summary.slot_perplexity,
        choices=summary.choices,
        spread=summary.feature_spread,
        rank=rank,
        dimensions=dimensions,
    )


def _evidence(
    summary: RunSummary, config: Pretrain, agreement: Agreement | None, comparisons: Sequence[Comparison]
) -> Evidence | None:
    """Return the best evidence there is; None without any.

    Images that the run was trained on come last. An encoder sorts those better than others: after 2 epochs of 200 photos
    29 % of their neighbours were of their class (untrained 18 %), while of 200 photos it had not seen kNN got 26 % right
    (untrained 24 %).
    """
    unseen = [comparison for comparison in comparisons if comparison.seen is False]
    others = [comparison for comparison in comparisons if comparison.seen is not False]
    checked_on = _said_of(_is_val_seen(summary, config))
    rising = _rising(summary, checked_on)
    return (
        _compared(summary, unseen, "")
        or (rising if not checked_on else None)
        or _compared(summary, others, _said_of(all(comparison.seen for comparison in others) or None))
        or _agreed(agreement)
        or rising
    )


def _is_val_seen(summary: RunSummary, config: Pretrain) -> bool | None:
    """Return whether the images that ask in the kNN checks are trained on, too: as `Comparison.seen` of those judged."""
    if not config.val:  # a share of the training images
        return True
    return TrainedOn(config.data).has(config.val, "val") if summary.first_knn is not None else None


def _said_of(seen: bool | None) -> str:
    """Return what is said of images by whether they have been trained on; "" where they have not."""
    return {True: SEEN, None: PERHAPS_SEEN, False: ""}[seen]


def _compared(summary: RunSummary, comparisons: Sequence[Comparison], on: str) -> Evidence | None:
    """Return what the judgements with an untrained encoder beside them show; None without any of the run as it is now.

    on: what is said of their images (`_said_of`).
    """
    said, worst = [], 2
    for comparison in comparisons:
        own = comparison.own
        others = [judged for judged in comparison.judged if judged.baseline]
        if own is None or own.step != summary.step or not any(judged.baseline == "random" for judged in others):
            continue
        images = comparison.val_images
        above = {
            other.baseline: is_above(own.top1 / 100, images, other.top1 / 100, images)
            for other in sorted(others, key=lambda judged: judged.top1)  # of two untrained ones the better counts
        }
        judge = "nearest neighbours" if comparison.judge == "knn" else "linear classifier"
        values = ", ".join(f"{other.name} {other.top1:.1f} %" for other in others)
        said.append(f"{judge}: {own.top1:.1f} % of {counted(images, 'image')} right; {values}")
        worst = min(worst, _rank(above["random"], above.get("pixels", True)))
    return _against_baselines(worst, "; ".join(said), on) if said else None


def _agreed(agreement: Agreement | None) -> Evidence | None:
    """Return what the classes of neighbours show, over the images that the report has looked at."""
    if agreement is None:
        return None
    said = (
        f"nearest neighbours are of the same class in {percent(agreement.encoder)} of cases, with an untrained encoder in "
        f"{percent(agreement.untrained)}, by pixels in {percent(agreement.pixels)} "
        f"({counted(agreement.images, 'image')})"
    )
    return _against_baselines(_rank(agreement.above_untrained, agreement.above_pixels), said, SEEN)


def _rank(above_untrained: bool, above_pixels: bool) -> int:
    return 0 if not above_untrained else 1 if not above_pixels else 2


def _against_baselines(rank: int, said: str, on: str) -> Evidence:
    """rank: 0 when not better than an untrained encoder, 1 than pixels, 2 better than both, beyond chance."""
    if rank == 2 and on:
        return Evidence("unknown", f"Better than without training, {on}.", f"{said}; {OTHERS}")
    headline = (
        "No better than an untrained encoder, as far as these images tell.",
        "Better than an untrained encoder, but no better than pixels.",
        "It has learnt.",
    )[rank]
    return Evidence("good" if rank == 2 else "warning", headline, f"{said}, {on}" if on else said)


def _rising(summary: RunSummary, on: str) -> Evidence | None:
    """Return what the kNN checks during training show, against the first of them; None when they show nothing.

    Not against chance: an untrained encoder is far above it (28.7 % of 30 classes in docs/results.md).
    """
    first, last, queries = summary.first_knn, summary.knn, summary.queries
    if first is None or last is None or not queries:
        return None
    change = _checks(summary)
    if is_above(last / 100, queries, first / 100, queries):
        if on:
            return Evidence("unknown", f"It has become better, {on}.", f"{change}; {OTHERS}")
        return Evidence("good", "It has become better.", f"{change}; how much better than untrained, is not judged yet")
    if is_above(first / 100, queries, last / 100, queries):
        return Evidence("warning", "It has become worse.", change)
    return None


def _checks(summary: RunSummary) -> str:
    assert summary.queries is not None
    images = counted(summary.queries, "image")
    return f"at the first check kNN was {summary.first_knn:.1f} %, at the last {summary.knn:.1f} %, of {images}"


def _by_loss(summary: RunSummary, config: Pretrain, so_far: tuple[str, ...]) -> Verdict:
    """Return the verdict where no label tells. A loss that does not fall is no sign of learning; one that falls, no proof.

    (The bank learns, too: with it a loss falls while the encoder stays as it is, or rises while it becomes better.)
    """
    trend, guessing = summary.trend, uninformed_loss(config)
    unknown = "whether the features are worth more than those of an untrained encoder, only labelled images tell"
    remarks = tuple(_remarks(summary, config))
    if summary.loss is not None and summary.loss >= guessing:
        loss = f"the loss is {summary.loss:.2f}, and guessing gives {guessing:.2f}: it cannot tell the slots apart"
        return _verdict("warning", "No sign that it has learnt.", *so_far, loss, *remarks)
    if trend is None:
        told = "there are too few records of the loss to see where it goes"
        return _verdict("unknown", "Too short to tell.", *so_far, told, *remarks, unknown)
    if not trend.fell:
        told = (
            f"the loss did not fall by more than its records scatter: {_in_thirds(trend.first, trend.last, guessing)}"
        )
        return _verdict("warning", "No sign that it has learnt.", *so_far, told, *remarks, unknown)
    has_checks = summary.first_knn is not None and summary.queries
    even = [f"{_checks(summary)}: no change that they can show"] if has_checks else []
    return _verdict("unknown", "No sign of collapse.", *so_far, *even, *_signs(summary, config), *remarks, unknown)


def _remarks(summary: RunSummary, config: Pretrain) -> Iterator[str]:
    """Yield what may be the reason that a run has learnt little."""
    if summary.finished and summary.step < FEW_STEPS:
        yield (
            f"it took {counted(summary.step, 'step')} only; some hundreds were needed on small sets of photos "
            "(docs/results.md): give it more --epochs"
        )
    if config.epochs != "auto":
        yield from remarks_on_rates(config)


def _in_thirds(first: float, last: float, guessing: float) -> str:
    return f"{first:.2f} in the first third of the records, {last:.2f} in the last (by guessing {guessing:.2f})"


def _signs(summary: RunSummary, config: Pretrain) -> Iterator[str]:
    """Yield what speaks against a collapse."""
    if (trend := summary.trend) is not None and trend.fell:
        yield f"the loss fell: {_in_thirds(trend.first, trend.last, uninformed_loss(config))}"
    yield f"the embeddings are well spread ({summary.feature_spread:.2f} of 1)"
    if summary.slots_used is not None:
        yield f"{summary.slots_used:,} of {config.bank_size:,} slots were chosen in the last epoch"


def _verdict(mood: str, headline: str, *reasons: str) -> Verdict:
    return Verdict(mood, headline, tuple(text[:1].upper() + text[1:] + "." for text in reasons))
