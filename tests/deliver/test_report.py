"""The page of a real, tiny run: every section is there, missing pieces are said, and names cannot break the page."""

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import caco
from caco.config import Pretrain
from caco.data.augment import draw_parameters, render_views
from caco.data.source import open_source
from caco.deliver import charts, insight, records
from caco.deliver.charts import Axis, Level, Series, line_chart, point_map, round_range, thinned, ticks
from caco.deliver.examples import example_views
from caco.deliver.insight import choose_queries, nearest_others, plane, purity, sample, slots_by_use
from caco.deliver.pictures import Row, data_uri, gallery_picture
from caco.deliver.trained import load_trained
from caco.errors import UsageError
from caco.train.run_folder import read_config
from caco.views import Preparation

SECTIONS = ["results", "curves", "views", "neighbours", "slots", "map", "configuration", "environment", "cite"]
NASTY = "<b>&'x.jpg"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of noisy pictures, one with a name full of HTML, one broken."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(24):
        path = folder / ("bright" if number % 2 else "dark") / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        low = 120 if number % 2 else 0
        Image.fromarray(generator.integers(low, low + 100, (20 + number % 5, 24, 3), dtype=np.uint8)).save(path)
    (folder / "bright" / "001.jpg").rename(folder / "bright" / NASTY)
    (folder / "dark" / "006.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a <run>"
    caco.pretrain(
        photos,
        out,
        backbone="test_resnet",
        epochs=2,
        batch_size=8,
        bank_size=16,
        device="cpu",
        workers=1,
        views={"size": 16, "evaluation_resize": 18},
        bank={"warm_start_steps": 2},
        encoder={"projector": 16, "embedding": 8},
        monitor={"log_steps": 1, "knn_epochs": 1},
    )
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to take pieces away from."""
    return shutil.copytree(finished, tmp_path / finished.name)


@pytest.fixture(scope="module")
def page(finished):
    path = caco.report(finished, device="cpu")
    assert path == finished / "report.html"
    return path.read_text(encoding="utf-8")


def test_names_need_not_be_utf8(run, photos, tmp_path):
    renamed = shutil.copytree(photos, tmp_path / "photos")
    for path in [*renamed.glob("*/*.jpg")]:
        path.rename(path.with_name(f"caf\udce9 {path.name}"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(renamed)}))
    (run / "index.npz").unlink()
    assert r"caf\udce9 " in caco.report(run, device="cpu").read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects ids and tags; every opened tag must be closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def part(page, name):
    """Return the HTML of one section."""
    return re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)[0]


def test_every_section_is_there_and_the_page_needs_nothing_else(page):
    checker = Checker(page)
    assert [value for name, value in checker.attributes if name == "id"] == [
        *SECTIONS[:8],
        "broken",
        "cite",
    ]
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    addresses = [value for name, value in checker.attributes if name in ("src", "href")]
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page


def test_header_tells_the_run(page, finished):
    header = re.search(r"<header>.*?</header>", page, re.DOTALL)[0]
    last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    loss = next(record["loss"] for record in reversed(last) if record["kind"] == "train")
    knn = next(record["top1"] for record in reversed(last) if record["kind"] == "knn")
    assert f"<dt>Loss</dt><dd>{loss:.2f}<" in header
    assert f"<dt>kNN top-1</dt><dd>{knn:.1f} %<" in header
    assert "<dt>Images</dt><dd>24<small>2 classes, not trained on<" in header
    assert "<dt>Steps</dt><dd>6<" in header
    assert "a &lt;run&gt;" in header
    assert "test_resnet" in header
    assert "finished" in header
    assert "not finished" not in header


def test_sections_hold_what_they_say(page, finished):
    assert part(page, "curves").count('<svg class="chart"') == 8
    views = part(page, "views")
    assert views.count('class="original"') in (5, 6)  # the broken image may be among those tried
    assert views.count('class="view"') == 2 * views.count('class="original"')
    assert part(page, "neighbours").count('class="row"') == 2  # one of each class
    slots = part(page, "slots")
    counts = [int(count) for count in re.findall(r"<small>(\d+) images?, \d+ % ", slots)]
    assert sum(counts) == 23  # each good image is in one slot; there are at most 16
    assert counts == sorted(counts, reverse=True)
    assert part(page, "map").count("<circle") == 23 + 2  # the legend has two
    assert "dark/006.jpg" in part(page, "broken")
    assert "2203.14370" in part(page, "cite")
    options = part(page, "configuration")
    assert '<tr class="changed"><td>--backbone</td><td>test_resnet <small>recipe: resnet18</small>' in options
    assert "<tr><td>--lr</td><td>0.24</td>" in options
    assert "<tr><td>--engine.decoder</td><td>cpu</td>" in options  # decided by the run, as the recipe wants it
    assert "<tr><td>--distributed.processes</td>" in options  # of the machine
    assert "torch" in part(page, "environment")


def test_names_of_files_cannot_break_the_page(page):
    assert "<b>" not in page
    assert "bright/&lt;b&gt;&amp;&#x27;x.jpg" in page


def test_gallery_picture_of_the_run(page, finished):
    with Image.open(finished / "gallery.png") as picture:
        assert picture.width > 300
    assert (finished / "gallery.png").stat().st_size < 300_000


def test_the_same_run_gives_the_same_page(page, finished):
    assert caco.report(finished, device="cpu").read_text(encoding="utf-8") == page


def test_at_most_so_many_images_are_looked_at(run):
    page = caco.report(run, device="cpu", images=6).read_text(encoding="utf-8")
    assert part(page, "map").count("<circle") in (5 + 2, 6 + 2)
    with pytest.raises(UsageError, match="--images 1"):
        caco.report(run, images=1)


def test_a_run_of_metrics_alone(run, capsys):
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "export")
    for name in ("environment.json", "speed.jsonl", "skipped.txt"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if json.loads(line)["kind"] != "knn"][:-1]  # the last epoch has not ended
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')  # killed while writing
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    Checker(page)
    told = "the page is without pictures, neighbours and slots: the run has written no checkpoint yet"
    assert told in capsys.readouterr().err
    for name in ("neighbours", "slots", "map"):
        assert "the run has written no checkpoint yet" in part(page, name)
    assert part(page, "curves").count('<svg class="chart"') == 5
    assert "Nearest neighbours were not judged during the training" in part(page, "curves")
    assert "kNN top-1" not in page
    assert "not finished: 6 of 6 steps" in page
    assert 'id="broken"' not in page
    assert part(page, "views").count('class="view"') >= 10


def test_a_run_that_has_only_begun(run):
    for name in ("checkpoints", "export"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    (run / "speed.jsonl").unlink()
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    assert "No training step has been recorded yet." in page
    assert "Nothing has been recorded yet." in part(page, "curves")


def test_a_finished_backbone_without_checkpoint_has_neighbours_but_no_slots(run):
    shutil.rmtree(run / "checkpoints")
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    assert part(page, "neighbours").count('class="row"') == 2
    assert "without the bank" in part(page, "slots")
    with Image.open(run / "gallery.png") as picture:
        assert picture.width > 300


def test_flat_folder_without_labels(run, photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
        shutil.copy(path, flat / f"{number:02}.jpg")
    change(run, data=str(flat))
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    Checker(page)
    assert "no labels" in page
    assert "same class" not in page
    assert part(page, "neighbours").count('class="row"') in (11, 12)
    assert '<g class="group plain">' in part(page, "map")


@pytest.mark.parametrize(("option", "said"), [("data", "no such file"), ("backbone", "a module of your own")])
def test_pieces_that_cannot_be_had_are_said(run, option, said):
    change(run, **{option: str(run / "gone") if option == "data" else "own"})
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    Checker(page)
    for name in ("neighbours", "slots", "map"):
        assert said in part(page, name)
    assert part(page, "curves").count('<svg class="chart"') == 8


@pytest.mark.parametrize("name", ["encoder.backbone.bn1.running_var", "key_encoder.projector.6.weight"])
def test_features_that_are_not_finite_are_said(run, name):
    path = max((run / "checkpoints").glob("step-*.pt"))
    content = torch.load(path, weights_only=True)
    content["model"][name].fill_(torch.nan)
    torch.save(content, path)
    page = caco.report(run, device="cpu").read_text(encoding="utf-8")
    Checker(page)
    for section in ("neighbours", "slots", "map"):
        assert "gives features that are not finite" in part(page, section)


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"no run in .*config\.json"):
        caco.report(tmp_path)
    with pytest.raises(UsageError, match="name a run folder"):
        caco.report("")


def change(run, **options):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


# Charts


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(9.84, 12.48) == pytest.approx([10, 10.5, 11, 11.5, 12])
    assert ticks(-0.3, 0.3, 5) == pytest.approx([-0.2, 0, 0.2])
    assert ticks(5, 5) == [5]
    assert len(ticks(1, 65_536)) in range(2, 7)


def test_round_range():
    assert round_range([3, 9.5], floor=0) == (0, 10)  # a third stays empty
    assert round_range([9.8, 12.4], floor=0) == (9.5, 12.5)  # more than half would
    assert round_range([55, 99], floor=0, ceiling=100)[1] == 100
    assert round_range([7, 7]) == pytest.approx((3, 11), abs=1)
    low, high = round_range([0.0, 0.0], floor=0)
    assert low <= 0 < high


def test_axis_places_values():
    axis = Axis(10, 20, 100, 0)
    assert [axis.place(value) for value in (10, 15, 20)] == [100, 50, 0]


def test_line_chart_draws_the_values_where_they_belong():
    svg = line_chart(
        [Series("loss", [0, 50, 100], [0, 10, 5])], title="t", x_label="step", floor=0, levels=[Level("half", 5)]
    )
    left, right, top, bottom = charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM
    line = re.search(r'points="([^"]*)"', svg)[1]
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert places == [(left, bottom), ((left + right) / 2, top), (right, (top + bottom) / 2)]
    assert f'<path class="level" d="M{left:g} {(top + bottom) / 2:.1f}H{right:g}"/>' in svg
    assert "step 50: loss 10" in svg
    assert svg.count('class="reading"') == 3
    Checker(svg)


def test_line_chart_of_little_or_nothing():
    assert line_chart([Series("a", [], [])], title="t", x_label="step") == ""
    assert line_chart([Series("a", [1], [float("nan")])], title="t", x_label="step") == ""
    one = line_chart([Series("<a>", [3], [2])], title="<t>", x_label="step")
    assert "<polyline" not in one
    assert '<circle class="end c0"' in one
    assert "<a>" not in one
    assert "<t>" not in one


def test_thinned_keeps_the_means_and_the_order():
    series = thinned(Series("a", list(range(1000))[::-1], [2 * x for x in range(1000)][::-1]))
    assert len(series.x) == 143  # 1,000 in groups of 7
    assert series.x == sorted(series.x)
    assert series.x[0] == pytest.approx(3)
    assert [y / x for x, y in zip(series.x, series.y, strict=True)] == pytest.approx([2] * 143)
    assert thinned(Series("a", [1, 2, 3], [1, float("inf"), 3])).x == [1, 3]


def test_short_number():
    numbers = [0, 9.8379, 12.48, 1500.4, 0.00703, 0.5, 3e-6, 100.0]
    assert [charts.short_number(number) for number in numbers] == [
        *("0", "9.84", "12.5", "1,500", "0.00703", "0.5", "3.0e-06", "100"),
    ]


def test_point_map_has_one_scale_and_names_groups():
    svg = point_map([(0, 0), (10, 0), (0, 5)], [1, 1, 0], ["<one>", "two"], title="map")
    Checker(svg)
    side, margin = charts.MAP_SIDE, charts.MAP_MARGIN
    places = [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.2"', svg)]
    step = (side - 2 * margin) / 2
    expected = [(margin, side / 2 - step / 2), (margin, side / 2 + step / 2), (side - margin, side / 2 + step / 2)]
    assert np.allclose(places, expected, atol=0.06)
    assert "&lt;one&gt;" in svg


# Findings


def test_nearest_others_equals_a_plain_loop():
    vectors = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    for row, found in enumerate(nearest_others(vectors, 5).tolist()):
        others = sorted((other for other in range(30) if other != row), key=lambda o: -float(vectors[o] @ vectors[row]))
        assert found == others[:5]
    assert nearest_others(vectors[:3], 7).shape == (3, 2)
    assert nearest_others(vectors, 2, [4]).tolist() == nearest_others(vectors, 2)[4:5].tolist()


def test_choose_queries():
    assert choose_queries(torch.tensor([2, 0, 2, 0, 1]), 5, 12) == [1, 4, 0]
    queries = choose_queries(torch.arange(100).flip(0), 100, 3)
    assert queries == [99 - number for number in sample(100, 3)], "of three classes one image each"
    assert choose_queries(None, 100, 3) == sample(100, 3).tolist()
    assert choose_queries(None, 2, 12) == [0, 1]


def test_what_is_looked_at_leaves_out_no_class_that_comes_in_turns():
    chosen = sample(5000, 2000)
    assert len(set(chosen.tolist())) == 2000 and np.array_equal(chosen, sample(5000, 2000))
    assert (np.diff(chosen) > 0).all() and 0 <= chosen[0] < chosen[-1] < 5000
    in_turns = np.bincount(chosen % 10, minlength=10)  # every so-manyth would be of some only
    assert in_turns.min() > 150 and in_turns.max() < 250
    again = np.bincount(chosen[sample(2000, 1500)] % 10, minlength=10)
    assert again.min() > 100
    assert sample(3, 5).tolist() == [0, 1, 2]


def test_slots_by_use_and_purity():
    slots = torch.eye(4)
    embeddings = torch.nn.functional.normalize(
        torch.tensor([[1, 0.5, 0, 0], [1, 0, 0, 0], [1, 0.2, 0, 0], [0, 0, 1, 0.1], [0, 0, 0.9, 0.8]]), dim=1
    )
    found = slots_by_use(embeddings, slots, torch.tensor([0, 1, 1, 0, 0]))
    assert [(slot.number, slot.members, slot.majority) for slot in found] == [(0, [1, 2, 0], 1), (2, [3, 4], 0)]
    assert found[0].share == pytest.approx(2 / 3)
    assert purity(found) == pytest.approx(2 / 3)
    assert purity(slots_by_use(embeddings, slots, None)) is None


def test_plane_is_the_first_two_principal_components():
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 3, 0.5, 0.1, 0.1, 0.1])
    before = torch.get_rng_state()
    points, share = plane(vectors)
    assert torch.equal(torch.get_rng_state(), before)
    centred = vectors - vectors.mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(points.abs(), (centred @ directions[:2].T).abs(), atol=1e-3)
    assert share == pytest.approx(float(singular[:2].square().sum() / singular.square().sum()), rel=1e-4)
    assert torch.equal(points, plane(vectors)[0])
    assert plane(torch.ones(1, 3))[0].shape == (1, 2)


def test_example_views_are_those_of_training(finished, photos):
    config, source = read_config(finished), open_source(str(photos))
    example, index = example_views(source, config, 3)[0], int(sample(len(source), 3)[0])
    recipe = config.views.augmentations()[1]
    height, width = example.image.shape[:2]
    drawn = draw_parameters(recipe, [height], [width], seed=config.seed, epoch=0, indices=[index], view=1)
    view = render_views([example.image], drawn, recipe, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))[0]
    pixels = (255 * view).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels - example.views[1]).max() <= 1
    assert example.boxes[1] == (int(drawn.left[0]), int(drawn.top[0]), int(drawn.width[0]), int(drawn.height[0]))
    assert len(example.views) == len(example.changes) == 2


def test_encode_images_shows_every_good_image_once(finished, photos):
    config, source = read_config(finished), open_source(str(photos))
    trained = load_trained(finished, config)
    seen = insight.encode_images(
        source, trained, config.views.preparation(), images=100, device=torch.device("cpu"), workers=2
    )
    assert seen.keys == [source.key(index) for index in range(24) if source.key(index) != "dark/006.jpg"]
    features = caco_features(finished, source)
    assert torch.allclose(seen.features, torch.nn.functional.normalize(features, dim=1), atol=1e-5)
    assert seen.embeddings is not None
    assert torch.allclose(seen.embeddings.norm(dim=1), torch.ones(23), atol=1e-5)


def caco_features(run, source):
    from caco.evaluate.centre_views import CentreViews
    from caco.evaluate.features import extract

    views = CentreViews(source, Preparation(size=16, resize=18), workers=1)
    return extract(caco.load_backbone(run), views, device="cpu").vectors


# Records


def test_curve_takes_the_last_of_records_at_one_place():
    lines = [
        {"step": 10, "v": 1.0},
        {"step": 20, "v": 2.0},
        {"step": 10, "v": 3.0},
        {"kind": "x", "step": 30, "v": 4.0},
    ]
    assert records.curve(lines, "", "v", "name", scale=2) == Series("name", [10, 20], [6.0, 4.0])
    epochs = [{"kind": "epoch", "epoch": 0, "step": 5, "v": 1}]
    assert records.curve(epochs, "epoch", "v", "name", by="epoch").x == [1]


def test_summary_of_a_run():
    config = Pretrain(epochs=2, batch_size=64, bank_size=512)
    train = {"kind": "train", "step": 60, "loss": 9.0, "positive_probability": 0.1, "feature_spread": 0.7}
    epoch = {"kind": "epoch", "step": 30, "epoch": 0, "slots_used": 300, "slot_perplexity": 150}
    summary = records.summarise([train, epoch], config)
    assert (summary.step, summary.steps, summary.choices, summary.finished) == (60, 60, 30 * 64 * 2, False)
    assert (summary.first_knn, summary.trend) == (None, None)


def test_neighbours_in_class_are_counted_for_the_encoder_and_both_baselines():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.nn.functional.normalize(torch.randn(60, 5, generator=generator), dim=1)
    seen = insight.EncodedImages(
        keys=[str(number) for number in range(60)],
        classes=("a", "b"),
        labels=labels,
        thumbnails=[],
        pixels=noise,
        features=torch.nn.functional.one_hot(labels, 2).float(),
        untrained=noise,
        embeddings=None,
    )
    found = insight.neighbour_agreement(seen, 7)
    assert (found.encoder, found.neighbours, found.images) == (1.0, 7, 60)
    assert found.untrained == found.pixels < 0.7
    assert found.above_untrained and found.above_pixels
    same = dataclasses.replace(seen, features=noise)
    assert not insight.neighbour_agreement(same, 7).above_untrained
    assert insight.neighbour_agreement(dataclasses.replace(seen, labels=None, untrained=None), 7) is None


# Pictures


def test_data_uri_is_the_picture():
    pixels = np.full((16, 24, 3), (200, 30, 60), np.uint8)
    head, _, content = data_uri(pixels).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (24, 16)
        assert np.abs(np.asarray(picture).astype(int) - pixels).max() < 8


def test_gallery_picture_marks_agreement_and_keeps_its_size():
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(6)]
    rows = [Row("a heading that is far too long for its place " * 5, "detail", pictures, [True, False, None] * 2)] * 3
    small = gallery_picture("title", rows, most_bytes=40_000)
    large = gallery_picture("title", rows, most_bytes=150_000)
    assert len(small) <= 40_000 < len(large) <= 150_000
    with Image.open(io.BytesIO(large)) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    green = np.abs(colours - (46, 158, 107)).sum(axis=1) < 12
    assert green.sum() >= 3 * 2 * 3 * 40  # 3 rows of 2 lines, 3 pixels high
    with pytest.raises(ValueError, match="at least one row"):
        gallery_picture("title", [], most_bytes=100)
    with pytest.raises(ValueError, match="does not fit"):
        gallery_picture("title", rows, most_bytes=100)
