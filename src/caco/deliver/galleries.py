"""The sections of a run's page that show pictures: views, neighbours, slots, and the map of the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from caco.config import Pretrain
from caco.data.source import ImageSource
from caco.deliver import page
from caco.deliver.charts import Series, line_chart, percent, point_map
from caco.deliver.examples import ExampleViews, example_views
from caco.deliver.insight import (
    EncodedImages,
    Slot,
    choose_queries,
    nearest_others,
    neighbour_agreement,
    plane,
    purity,
    sample,
    shuffled,
    slots_by_use,
)
from caco.deliver.pictures import Row, data_uri, shrunk
from caco.deliver.trained import Trained
from caco.errors import counted

EXAMPLES, QUERIES, NEIGHBOURS, SLOTS, MEMBERS, MAP_POINTS = 6, 12, 7, 24, 7, 1500


@dataclass(frozen=True)
class Missing:
    """Something the page could not get, and why."""

    why: str

    def __str__(self) -> str:
        return self.why if self.why.endswith((".", "?")) else self.why + "."


@dataclass(frozen=True)
class Gallery:
    """A section of pictures, and the same rows for a picture file; no rows when there is nothing to show."""

    title: str
    html: str
    rows: Sequence[Row] = ()


def views(source: ImageSource | Missing, config: Pretrain) -> str:
    """Return some images beside the random views that the first epoch made of them."""
    name, title = "views", "What the encoder sees"
    if isinstance(source, Missing):
        return page.section(name, title, f"No images to show: {source}")
    examples = example_views(source, config, EXAMPLES)
    if not examples:
        return page.section(name, title, "No images to show: none of those tried can be read.")
    lead = (
        "The random views that the first epoch draws of these images. The frames on the original are the crops; the "
        "encoder learns that all views of an image belong to the slot that one of them has found."
    )
    cells = "".join(map(_example, examples))
    return page.section(name, title, lead, f'<div class="examples">{cells}</div>')


def _example(example: ExampleViews) -> str:
    height, width = example.image.shape[:2]
    frames = "".join(
        f'<rect class="c{min(number, 1)}" x="{left}" y="{top}" width="{box_width}" height="{box_height}"/>'
        for number, (left, top, box_width, box_height) in enumerate(example.boxes[:2])
    )
    many = " many" if len(example.views) > 2 else ""
    pictures = "".join(
        f'<img class="view{many}" style="--dot:var(--c{min(number, 1)})" src="{data_uri(shrunk(view, 160))}" '
        f'alt="view {number + 1}" title="{escape(changes)}">'
        for number, (view, changes) in enumerate(zip(example.views, example.changes, strict=True))
    )
    label = escape(example.key)
    return (
        f'<div class="example"><div class="original"><img src="{data_uri(shrunk(example.image, 220))}" alt="{label}" '
        f'title="{label}"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{frames}</svg></div>'
        f"{pictures}</div>"
    )


def neighbours(encoded: EncodedImages | Missing) -> Gallery:
    """Return some images, each followed by those that the encoder finds most like it."""
    name, title = "neighbours", "Nearest neighbours"
    if isinstance(encoded, Missing):
        return Gallery(title, page.section(name, title, f"No neighbours to show: {encoded}"))
    queries = choose_queries(encoded.labels, len(encoded.keys), QUERIES)
    rows, names = [], []
    for query, others in zip(queries, nearest_others(encoded.features, NEIGHBOURS, queries).tolist(), strict=True):
        shown = [query, *others]
        cosines = (encoded.features[others] @ encoded.features[query]).tolist()
        agrees = [None if encoded.labels is None else bool(encoded.labels[o] == encoded.labels[query]) for o in others]
        heading = encoded.keys[query] if encoded.labels is None else encoded.classes[int(encoded.labels[query])]
        detail = "" if encoded.labels is None else f"{sum(map(bool, agrees))} of {len(others)} of its class"
        rows.append(Row(heading, detail, [encoded.thumbnails[image] for image in shown], [None, *agrees]))
        answers = [f"{encoded.keys[image]}, cosine {c:.2f}" for image, c in zip(others, cosines, strict=True)]
        names.append([encoded.keys[query], *answers])
    lead = (
        "The first picture of each row asks; then come the nearest of the other "
        f"{len(encoded.keys) - 1:,} images looked at, by the cosine of the backbone's features."
    )
    agreement = neighbour_agreement(encoded, NEIGHBOURS)
    if agreement is not None:
        lead += (
            f" A green line marks the same class. Of the {agreement.neighbours} nearest neighbours of all images, "
            f"{percent(agreement.encoder)} are of the same class; with an untrained encoder "
            f"{percent(agreement.untrained)}, by pixels {percent(agreement.pixels)}, by chance "
            f"{percent(agreement.chance)}. Those that ask are the first of their class, not chosen by hand."
        )
    return Gallery(title, page.section(name, title, lead, page.picture_rows(rows, names, first_asks=True)), rows)


def slots(encoded: EncodedImages | Missing, trained: Trained | Missing) -> Gallery:
    """Return the most used slots of the bank with the images nearest to each."""
    name, title = "slots", "What each slot of the bank attracts"
    if isinstance(encoded, Missing):
        return Gallery(title, page.section(name, title, f"No slots to show: {encoded}"))
    if isinstance(trained, Missing) or trained.slots is None or encoded.embeddings is None:
        why = "No slots to show: the run has no checkpoint, and the finished backbone comes without the bank."
        return Gallery(title, page.section(name, title, why))
    used = slots_by_use(encoded.embeddings, trained.slots, encoded.labels)
    shown = used[:SLOTS]
    rows = [_slot_row(slot, encoded) for slot in shown]
    names = [[encoded.keys[image] for image in slot.members[:MEMBERS]] for slot in shown]
    lead = (
        "In CaCo the positives and negatives are learned: they are the slots of the bank. Every image chooses the slot "
        f"nearest to its key embedding. The {len(encoded.keys):,} images looked at choose {len(used):,} of "
        f"{len(trained.slots):,} slots; the {len(shown)} most chosen are shown, each with the images nearest to it."
    )
    pure = purity(used)
    if pure is not None and encoded.labels is not None:
        chance = purity(slots_by_use(encoded.embeddings, trained.slots, shuffled(encoded.labels)))
        lead += (
            " A green line marks the slot's most frequent class; it has "
            f"{percent(pure)} of the images (in slots of three or more; {percent(chance or 0)} if classes are dealt at "
            "random). No class was ever trained on."
        )
    counts = Series("images", range(1, len(used) + 1), [len(slot.members) for slot in used])
    chart = line_chart([counts], title="Images for each slot", x_label="slot, by use", floor=0)
    figure = page.chart_figure("Images for each slot", chart, [])
    return Gallery(title, page.section(name, title, lead, page.picture_rows(rows, names), beside=figure), rows)


def _slot_row(slot: Slot, encoded: EncodedImages) -> Row:
    images = slot.members[:MEMBERS]
    detail = counted(len(slot.members), "image")
    agrees: list[bool | None] = [None] * len(images)
    if slot.majority is not None and encoded.labels is not None:
        detail += f", {percent(slot.share)} {encoded.classes[slot.majority]}"
        agrees = [bool(encoded.labels[image] == slot.majority) for image in images]
    return Row(f"Slot {slot.number:,}", detail, [encoded.thumbnails[image] for image in images], agrees)


def feature_map(encoded: EncodedImages | Missing) -> str:
    """Return the features in the plane of their two principal components."""
    name, title = "map", "A map of the features"
    if isinstance(encoded, Missing):
        return page.section(name, title, f"No map to show: {encoded}")
    points, share = plane(encoded.features)
    shown = sample(len(points), MAP_POINTS)
    places = [(float(x), float(y)) for x, y in points[shown].tolist()]
    groups = None if encoded.labels is None else encoded.labels[shown].tolist()
    lead = (
        f"{len(places):,} images in the plane of the two directions in which the backbone's features differ most. These "
        f"hold {percent(share)} of all variance, so much of what the encoder knows is not to be seen here."
    )
    if groups is not None:
        lead += " Point at a class to see it alone."
    drawing = point_map(places, groups, encoded.classes, title=title)
    return page.section(name, title, lead, f'<div class="map-holder">{drawing}</div>')
