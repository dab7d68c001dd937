"""The sections of a run's page: findings in, HTML out. Each says in a plain sentence when it has nothing to show."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from caco.after_training import BASELINES
from caco.config import Pretrain
from caco.data.source import ImageSource
from caco.deliver import page
from caco.deliver.charts import Level, Series, line_chart, percent
from caco.deliver.galleries import NEIGHBOURS, Missing
from caco.deliver.insight import EncodedImages, neighbour_agreement
from caco.deliver.judgements import HELD_OUT, Comparison
from caco.deliver.next_steps import commands_to_compare
from caco.deliver.records import Record, RunSummary, curve, uninformed_loss
from caco.deliver.verdict import verdict_of
from caco.errors import UsageError, counted
from caco.evaluate.health import LOW_SPREAD, rank_me
from caco.options import flatten
from caco.recipes import find_recipe

BROKEN = 200
"""Broken images that are listed, at most."""

NO_PART_OF_A_RECIPE = ("data", "val", "out", "recipe", "device", "workers", "resume", "overwrite", "download")

RESULTS = (
    "What caco knn and caco linear have found so far. Intervals are of the choice of the judged images, not of the "
    "training's own chance."
)

CITATION = """\
@article{wang2022caco,
  title   = {CaCo: Both Positive and Negative Samples are Directly Learnable via
             Cooperative-adversarial Contrastive Learning},
  author  = {Wang, Xiao and Huang, Yuhang and Zeng, Dan and Qi, Guo-Jun},
  journal = {arXiv preprint arXiv:2203.14370},
  year    = {2022}
}"""


def header(
    name: str,
    config: Pretrain,
    summary: RunSummary,
    source: ImageSource | Missing,
    encoded: EncodedImages | Missing,
    comparisons: Sequence[Comparison],
) -> str:
    """Return name, verdict and the run's numbers."""
    rank = dimensions = None
    if isinstance(encoded, EncodedImages) and encoded.embeddings is not None:
        rank, dimensions = float(rank_me(encoded.embeddings)), encoded.embeddings.shape[1]
    agreement = neighbour_agreement(encoded, NEIGHBOURS) if isinstance(encoded, EncodedImages) else None
    verdict = verdict_of(
        summary, config, rank=rank, dimensions=dimensions, agreement=agreement, comparisons=comparisons
    )
    facts = [
        ("Epochs", f"{summary.epoch:,}", f"of {summary.epochs}"),
        ("Steps", f"{summary.step:,}", f"{config.batch_size:,} images each"),
    ]
    if isinstance(source, ImageSource):
        classes = f"{len(source.classes):,} classes, not trained on" if source.classes else "no labels"
        facts.insert(0, ("Images", f"{len(source):,}", classes))
    if summary.loss is not None:
        facts.append(("Loss", f"{summary.loss:.2f}", f"by guessing {uninformed_loss(config):.2f}"))
    if summary.positive_probability is not None:
        chance = f"by guessing {percent(1 / config.bank_size)}"
        facts.append(("Positive probability", percent(summary.positive_probability), chance))
    if summary.slots_used is not None:
        facts.append(("Slots used", f"{summary.slots_used:,}", f"of {config.bank_size:,}, last epoch"))
    if rank is not None:
        facts.append(("Effective dimensions", f"{rank:.0f}", f"of {dimensions:,} (RankMe)"))
    if summary.knn is not None and summary.best_knn is not None:
        facts.append(("kNN top-1", f"{summary.knn:.1f} %", f"best {summary.best_knn:.1f} %"))
    state = "finished" if summary.finished else f"not finished: {summary.step:,} of {summary.steps or '?'} steps"
    what = f"{config.backbone} on {config.data}, recipe {config.recipe} · {state}"
    reasons = " ".join(verdict.reasons)
    return (
        f'<header><p class="overline">CaCo pre-training</p><h1>{escape(name)}</h1><p class="quiet">{escape(what)}</p>'
        f'<div class="verdict" style="--mood:var(--{verdict.mood})"><p><strong>{escape(verdict.headline)}</strong> '
        f"{escape(reasons)}</p></div>{page.tiles(facts)}</header>"
    )


