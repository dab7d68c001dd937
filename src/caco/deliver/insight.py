"""What a trained encoder and its bank make of the images: neighbours, slots, a map. No page yet, only findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from caco.backbone import evaluation_mode
from caco.data.augment import centre_view, normalise
from caco.data.decode import Pixels
from caco.data.render import copy_to
from caco.data.source import ImageSource
from caco.data.threads import batched, map_in_order
from caco.deliver.trained import Trained
from caco.errors import CacoError
from caco.evaluate.confidence import mean_is_above_zero
from caco.model import embed
from caco.views import Preparation

THUMBNAIL = 112
PIXEL_SIDE = 32
BATCH = 128
LEAST_MEMBERS = 3
"""With fewer images a slot says little of its class."""


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """N images, and what the encoder makes of them; all on the CPU."""

    keys: list[str]
    classes: tuple[str, ...]
    labels: Tensor | None
    """int64 [N]; None without labels."""
    thumbnails: list[Pixels]
    """The centre views, at a size to look at."""
    pixels: Tensor
    """float32 [N, P], unit rows: small centre views, normalised (as `caco knn pixels`). What no encoder would give."""
    features: Tensor
    """float32 [N, F], unit rows: of the backbone."""
    untrained: Tensor | None
    """float32 [N, F], unit rows: of the untrained backbone; None without labels, for only they tell which is better."""
    embeddings: Tensor | None
    """float32 [N, D], unit rows: of the key encoder, which chooses the positives."""


def sample(count: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` of the numbers 0 … count − 1, in order, at random; the same ones every time.

    Not every so-manyth: where labels come in turns, that would leave out some.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:most]).astype(np.int64)


@torch.no_grad()
def encode_images(
    source: ImageSource, trained: Trained, preparation: Preparation, *, images: int, device: torch.device, workers: int
) -> EncodedImages:
    """Show at most `images` images of the source, to the networks.

    Each through the validation transform, as for every evaluation. Broken images are left out. Raises CacoError when
    none is good, and when features are not finite.
    """

    def pictures(index: int) -> tuple[Pixels, Pixels, Pixels]:
        return _pictures(source.load(index), preparation)

    taken: list[int] = []
    broken: list[tuple[str, str]] = []
    thumbnails: list[Pixels] = []
    pixels, features, embeddings, others = [], [], [], []
    backbone, key_encoder = trained.backbone.to(device), trained.key_encoder
    untrained = trained.untrained.to(device)
    key_network = nn.Identity() if key_encoder is None else key_encoder.to(device)
    chosen = [int(index) for index in sample(len(source), images)]
    with evaluation_mode(backbone), evaluation_mode(key_network), evaluation_mode(untrained):
        for indices, batch in batched(map_in_order(pictures, chosen, broken, 2 * BATCH, workers), BATCH):
            taken += indices
            centres, shown, small = zip(*batch, strict=True)
            thumbnails += shown
            pixels.append(normalise(torch.from_numpy(np.stack(small)), preparation.mean, preparation.std).flatten(1))
            views = copy_to(device, torch.from_numpy(np.stack(centres)))
            ready = normalise(views, preparation.mean, preparation.std)
            features.append(F.normalize(backbone(ready).float(), dim=1).cpu())
            if source.labels is not None:
                others.append(F.normalize(untrained(ready).float(), dim=1).cpu())
            if key_encoder is not None:
                embeddings.append(embed(key_encoder, ready).float().cpu())
    if not taken:
        raise CacoError(f"none of the {len(broken):,} images looked at can be read")
    return EncodedImages(
        keys=[source.key(index) for index in taken],
        classes=source.classes,
        labels=None if source.labels is None else torch.from_numpy(np.asarray(source.labels, np.int64)[taken]),
        thumbnails=thumbnails,
        pixels=F.normalize(torch.cat(pixels), dim=1),
        features=_finite(features),
        untrained=_finite(others) if others else None,
        embeddings=_finite(embeddings) if embeddings else None,
    )


def _pictures(image: Pixels, preparation: Preparation) -> tuple[Pixels, Pixels, Pixels]:
    """Return an image's centre view: for the encoder, at a size to look at, and very small."""
    size, resize = preparation.size, preparation.resize
    centre = centre_view(image, resize, size)
    side = max(8, min(THUMBNAIL, min(image.shape[:2]) * size // resize))
    thumbnail = centre_view(image, max(side, round(side * resize / size)), side)
    small = Image.fromarray(centre).resize((min(size, PIXEL_SIDE),) * 2, Image.Resampling.BOX)
    return centre, thumbnail, np.asarray(small)


def _finite(batches: list[Tensor]) -> Tensor:
    """Return the vectors of all batches. Raises CacoError when some are not finite."""
    vectors = torch.cat(batches)
    if not torch.isfinite(vectors).all():
        raise CacoError("the encoder gives features that are not finite")
    return vectors


def nearest_others(
    vectors: Float[Tensor, "N F"], count: int, queries: Sequence[int] | None = None
) -> Int[Tensor, "Q n"]:
    """Return the `count` (at most N − 1) nearest other rows by cosine, for unit rows: nearest first."""
    asked = torch.arange(len(vectors)) if queries is None else torch.tensor(list(queries), dtype=torch.int64)
    count = min(count, len(vectors) - 1)
    found = []
    for part in asked.split(1024):
        cosines = vectors[part] @ vectors.T
        cosines[torch.arange(len(part)), part] = -torch.inf
        found.append(cosines.topk(count, dim=1).indices)
    return torch.cat(found) if found else asked.new_empty(0, count)


def choose_queries(labels: Int[Tensor, " N"] | None, images: int, most: int) -> list[int]:
    """Return which images ask for neighbours: the first of each class (at most `most`), else any."""
    if labels is None:
        return [int(index) for index in sample(images, most)]
    present = torch.unique(labels)
    classes = present[torch.from_numpy(sample(len(present), most))]
    return [int((labels == number).nonzero()[0, 0]) for number in classes]


@dataclass(frozen=True)
class Agreement:
    """Share (0-1) of the nearest others that are of an image's own class, over all images looked at."""

    encoder: float
    untrained: float
    pixels: float
    chance: float
    above_untrained: bool
    """Whether the encoder's share is above that by more than the choice of the images explains; likewise:"""
    above_pixels: bool
    neighbours: int
    images: int


def neighbour_agreement(encoded: EncodedImages, neighbours: int) -> Agreement | None:
    """Return how often neighbours agree in class; None without labels or with fewer than two images."""
    if encoded.labels is None or encoded.untrained is None or len(encoded.labels) < 2:
        return None
    labels, number = encoded.labels, len(encoded.labels)

    def shares(vectors: Tensor) -> Float[Tensor, " N"]:
        return (labels[nearest_others(vectors, neighbours)] == labels[:, None]).float().mean(dim=1)

    ours, untrained, pixels = (shares(v) for v in (encoded.features, encoded.untrained, encoded.pixels))
    counts = torch.bincount(labels).double()
    return Agreement(
        encoder=float(ours.mean()),
        untrained=float(untrained.mean()),
        pixels=float(pixels.mean()),
        chance=float((counts * (counts - 1)).sum() / (number * (number - 1))),
        above_untrained=mean_is_above_zero(ours - untrained),
        above_pixels=mean_is_above_zero(ours - pixels),
        neighbours=min(neighbours, number - 1),
        images=number,
    )


@dataclass(frozen=True)
class Slot:
    """One slot of the bank and the images that choose it as their positive, nearest first."""

    number: int
    members: list[int]
    majority: int | None
    """The most frequent label of the members; None without labels."""
    share: float
    """Share (0-1) of the members with that label; 0 without labels."""


def slots_by_use(
    embeddings: Float[Tensor, "N D"], slots: Float[Tensor, "K D"], labels: Int[Tensor, " N"] | None
) -> list[Slot]:
    """Return every slot that some image is nearest to, most images first (unit rows in both)."""
    cosines, nearest = (
        torch.cat(values)
        for values in zip(*((part @ slots.T).max(dim=1) for part in embeddings.split(256)), strict=True)
    )
    order = torch.argsort(cosines, descending=True, stable=True)
    members: dict[int, list[int]] = {}
    for image, slot in zip(order.tolist(), nearest[order].tolist(), strict=True):
        members.setdefault(slot, []).append(image)
    found = []
    for number, images in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        counts = None if labels is None else torch.bincount(labels[images])
        majority = None if counts is None else int(counts.argmax())
        share = 0.0 if counts is None else float(counts.max()) / len(images)
        found.append(Slot(number, images, majority, share))
    return found


def shuffled(labels: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return the labels dealt anew to the images, always in the same way: what chance gives."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def purity(slots: Sequence[Slot]) -> float | None:
    """Return the share of images of their slot's most frequent class, over slots of at least LEAST_MEMBERS images.

    None without labels or such slots.
    """
    judged = [slot for slot in slots if len(slot.members) >= LEAST_MEMBERS and slot.majority is not None]
    images = sum(len(slot.members) for slot in judged)
    return sum(slot.share * len(slot.members) for slot in judged) / images if images else None


def plane(vectors: Float[Tensor, "N F"]) -> tuple[Float[Tensor, "N 2"], float]:
    """Return the vectors' two principal components and the share (0-1) of the variance that these hold.

    The same for the same vectors: the sketch's random numbers are seeded, signs are fixed.
    """
    centred = vectors - vectors.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, directions = torch.pca_lowrank(centred, q=min(6, *centred.shape), center=False, niter=4)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    points = F.pad(centred @ (directions * largest.sign()), (0, 2))[:, :2]
    total = float(centred.square().sum())
    return points, float(singular[:2].square().sum()) / total if total > 0 else 0.0
