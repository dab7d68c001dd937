"""How good an encoder is: `caco knn` and `caco linear`, from configuration to result."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from caco.after_training import Knn, Linear
from caco.data.labels import Relabelled, Subset, names_of_several, where_labels_come_from
from caco.data.source import ImageSource
from caco.deliver.judgements import HELD_OUT, check_beside, circumstances, how_to_repeat, keep
from caco.distributed.launch import launch
from caco.distributed.world import World
from caco.errors import UsageError, counted
from caco.evaluate.confidence import bootstrap_interval
from caco.evaluate.encoder import UsableEncoder
from caco.evaluate.features import labels_of
from caco.evaluate.knn import Voting, held_out_split, knn_accuracy
from caco.evaluate.linear import LEARNING_RATES, LinearResult, check_choice, linear_probe
from caco.evaluate.reference_probe import ProbeSettings, train_reference_probe
from caco.files import check_output, replace_file, replace_json
from caco.given import open_encoder, open_images, prepared_as, say_broken
from caco.objects import NO_OBJECTS, Objects
from caco.seen import say_shared


def knn(options: Knn, objects: Objects = NO_OBJECTS) -> dict[str, Any] | None:
    """Judge an encoder by nearest neighbours; print, write --out if given, and return the result (percent).

    Returns None but in the main process.
    """
    _check_result_path(options)
    check_beside(options)
    return launch(_knn, options.distributed, options.device, options, objects)


def _knn(world: World, options: Knn, objects: Objects) -> dict[str, Any] | None:
    encoder, train, val = _prepare(world, options, objects)
    reference, queries = encoder.features(train), encoder.features(val)
    if not world.is_main:
        return None
    say_broken(train, reference.broken)
    say_broken(val, queries.broken)
    results = knn_accuracy(
        reference.vectors.to(world.device),
        labels_of(reference),
        queries.vectors,
        labels_of(queries),
        Voting(options.neighbours, options.temperature),
        classes=len(train.classes),
    )
    rows = [
        {
            "neighbours": result.neighbours,
            "top1": 100 * result.top1,
            "top1_interval": _interval(result.correct, options.seed),
            "top5": 100 * result.top5,
            **({"note": result.note} if result.note else {}),
        }
        for result in results
    ]
    counts = _described(
        options, encoder, len(reference.vectors), len(queries.vectors), reference.broken + queries.broken
    )
    report = {**counts, **rows[0], "temperature": options.temperature, "all": rows}
    for row in rows:
        print(f"kNN ({row['neighbours']} neighbours) {_accuracy_line(row, len(train.classes))}, {_counts_line(report)}")
    report |= circumstances(options, encoder, train)
    return _deliver(report, options, how_to_repeat(options, train, val, objects))


def linear(options: Linear, objects: Objects = NO_OBJECTS) -> dict[str, Any] | None:
    """Judge an encoder by a linear classifier; print, write --out if given, and return the result (percent).

    Returns None but in the main process.
    """
    _check_result_path(options)
    check_beside(options)
    if options.head and Path(options.head).suffix != ".safetensors":
        raise UsageError(f"--head {options.head}: the classifier is written as .safetensors")
    if options.head:
        check_output("--head", Path(options.head), options.overwrite)
    return launch(_linear, options.distributed, options.device, options, objects)


def _linear(world: World, options: Linear, objects: Objects) -> dict[str, Any] | None:
    encoder, train, val = _prepare(world, options, objects)
    probe = _reference_linear if options.protocol == "reference" else _cached_linear
    judged = probe(options, encoder, train, val)
    if judged is None:
        return None
    result, report = judged
    report |= {
        "protocol": options.protocol,
        "top1": 100 * result.top1,
        "top1_interval": _interval(result.correct, options.seed),
        "top5": 100 * result.top5,
        "learning_rate": result.learning_rate,
        "epochs": result.epochs,
        "per_class": {
            name: _number(round(100 * share, 4))
            for name, share in zip(_told_apart(train.classes), result.per_class.tolist(), strict=True)
        },
        "rates_tried": [{name: _number(value) for name, value in vars(trial).items()} for trial in result.trials],
    }
    accuracy = _accuracy_line(report, len(train.classes))
    print(f"linear {accuracy}, {_counts_line(report)}, learning rate {result.learning_rate:g}")
    if options.head:
        head = {"weight": result.weight.contiguous(), "bias": result.bias.contiguous()}
        replace_file(Path(options.head), safetensors.torch.save(head, {"classes": json.dumps(train.classes)}))
        print(f"the classifier is written to {options.head}")
    report |= circumstances(options, encoder, train)
    return _deliver(report, options, how_to_repeat(options, train, val, objects))


def _prepare(world: World, options: Knn | Linear, objects: Objects) -> tuple[UsableEncoder, ImageSource, ImageSource]:
    """Return the encoder, labelled training images and labelled test images in the same classes."""
    train = open_images(options, objects.data, options.data, "train")
    if train.labels is None:
        raise UsageError(f"--data {options.data} has no labels ({where_labels_come_from(train)}); judging needs them")
    val = open_images(options, objects.val, options.val, "val") if options.val else None
    times = options.epochs if isinstance(options, Linear) and options.protocol == "reference" else 1
    images = times * len(train) + (0 if val is None else len(val))
    encoder = open_encoder(world, options, objects.backbone, images)
    if val is not None:
        if world.is_main:
            say_shared(train, val)
        return encoder, train, Relabelled(val, train.classes)
    kept, asked = held_out_split(np.asarray(train.labels), options.held_out, options.seed)
    return encoder, Subset(train, kept), Subset(train, asked)


def _cached_linear(
    options: Linear, encoder: UsableEncoder, train: ImageSource, val: ImageSource
) -> tuple[LinearResult, dict[str, Any]] | None:
    """Return the classifier on features made once, and what was judged (None but in the main process)."""
    rates = LEARNING_RATES if options.lr == "auto" else [options.lr]
    check_choice(torch.from_numpy(np.asarray(train.labels)), rates)  # before the features are made
    reference, queries = encoder.features(train), encoder.features(val)
    if not encoder.world.is_main:
        return None
    say_broken(train, reference.broken)
    say_broken(val, queries.broken)
    result = linear_probe(
        reference.vectors,
        labels_of(reference),
        queries.vectors,
        labels_of(queries),
        classes=len(train.classes),
        learning_rates=rates,
        epochs=options.epochs,
        batch_size=options.probe_batch_size or "auto",
        momentum=options.momentum,
        seed=options.seed,
        device=encoder.world.device,
    )
    return result, _described(
        options, encoder, len(reference.vectors), len(queries.vectors), reference.broken + queries.broken
    )


def _reference_linear(
    options: Linear, encoder: UsableEncoder, train: ImageSource, val: ImageSource
) -> tuple[LinearResult, dict[str, Any]] | None:
    """Return the classifier of the published protocol, and what was judged (None but in the main process)."""
    began = time.monotonic()

    def say(epoch: int, loss: float) -> None:
        seconds = (time.monotonic() - began) / (epoch + 1) * (options.epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{options.epochs}: loss {loss:.4f}, {seconds:,.0f} s left", file=sys.stderr)

    settings = ProbeSettings(
        epochs=options.epochs,
        batch_size=options.probe_batch_size or 4096,
        learning_rate=0.025 if options.lr == "auto" else options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )
    result = train_reference_probe(encoder, train, val, settings, say if encoder.world.is_main else None)
    if not encoder.world.is_main:
        return None
    say_broken(train, result.train_broken)
    say_broken(val, result.val_broken)
    trained_on = len(train) - len(result.train_broken)
    return result.head, _described(
        options, encoder, trained_on, len(result.head.correct), result.train_broken + result.val_broken
    )


def _described(
    options: Knn | Linear, encoder: UsableEncoder, train_images: int, val_images: int, broken: list[tuple[str, str]]
) -> dict[str, Any]:
    return {
        "run": options.run,
        "data": options.data,
        "val": options.val or f"{HELD_OUT}{options.held_out:g}",
        "train_images": train_images,
        "val_images": val_images,
        **prepared_as(encoder),
        "broken": [f"{key}: {reason}" for key, reason in broken],
    }


def _told_apart(classes: Sequence[str]) -> list[str]:
    """Return the names of classes, with the class's number behind each that several have: ImageNet has two cranes."""
    doubled = names_of_several(classes)
    return [f"{name} (class {number})" if name in doubled else name for number, name in enumerate(classes)]