def results(
    run: str, config: Pretrain, summary: RunSummary, source: ImageSource | Missing, comparisons: Sequence[Comparison]
) -> str:
    """Return what caco knn and caco linear have found, and the commands for what has not been judged yet."""
    name, title = "results", "How good it is"
    tables = "".join(_comparison_table(comparison, summary) for comparison in comparisons)
    commands, hint = _commands_to_compare(run, config, source, comparisons)
    lead = RESULTS if comparisons else "It has not been judged by labels yet."
    if hint:
        lead += f" How much of a score is owed to the training, only the same judgement of others tells{hint}"
    shown = page.preformatted("\n".join(commands)) if commands else ""
    return page.section(name, title, lead, tables, shown)


def _commands_to_compare(
    run: str, config: Pretrain, source: ImageSource | Missing, comparisons: Sequence[Comparison]
) -> tuple[list[str], str]:
    """Return the commands that are missing to a comparison with the baselines, and what is said before them."""
    own = [comparison for comparison in comparisons if comparison.own]
    if not own:
        if isinstance(source, ImageSource) and source.labels is not None:
            judged, wanted = ["--data", config.data, *(["--val", config.val] if config.val else [])], "--val FOLDER"
        else:
            judged, wanted = ["--data", config.val or "FOLDER"], "FOLDER"
        hint = ":" if config.val else f", by labelled images that it has not seen ({wanted}: a folder for each class):"
        start = [config.weights] if config.weights and not config.weights.startswith("timm:") else []
        return commands_to_compare(run, judged, [*BASELINES, *start]), hint
    missing = [comparison for comparison in own if comparison.missing]
    commands = [
        command
        for comparison in missing
        if comparison.options is not None
        for command in commands_to_compare(
            run, comparison.options, comparison.missing, judge=comparison.judge, itself=False
        )
    ]
    if missing and not commands:
        return [], ': in Python the same calls with "random" and "pixels" in place of the run, and beside=run.'
    return commands, ":" if missing else ""


def _comparison_table(comparison: Comparison, summary: RunSummary) -> str:
    rows = []
    for judged in comparison.judged:
        low, high = judged.interval
        name = judged.name
        if judged.own and judged.step != summary.step:
            name += f" at step {judged.step:,} (since then it has gone on)"
        top5 = f"{judged.top5:.1f} %" if comparison.classes > 5 else "–"  # of five classes, one of five is always right
        rows.append((name, f"{judged.top1:.1f} %", f"{low:.1f}–{high:.1f}", top5))
    images, others = comparison.val, f"{comparison.train_images:,} of {comparison.data}"
    if comparison.val.startswith(HELD_OUT):
        images, others = f"{comparison.data}, {comparison.val}", f"the other {comparison.train_images:,}"
    seen = {True: "; the run was trained on these images", None: "; the run may have been trained on these images"}
    detail = (
        f"{counted(comparison.val_images, 'image')} of {images}, judged by {others}; {comparison.classes:,} classes, "
        f"at {comparison.size} px{seen.get(comparison.seen, '')}"
    )
    table = page.result_table(("", "top-1", "95 % interval", "top-5"), rows, comparison.own is not None)
    return f'<div class="row"><h3>{escape(comparison.how)}<small>{escape(detail)}</small></h3>{table}</div>'


def curves(records: Sequence[Record], speed: Sequence[Record], config: Pretrain) -> str:
    """Return the charts of what was recorded."""
    title = "How it went"
    drawn = [chart for chart in _charts(records, speed, config) if chart]
    if not drawn:
        return page.section("curves", title, "Nothing has been recorded yet.")
    lead = "From metrics.jsonl, the run's own record. Point at a curve to read its values."
    if not any(record.get("kind") == "knn" for record in records):
        lead += " Nearest neighbours were not judged during the training: that takes labels and --monitor.knn-epochs above 0."
    return page.section("curves", title, lead, f'<div class="charts">{"".join(drawn)}</div>')


