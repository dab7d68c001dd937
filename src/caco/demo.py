"""The demo: a whole run on built-in pictures, judged against raw pixels and an untrained encoder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from caco import commands
from caco.after_training import Knn, Linear, Report
from caco.config import Demo, Pretrain
from caco.files import replace_json
from caco.recipes import find_recipe

TRAIN, TEST = "textures:5000", "textures:2000"


def demo(options: Demo) -> dict[str, Any]:
    """Pre-train by the demo recipe, judge pixels, the untrained and the trained encoder, write the page; print a table.

    Returns the accuracies in percent and the seconds of each part; also in RUN/demo.json.
    """
    began = time.monotonic()
    config = replace(
        find_recipe("demo"), data=TRAIN, val=TEST, out=options.out, seed=options.seed, overwrite=options.overwrite
    )
    print(
        "Ten families of textures, drawn by a generator in random colours, sizes and directions; no labels are trained on."
    )
    commands.pretrain(config)
    trained = time.monotonic()
    rows = {
        "raw pixels": _judge("pixels", config, linear=False),
        "untrained encoder": _judge("random", config),
        "pre-trained encoder": _judge(options.out, config),
    }
    page = commands.report(Report(run=options.out))
    seconds = {"pre-training": round(trained - began, 1), "judging": round(time.monotonic() - trained, 1)}
    print(_table(rows, options.out, seconds, page))
    result = {"seed": options.seed, "results": rows, "seconds": seconds}
    replace_json(Path(options.out) / "demo.json", result)
    return result


def _judge(run: str, config: Pretrain, linear: bool = True) -> dict[str, float]:
    """Return the kNN and (if asked for) linear top-1 accuracy, in percent."""
    options = {"run": run, "data": TRAIN, "val": TEST, "size": config.views.size, "seed": config.seed}
    if run == "random":
        options["backbone"] = config.backbone
    judged = commands.knn(Knn(**options))  # type: ignore[arg-type]
    assert judged is not None
    result = {"knn": round(judged["top1"], 2)}
    if linear:
        judged = commands.linear(Linear(**options, epochs=20))  # type: ignore[arg-type]
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
        f"Look at {page}. Then try your own pictures: caco pretrain --data FOLDER --out runs/first",
    ]
    return "\n".join(lines)
