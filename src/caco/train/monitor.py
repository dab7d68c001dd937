"""The kNN check while training: how well the labels of neighbours agree. The trainer only records what it returns."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from caco.config import MonitorOptions, Views
from caco.data.decode import BrokenImage
from caco.data.labels import Relabelled
from caco.data.source import ImageSource
from caco.distributed.world import World
from caco.errors import UsageError
from caco.evaluate.centre_views import CentreViews
from caco.evaluate.encoder import UsableEncoder
from caco.evaluate.features import Features, NoneReadable, labels_of
from caco.evaluate.knn import Voting, first_share_of_each_class, held_out_split, knn_accuracy
from caco.memory import free_memory
from caco.seen import TRAINED_ON, say_shared
from caco.views import Preparation

VOTE_TEMPERATURE = 0.2
KEPT_SHARE = 1 / 32
"""Share of the free memory that the views of the reference, and those of the queries, may take to be kept for the next check."""


@dataclass(frozen=True)
class KnnMonitor:
    """Which images refer, which ask, and how both are prepared.

    Features are the backbone's pooled output, eval mode, validation transform (published `ops/knn_monitor.py`); but
    every image counts once, and a failure is an error, not an accuracy of 0.
    """

    reference: ImageSource
    reference_indices: np.ndarray
    queries: ImageSource | None
    """None: the reference itself, each image leaving itself out."""
    query_indices: np.ndarray | None
    neighbours: int
    preparation: Preparation
    world: World
    precision: torch.dtype
    workers: int
    views: dict[str, CentreViews] = field(default_factory=dict)
    """What each check sees of "reference" and "queries", in this process."""

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """Return {"top1", "top5"} in percent, and the numbers of {"queries", "reference"} images."""
        encoder = UsableEncoder(backbone, self.preparation, self.world, self.precision, self.workers)

        def features(what: str, source: ImageSource, indices: np.ndarray | None) -> Features:
            def views_of(part: np.ndarray) -> CentreViews:
                if what not in self.views:
                    most = int(KEPT_SHARE * free_memory(torch.device("cpu"))) // self.world.local_size
                    self.views[what] = encoder.views(source, part, most)
                return self.views[what]

            return encoder.features(source, indices, views_of)

        reference = features("reference", self.reference, self.reference_indices)
        queries = reference if self.queries is None else features("queries", self.queries, self.query_indices)
        (result,) = knn_accuracy(
            reference.vectors.to(self.world.device),
            labels_of(reference),
            queries.vectors,
            labels_of(queries),
            Voting([self.neighbours], VOTE_TEMPERATURE, leave_one_out=self.queries is None),
            classes=len(self.reference.classes),
        )
        counts = {"queries": len(queries.vectors), "reference": len(reference.vectors)}
        return {"top1": 100 * result.top1, "top5": 100 * result.top5, **counts}


def knn_is_due(epoch: int, epochs: int, options: MonitorOptions) -> bool:
    """Return whether the kNN check follows this epoch (counted from 0)."""
    done = epoch + 1
    return done <= options.knn_first_epochs or done % options.knn_epochs == 0 or done == epochs


def create_monitor(
    source: ImageSource,
    val: ImageSource | None,
    options: MonitorOptions,
    views: Views,
    seed: int,
    world: World,
    precision: torch.dtype,
    workers: int,
) -> KnnMonitor | None:
    """Return the check for these images, or None when there are no labels to check with (or it is switched off).

    With --val: its images ask, the training images refer (if these have no labels: the other --val images). Without:
    a fixed share of the training images asks the rest. (They are trained on without labels like all others.)
    """
    if options.knn_epochs <= 0:
        return None
    common = (options.knn_neighbours, views.preparation(), world, precision, workers)
    if source.labels is None:
        if val is None or val.labels is None:
            return None
        if world.is_main:
            say_shared(source, val, TRAINED_ON)
        return KnnMonitor(val, np.arange(len(val)), None, None, *common)
    if val is not None and val.labels is not None:
        if world.is_main:
            say_shared(source, val)
        reference = first_share_of_each_class(source.labels, options.knn_share)
        return KnnMonitor(source, reference, Relabelled(val, source.classes), None, *common)
    if np.bincount(np.asarray(source.labels)).max() < 2:  # folders in folders, an image in each: no classes
        if world.is_main:
            print(
                "no kNN check while training: every class has only one image, so none can be held out; name labelled "
                "images with --val",
                file=sys.stderr,
            )
        return None
    kept, held_out = held_out_split(source.labels, options.held_out, seed)
    reference = kept[first_share_of_each_class(np.asarray(source.labels)[kept], options.knn_share)]
    return KnnMonitor(source, reference, source, held_out, *common)


def check_readable(val: ImageSource) -> None:
    """Raise UsageError when not one of the images of --val can be read: the first check may be hours away."""
    broken = []
    for index in range(len(val)):
        try:
            val.load(index)
        except BrokenImage as error:
            broken.append((error.key, error.reason))
        else:
            return
    none = NoneReadable(val.name, broken)
    raise UsageError(f"--val: {none}. Name other labelled images, or add --monitor.knn-epochs 0 (no kNN checks)")
