"""What each command does: configuration in, parts put together, result out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caco.config import Embed, Evaluation, Knn, Linear, Pretrain
from caco.data.labels import Relabelled, Subset
from caco.data.source import ImageSource, open_source
from caco.deliver.embed import check_features_path, write_features
from caco.errors import UsageError
from caco.evaluate.confidence import bootstrap_interval
from caco.evaluate.encoder import UsableEncoder, load_encoder
from caco.evaluate.features import Features
from caco.evaluate.knn import held_out_split, knn_accuracy
from caco.evaluate.linear import LEARNING_RATES, LinearResult, linear_probe
from caco.evaluate.reference_probe import train_reference_probe
from caco.files import replace_json
from caco.train import pretrain as pretraining
from caco.train.distributed import choose_device, choose_precision


def pretrain(options: Pretrain, backbone: nn.Module | None = None) -> Path:
    """Pre-train, say what to do next, and return the path of the finished backbone."""
    path = pretraining.run(options, backbone)
    data = f"--data {options.data}" + (f" --val {options.val}" if options.val else "")
    print(f"The backbone is {path}. Next:")
    for command in (f"knn {options.out} {data}", f"linear {options.out} {data}"):
        print(f"  caco {command}")
    print(f"  caco embed {options.out} --data {options.data} --out features.npz")
    return path


def knn(options: Knn) -> dict[str, Any]:
    """Judge an encoder by nearest neighbours; print, write --out if given, and return the result (percent)."""
    _check_result_path(options.out)
    encoder, train, val = _prepare(options, options.val, options.held_out)
    reference, queries = _labelled(encoder, train), _labelled(encoder, val)
    results = knn_accuracy(
        reference.vectors.to(encoder.device),
        reference.labels,
        queries.vectors,
        queries.labels,
        neighbours=options.neighbours,
        classes=len(train.classes),
        temperature=options.temperature,
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
    report = {**_described(options, reference, queries), **rows[0], "temperature": options.temperature, "all": rows}
    for row in rows:
        print(f"kNN ({row['neighbours']} neighbours) {_accuracy_line(row)}, {_counts_line(report)}")
    return _deliver(report, options.out)


def linear(options: Linear) -> dict[str, Any]:
    """Judge an encoder by a linear classifier; print, write --out if given, and return the result (percent)."""
    _check_result_path(options.out)
    if options.epochs < 1:
        raise UsageError(f"--epochs {options.epochs}: must be at least 1")
    encoder, train, val = _prepare(options, options.val, options.held_out)
    if options.protocol == "reference":
        result, report = _reference_linear(options, encoder, train, val)
    else:
        reference, queries = _labelled(encoder, train), _labelled(encoder, val)
        result = linear_probe(
            reference.vectors,
            reference.labels,
            queries.vectors,
            queries.labels,
            classes=len(train.classes),
            learning_rates=LEARNING_RATES if options.lr == "auto" else [options.lr],
            epochs=options.epochs,
            batch_size=options.probe_batch_size or "auto",
            seed=options.seed,
            device=encoder.device,
        )
        report = _described(options, reference, queries)
    report |= {
        "protocol": options.protocol,
        "top1": 100 * result.top1,
        "top1_interval": _interval(result.correct, options.seed),
        "top5": 100 * result.top5,
        "learning_rate": result.learning_rate,
        "epochs": result.epochs,
        "per_class": dict(zip(train.classes, [round(100 * share, 2) for share in result.per_class.tolist()], strict=True)),
        "rates_tried": [vars(trial) for trial in result.trials],
    }
    print(f"linear {_accuracy_line(report)}, {_counts_line(report)}, learning rate {result.learning_rate:g}")
    return _deliver(report, options.out)


def embed(options: Embed) -> Path:
    """Write the features of every image to --out and return its path."""
    path = check_features_path(options.out)
    source = _open(options, options.data, "train")
    encoder = _encoder(options)
    features = encoder.features(source)
    _say_broken(source, features)
    if options.normalise:
        features.vectors.div_(features.vectors.norm(dim=1, keepdim=True).clamp_min(1e-12))
    write_features(path, features, source.classes)
    print(f"{len(features.vectors):,} vectors of {features.vectors.shape[1]:,} numbers are in {path}")
    return path


def _encoder(options: Evaluation) -> UsableEncoder:
    device = choose_device(options.device)
    backbone, card = load_encoder(options)
    return UsableEncoder(
        backbone=backbone,
        card=card,
        device=device,
        precision=choose_precision(options.precision, device),
        workers=pretraining.worker_count(options.workers),
        batch_size=options.batch_size,
    )


def _prepare(options: Evaluation, val_data: str, held_out: float) -> tuple[UsableEncoder, ImageSource, ImageSource]:
    """Return the encoder, labelled training images and labelled test images in the same classes."""
    train = _open(options, options.data, "train")
    if train.labels is None:
        raise UsageError(f"--data {options.data} has no labels (class folders, or a label column); judging needs them")
    encoder = _encoder(options)
    if val_data:
        return encoder, train, Relabelled(_open(options, val_data, "val"), train.classes)
    kept, asked = held_out_split(np.asarray(train.labels), held_out, options.seed)
    return encoder, Subset(train, kept), Subset(train, asked)


def _open(options: Evaluation, data: str, split: str) -> ImageSource:
    if not data:
        raise UsageError("--data is missing: name a folder of images (or textures, for built-in pictures)")
    return open_source(data, split=split, download=options.download)


def _labelled(encoder: UsableEncoder, source: ImageSource) -> Features:
    features = encoder.features(source)
    _say_broken(source, features)
    return features


def _reference_linear(
    options: Linear, encoder: UsableEncoder, train: ImageSource, val: ImageSource
) -> tuple[LinearResult, dict[str, Any]]:
    if encoder.backbone is None:
        raise UsageError("the reference protocol judges encoders, not pixels; use --protocol cached")
    began = time.monotonic()

    def say(epoch: int, loss: float) -> None:
        seconds = (time.monotonic() - began) / (epoch + 1) * (options.epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{options.epochs}: loss {loss:.4f}, {seconds:,.0f} s left", file=sys.stderr)

    card = encoder.card
    result = train_reference_probe(
        encoder.backbone,
        train,
        val,
        device=encoder.device,
        workers=encoder.workers,
        size=card.size,
        resize=card.resize,
        mean=card.mean,
        std=card.std,
        epochs=options.epochs,
        batch_size=options.probe_batch_size or 4096,
        learning_rate=0.025 if options.lr == "auto" else options.lr,
        seed=options.seed,
        precision="bf16" if encoder.precision == torch.bfloat16 else "fp32",
        on_epoch=say,
    )
    counts = {"train_images": len(train), "val_images": len(result.correct)}
    return result, {"run": options.run, "data": options.data, "val": options.val, **counts}


def _described(options: Knn | Linear, train: Features, val: Features) -> dict[str, Any]:
    broken = [f"{key}: {reason}" for key, reason in [*train.broken, *val.broken]]
    counts = {"train_images": len(train.vectors), "val_images": len(val.vectors), "broken": broken}
    return {"run": options.run, "data": options.data, "val": options.val or f"held out: {options.held_out:g}", **counts}


def _interval(correct: torch.Tensor, seed: int) -> list[float]:
    return [100 * bound for bound in bootstrap_interval(correct, seed=seed)]


def _accuracy_line(row: dict[str, Any]) -> str:
    low, high = row["top1_interval"]
    return f"top-1 {row['top1']:.2f} % (95 % interval {low:.2f}-{high:.2f}), top-5 {row['top5']:.2f} %"


def _counts_line(report: dict[str, Any]) -> str:
    return f"{report['val_images']:,} images judged by {report['train_images']:,}"


def _check_result_path(path: str) -> None:
    if path and Path(path).suffix != ".json":
        raise UsageError(f"--out {path}: the result is written as .json")


def _deliver(report: dict[str, Any], path: str) -> dict[str, Any]:
    if path:
        replace_json(Path(path), report)
        print(f"written to {path}")
    return report


def _say_broken(source: ImageSource, features: Features) -> None:
    if features.broken:
        key, reason = features.broken[0]
        print(
            f"{len(features.broken):,} of {len(source):,} images were skipped, the first: {key} ({reason})",
            file=sys.stderr,
        )