def _number(value: float) -> float | None:
    """Return a number as JSON has it: None for a class without images, or the loss of a head that diverged."""
    return value if math.isfinite(value) else None


def _interval(correct: torch.Tensor, seed: int) -> list[float]:
    return [100 * bound for bound in bootstrap_interval(correct, seed=seed)]


def _accuracy_line(row: dict[str, Any], classes: int) -> str:
    low, high = row["top1_interval"]
    top5 = f", top-5 {row['top5']:.2f} %" if classes > 5 else ""  # of five classes, one of five is always right
    return f"top-1 {row['top1']:.2f} % (95 % interval {low:.2f}-{high:.2f}){top5}"


def _counts_line(report: dict[str, Any]) -> str:
    return f"{counted(report['val_images'], 'image')} judged by {report['train_images']:,}, at {report['size']} px"


def _check_result_path(options: Knn | Linear) -> None:
    if options.out and Path(options.out).suffix != ".json":
        raise UsageError(f"--out {options.out}: the result is written as .json")
    if options.out:
        check_output("--out", Path(options.out), options.overwrite)


def _deliver(report: dict[str, Any], options: Knn | Linear, repeat: dict[str, Any]) -> dict[str, Any]:
    """Write the result where --out says, keep it with its run, and return it. repeat: what only a kept one has."""
    if options.out:
        replace_json(Path(options.out), report)
        print(f"the result is written to {options.out}")
    keep({**report, **repeat}, options)
    return report
