"""The demo: a whole run on built-in pictures, judged against pixels and an untrained encoder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from caco import commands, judge
from caco.after_training import Knn, Linear, Report
from caco.checks import check
from caco.config import Demo, DistributedOptions, Pretrain
from caco.errors import Interrupted, UsageError, command_line, program
from caco.files import holds_run, replace_json
from caco.options import words
from caco.recipes import find_recipe

TRAIN, TEST = "textures:5000", "textures:2000"


def demo(options: Demo) -> dict[str, Any]:
    """Pre-train by the demo recipe, judge pixels, the untrained and the trained encoder, write the page; print a table.

    Returns the accuracies in percent and the seconds of each part; also in RUN/demo.json.
    """
    if holds_run(Path(options.out)) and not options.overwrite:
        raise UsageError(f"--out {options.out} holds a run; delete it with --overwrite, or choose another folder")
    began = time.monotonic()
    config = replace(
        find_recipe("demo"),
        data=TRAIN,
        val=TEST,
        out=options.out,
        seed=options.seed,
        overwrite=options.overwrite,
        distributed=DistributedOptions(processes=1),  # whose batch any number of GPUs need not divide
    )
    check(config)
    print(
        "Ten families of textures, drawn by a generator in random colours, sizes and directions; no labels are trained on."
    )
    try:
        commands.pretrain(config)
    except Interrupted as stopped:
        given = words(replace(options, overwrite=True), Demo())
        anew = command_line("demo", *(word for option in given for word in option))
        raise Interrupted(f"{stopped} (which only pre-trains; for the demo's table: {anew})") from stopped
    trained = time.monotonic()
    rows = {
        name: _judge(name, run, config)
        for name, run in (
            ("pixels", "pixels"),
            ("untrained encoder", "random"),
            ("pre-trained encoder", options.out),
        )
    }
    page = commands.report(Report(run=options.out))
    seconds = {"pre-training": round(trained - began, 1), "judging": round(time.monotonic() - trained, 1)}
    print(_table(rows, options.out, seconds, page))
    result = {"seed": options.seed, "results": rows, "seconds": seconds}
    replace_json(Path(options.out) / "demo.json", result)
    return result


def _judge(name: str, run: str, config: Pretrain) -> dict[str, float]:
    """Return the kNN and (but for pixels) linear top-1 accuracy, in percent."""
    print(f"{name}:")
    options = {"run": run, "data": TRAIN, "val": TEST, "seed": config.seed}
    if run != config.out:
        options["beside"] = config.out
    judged = judge.knn(Knn(**options))  # type: ignore[arg-type]
    assert judged is not None
    result = {"knn": round(judged["top1"], 2)}
    if run != "pixels":
        judged = judge.linear(Linear(**options, epochs=20))  # type: ignore[arg-type]
        assert judged is not None
        result["linear"] = round(judged["top1"], 2)
    return result


def _table(rows: dict[str, dict[str, float]], out: str, seconds: dict[str, float], page: Path) -> str:
    lines = ["", f"{'top-1 accuracy, %':22}{'kNN':>8}{'linear':>9}"]
    for name, row in rows.items():
        linear = f"{row['linear']:9.1f}" if "linear" in row else f"{'-':>9}"
        lines.append(f"{name:22}{row['knn']:8.1f}{linear}")
    lines += [
        "",
        f"Ten classes: chance is 10 %. Pre-training took {seconds['pre-training']:.0f} s, judging {seconds['judging']:.0f} s.",
        f"Look at {page}. Then try your own pictures: {program()} pretrain --data FOLDER --out runs/first",
    ]
    return "\n".join(lines)