def _charts(records: Sequence[Record], speed: Sequence[Record], config: Pretrain) -> list[str]:
    """Return all charts in the page's order; "" for each of which nothing was recorded."""
    return [
        _chart(
            "Loss",
            [curve(records, "train", "loss", "loss")],
            levels=[Level("guessing: 2 ln K", uninformed_loss(config))],
        ),
        _chart(
            "Agreement of two views",
            [
                curve(records, "train", "positive_probability", "positive probability", scale=100),
                curve(records, "train", "hit_rate", "hit rate", scale=100),
            ],
            unit=" %",
            ceiling=100,
        ),
        _chart(
            "Use of the bank",
            [
                curve(records, "epoch", "slots_used", "slots used", by="epoch"),
                curve(records, "epoch", "slot_perplexity", "in even use", by="epoch"),
            ],
            x_label="epoch",
            ceiling=config.bank_size,
            levels=[Level("all slots", config.bank_size)],
        ),
        _chart(
            "Spread of the embeddings",
            [curve(records, "train", "feature_spread", "spread")],
            ceiling=1,
            levels=[Level("too narrow below", LOW_SPREAD)],
        ),
        _chart(
            "Nearest-neighbour accuracy",
            [
                curve(records, "knn", "top1", "top-1", by="epoch"),
                curve(records, "knn", "top5", "top-5", by="epoch"),
            ],
            unit=" %",
            x_label="epoch",
            ceiling=100,
        ),
        _chart(
            "Learning rates",
            [curve(records, "train", "lr", "encoder"), curve(records, "train", "bank_lr", "bank")],
        ),
        _chart("Speed", [curve(speed, "", "images_per_second", "images/s")]),
        _chart("Time spent waiting for data", [curve(speed, "", "data_wait", "of all time", scale=100)], unit=" %"),
    ]


def _chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "step",
    ceiling: float | None = None,
    levels: Sequence[Level] = (),
) -> str:
    chart = line_chart(series, title=title, x_label=x_label, unit=unit, floor=0, ceiling=ceiling, levels=levels)
    return page.chart_figure(title, chart, series, unit)


def configuration(config: Pretrain) -> str:
    """Return every option; those that are not the recipe's are marked."""
    try:
        recipe = flatten(find_recipe(config.recipe))
    except UsageError:  # a run of another version
        recipe = {}
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for option, value in flatten(config).items():
        group = option.rpartition(".")[0]
        usual = recipe.get(option, value)
        own = option not in NO_PART_OF_A_RECIPE and group != "distributed"
        decided = usual == "auto" and (group == "engine" or option == "precision")  # by the run, as the recipe wants it
        remark = f"recipe: {_shown(usual)}" if own and usual != value and not decided else ""
        groups.setdefault(group, []).append((f"--{option.replace('_', '-')}", _shown(value), remark))
    blocks = "".join(
        f'<div><p class="overline">{escape(group or "run")}</p>{page.table(rows)}</div>'
        for group, rows in groups.items()
    )
    lead = f"Every option. Those in colour are not as in the recipe {config.recipe}."
    if not recipe:
        lead = f"Every option. This version of caco has no recipe {config.recipe} to compare them with."
    return page.section("configuration", "Configuration", lead, f'<div class="options">{blocks}</div>')


def environment(folder: Path) -> str:
    """Return where and how the run was started, each time."""
    name, title = "environment", "Command and environment"
    try:
        starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        last = {**starts[-1]}
        commands = "\n".join(f"# {start['started']}\n{shlex.join(start['command'])}" for start in starts)
    except (OSError, ValueError, LookupError, TypeError):
        return page.section(name, title, "The folder has no (readable) environment.json.")
    packages = ", ".join(f"{package} {version}" for package, version in last.pop("packages", {}).items())
    shown = ("command", "started")
    rows = [(key, str(value), "") for key, value in last.items() if key not in shown and value is not None]
    times = "once" if len(starts) == 1 else f"{len(starts)} times (stopped and resumed)"
    body = page.preformatted(commands) + page.table([*rows, ("packages", packages, "")])
    return page.section(name, title, f"The run was started {times}.", body)


def broken_images(folder: Path) -> str:
    """Return the list of images that could not be used; "" when there were none."""
    path = folder / "skipped.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if not lines:
        return ""
    rows = [(*line.partition("\t")[::2], "") for line in lines[:BROKEN]]
    lead = f"{len(lines):,} images" if len(lines) > 1 else "One image"
    lead += f" could not be read and {'were' if len(lines) > 1 else 'was'} replaced by the next good image."
    lead += f" The first {BROKEN} are:" if len(lines) > BROKEN else ""
    return page.section("broken", "Broken images", lead, page.table(rows))


def citation() -> str:
    """Return how to cite the method."""
    footer = "<footer>Made by caco report from the run's folder and its images; nothing was sent anywhere.</footer>"
    lead = "If this run becomes part of published work, cite the method:"
    return page.section("cite", "How to cite", lead, page.preformatted(CITATION), footer)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "–"
