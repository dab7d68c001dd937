"""knn, linear and embed, from a folder of pictures to the file with the result."""

import json
import shlex
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from colour_photos import CLASSES, make_photos
from forked import Command
from PIL import Image

import caco
from caco.backbone import create_backbone
from caco.cli import main
from caco.data.arrays import ArraySource
from caco.errors import CacoError, UsageError
from caco.train.run_folder import CONDEMNED
from caco.weights import BackboneCard, save_backbone

TINY = {
    "backbone": "test_resnet",
    "epochs": 1,
    "batch_size": 8,
    "bank_size": 16,
    "device": "cpu",
    "workers": 2,
    "views": {"size": 16, "evaluation_resize": 18, "blur": (0.0, 0.0)},
    "encoder": {"projector": 16, "embedding": 8},
    "bank": {"warm_start_steps": 1},
    "optimizer": {"warmup_epochs": 1},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes that differ in colour."""
    return make_photos(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("val"), 4, seed=1)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    path = caco.pretrain(photos, out, **TINY)
    assert path == out / "export" / "backbone.safetensors"
    return out


def strict(path):
    """Read JSON as other languages do: NaN and Infinity are not JSON."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def check_report(report, val_images, train_images):
    low, high = report["top1_interval"]
    assert 0 <= low <= report["top1"] <= high <= 100
    assert report["top1"] <= report["top5"] <= 100
    assert (report["val_images"], report["train_images"]) == (val_images, train_images)


def test_knn_of_a_run(run, photos, val, tmp_path, capsys):
    out = tmp_path / "result.json"
    line = ["knn", str(run), "--data", str(photos), "--val", str(val), "--out", str(out), "--neighbours", "5", "1"]
    assert main(line) == 0
    captured = capsys.readouterr()
    report = strict(out)
    check_report(report, 12, 30)
    assert [row["neighbours"] for row in report["all"]] == [5, 1]
    assert (report["neighbours"], report["top1"]) == (5, report["all"][0]["top1"])  # the first is the headline
    assert captured.out.count("95 % interval") == 2
    assert "top-5" not in captured.out  # of three classes it is always 100 %
    assert f"top-1 {report['top1']:.2f} %" in captured.out
    assert "12 images judged by 30, at 16 px" in captured.out
    assert report["broken"] == []
    assert (report["run"], report["data"], report["val"]) == (str(run), str(photos), str(val))


def test_knn_returns_what_it_writes(run, photos, val, tmp_path):
    result = caco.knn(run, data=photos, val=val, out=tmp_path / "a.json")
    assert strict(tmp_path / "a.json") == result
    assert caco.knn(run, data=photos, val=val) == result  # the same again


def test_without_val_a_share_is_held_out(run, photos):
    result = caco.knn(run, data=photos, held_out=0.2, neighbours=[3])
    assert (result["val_images"], result["train_images"]) == (6, 24)
    assert result["val"] == "held out: 0.2"
    assert caco.knn(run, data=photos, held_out=0.2, neighbours=[3]) == result


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_pixels_as_a_baseline(command, photos, val):
    """Classes that differ in colour alone: for pixels as good as read out."""
    options = {"epochs": 30} if command == "linear" else {"neighbours": [3]}
    result = getattr(caco, command)("pixels", data=photos, val=val, size=8, **options)
    check_report(result, 12, 30)
    assert result["top1"] == 100.0


def test_a_random_encoder_as_a_baseline(photos, val):
    results = [caco.knn("random", data=photos, val=val, backbone="test_resnet", size=32, seed=s) for s in (0, 0)]
    assert results[0] == results[1]
    assert results[0]["size"] == 32
    other = [
        caco.embed("random", data=val, backbone="test_resnet", size=32, seed=s, out=val.parent / f"{s}.npz")
        for s in (0, 1)
    ]
    first, second = (np.load(path)["vectors"] for path in other)
    assert first.shape == (12, 96)
    assert not np.allclose(first, second)


def test_linear_of_a_run(run, photos, val, tmp_path, capsys):
    out = tmp_path / "linear.json"
    result = caco.linear(run, data=photos, val=val, epochs=3, out=out)
    assert strict(out) == result
    check_report(result, 12, 30)
    assert result["protocol"] == "cached"
    assert set(result["per_class"]) == set(CLASSES)
    assert np.mean(list(result["per_class"].values())) == pytest.approx(result["top1"])  # as many of each
    tried = {trial["learning_rate"] for trial in result["rates_tried"]}
    assert len(tried) > 3
    assert result["learning_rate"] in tried
    assert "linear top-1" in capsys.readouterr().out


def test_linear_with_one_rate_tries_no_other(run, photos, val):
    result = caco.linear(run, data=photos, val=val, epochs=2, lr=0.1)
    assert (result["rates_tried"], result["learning_rate"]) == ([], 0.1)


def test_every_file_that_is_written_is_named(photos, val, tmp_path, capsys):
    head, out = tmp_path / "head.safetensors", tmp_path / "linear.json"
    caco.linear("pixels", photos, val=val, size=8, epochs=2, head=head, out=out)
    said = capsys.readouterr().out
    assert f"the classifier is written to {head}\n" in said and f"the result is written to {out}\n" in said
    assert head.exists() and out.exists()


def test_percents_are_round_numbers(photos, tmp_path):
    queries = make_photos(tmp_path / "val", 20, seed=2)
    rng = np.random.default_rng(0)
    for path in sorted(queries.glob("*/*.jpg")):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    result = caco.linear("pixels", photos, val=queries, size=8, epochs=2)
    assert all(share % 5 == 0 for share in result["per_class"].values())


def test_a_single_image_is_judged(photos, capsys):
    single = ArraySource(np.zeros((1, 20, 20, 3), np.uint8), [0], CLASSES[:1])
    trained_on = caco.knn("pixels", photos, val=single, size=8)["train_images"]
    assert f", 1 image judged by {trained_on}, at 8 px\n" in capsys.readouterr().out


def test_a_class_without_judged_images_is_null_in_json(photos, tmp_path):
    some = make_photos(tmp_path / "val", 3, CLASSES[:2])
    result = caco.linear("pixels", data=photos, val=some, size=8, epochs=2, out=tmp_path / "a.json")
    assert strict(tmp_path / "a.json") == result
    assert result["per_class"]["red"] is None


def test_linear_by_the_reference_protocol(run, photos, val, tmp_path):
    out = tmp_path / "reference.json"
    result = caco.linear(run, data=photos, val=val, protocol="reference", epochs=2, probe_batch_size=15, out=out)
    assert strict(out) == result
    check_report(result, 12, 30)
    assert (result["protocol"], result["learning_rate"], result["epochs"]) == ("reference", 0.025, 2)


def test_embed_into_both_formats(run, val, tmp_path, capsys):
    assert main(["embed", str(run), "--data", str(val), "--out", str(tmp_path / "f.npz"), "--workers", "2"]) == 0
    assert "12 vectors of 96 numbers" in capsys.readouterr().out
    assert caco.embed(run, data=val, out=tmp_path / "f.parquet", batch_size=5) == tmp_path / "f.parquet"
    with np.load(tmp_path / "f.npz") as file:
        keys, vectors, labels, classes = (file[name] for name in ("keys", "vectors", "labels", "classes"))
    table = parquet.read_table(tmp_path / "f.parquet")
    assert keys.tolist() == table["key"].to_pylist() == sorted(keys)
    assert keys[0] == "blue/000.jpg"
    assert [classes[label] for label in labels] == table["class"].to_pylist() == [key.split("/")[0] for key in keys]
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), vectors, rtol=1e-4, atol=1e-5)


def test_embedded_vectors_are_the_backbones_features(run, val, tmp_path):
    """By hand: decode, resize the shorter side to 18, take the middle 16 x 16, normalise, forward."""
    caco.embed(run, data=val, out=tmp_path / "f.npz")
    with Image.open(val / "blue" / "000.jpg") as image:
        width, height = image.size
        resized = image.resize(
            (int(18 * width / height), 18) if height < width else (18, 18), Image.Resampling.BILINEAR
        )
    left = round((resized.width - 16) / 2)
    pixels = torch.from_numpy(np.array(resized.crop((left, 1, left + 16, 17)))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = caco.load_backbone(run)(((pixels - mean[:, None, None]) / std[:, None, None])[None])[0].numpy()
    with np.load(tmp_path / "f.npz") as file:
        vector = file["vectors"][0]
        np.testing.assert_allclose(vector, expected, rtol=0, atol=0.03 * np.abs(expected).max())
    caco.embed(run, data=val, out=tmp_path / "n.npz", normalise=True)
    with np.load(tmp_path / "n.npz") as file:
        np.testing.assert_allclose(file["vectors"][0], vector / np.linalg.norm(vector), rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(file["vectors"], axis=1), 1, rtol=1e-5)


def test_a_run_in_progress_is_as_good(run, val, tmp_path):
    """Without a finished backbone, the latest checkpoint holds the same weights (of the same moment)."""
    import shutil

    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    finished = caco.embed(run, data=val, out=tmp_path / "a.npz")
    going_on = caco.embed(tmp_path / "run", data=val, out=tmp_path / "b.npz")
    file = caco.embed(run / "export" / "backbone.safetensors", data=val, out=tmp_path / "c.npz")
    first, second, third = (np.load(path)["vectors"] for path in (finished, going_on, file))
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_another_size_than_trained_at(run, val, tmp_path):
    caco.embed(run, data=val, out=tmp_path / "a.npz", size=32)
    with np.load(tmp_path / "a.npz") as file:
        assert file["vectors"].shape == (12, 96)


def test_a_size_that_the_encoder_does_not_take(val, tmp_path, capsys):
    """Not a multiple of its patches. The positions of the other are those of one size, for which it is built anew."""
    for name, size in (("test_vit", 40), ("test_vit_relpos", 48)):
        file = tmp_path / f"{name}.safetensors"
        save_backbone(file, create_backbone(name, 32), BackboneCard(name, size=32, resize=32))
        words = ["embed", str(file), "--data", str(val), "--out", str(tmp_path / f"{name}.npz")]
        refused = name == "test_vit"
        assert main([*words, "--size", str(size)]) == (2 if refused else 0)
        said = capsys.readouterr().err
        assert said.endswith("; leave --size out: it takes its own, 32 px\n") is refused
        assert ("--size 40: the backbone does not take pictures of 40 x 40 pixels" in said) is refused
        assert main([*words, "--size", "32", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("embed RUN --data VAL", "features.npz"),
        ("knn RUN --data VAL", "result.json"),
        ("linear RUN --data VAL --epochs 1", "result.json"),
        ("export RUN", "weights.pth"),
    ],
)
def test_files_are_replaced_only_when_told(run, val, tmp_path, capsys, command, name):
    """A user's own weights may have the name that comes to mind."""
    out = tmp_path / name
    out.write_text("mine")
    words = [{"RUN": str(run), "VAL": str(val)}.get(word, word) for word in command.split()]
    assert main([*words, "--out", str(out)]) == 2
    assert (
        f"--out {out} is there already; choose another name, or replace it with --overwrite" in capsys.readouterr().err
    )
    assert out.read_text() == "mine"
    assert main([*words, "--out", str(out), "--overwrite"]) == 0
    assert out.stat().st_size > 4


def test_unlabelled_and_broken_images_are_embedded_as_far_as_they_go(run, tmp_path, capsys):
    folder = make_photos(tmp_path / "flat", 4, ("only",)) / "only"
    (folder / "aaa.jpg").write_bytes(b"not a picture")
    path = caco.embed(run, data=folder, out=tmp_path / "f.npz")
    with np.load(path) as file:
        assert set(file) == {"keys", "vectors"}
        assert file["keys"].tolist() == [f"{number:03}.jpg" for number in range(4)]
    error = capsys.readouterr().err
    assert "1 of 5 images were skipped, the first: aaa.jpg" in error


def test_a_process_with_broken_images_only_spoils_nothing(photos, tmp_path):
    """Of two processes the first gets the folder of broken images; all the same the result is that of one process."""
    folder = tmp_path / "photos"
    for number in range(4):
        for name, content in (("a", b"nonsense"), ("b", (photos / "red" / f"{2 + 3 * number:03}.jpg").read_bytes())):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{number}.jpg").write_bytes(content)
    options = {"data": folder, "size": 16, "device": "cpu"}
    for processes in (1, 2):
        caco.embed("pixels", **options, out=tmp_path / f"{processes}.npz", distributed={"processes": processes})
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert one["keys"].tolist() == [f"b/{number}.jpg" for number in range(4)]
        assert all(np.array_equal(one[name], two[name]) for name in ("keys", "vectors", "labels", "classes"))
    for path in (folder / "b").iterdir():
        path.write_bytes(b"nonsense")
    with pytest.raises(CacoError, match="none of the 8 images of .* can be read; the first, a/0.jpg"):
        caco.embed("pixels", **options, out=tmp_path / "none.npz", distributed={"processes": 2})


def test_broken_images_are_listed_in_the_result(run, photos, tmp_path):
    some = make_photos(tmp_path / "val", 2)
    (some / "blue" / "zzz.jpg").write_bytes(b"")
    result = caco.knn(run, data=photos, val=some)
    assert result["val_images"] == 6
    assert result["broken"] == ["blue/zzz.jpg: empty: 0 bytes"]


def test_the_reference_protocol_tells_of_broken_images_like_the_cached_one(run, val, tmp_path, capsys):
    some = make_photos(tmp_path / "photos", 4)
    for broken in (some / "blue" / "aaa.jpg", some / "red" / "zzz.jpg"):
        broken.write_bytes(b"")
    said = []
    for protocol in ("cached", "reference"):
        result = caco.linear(run, data=some, val=val, protocol=protocol, epochs=2)
        check_report(result, 12, 12)
        said.append((capsys.readouterr().err.splitlines()[-1], result["broken"]))
    assert said[0] == said[1]
    words = "2 of 14 images were skipped, the first: blue/aaa.jpg (empty: 0 bytes)"
    assert said[1] == (words, ["blue/aaa.jpg: empty: 0 bytes", "red/zzz.jpg: empty: 0 bytes"])


def test_a_class_that_training_images_lack(run, photos, tmp_path):
    some = make_photos(tmp_path / "val", 2, ("blue", "gren"))
    for command in (caco.knn, caco.linear):
        with pytest.raises(
            UsageError, match="has the class 'gren', which the training images lack. Did you mean green"
        ):
            command(run, data=photos, val=some)


def test_judging_needs_labels(run, photos, tmp_path):
    flat = make_photos(tmp_path / "flat", 4, ("only",))
    with pytest.raises(UsageError, match=r"--data .*flat has no labels"):
        caco.knn(run, data=flat)
    with pytest.raises(UsageError, match=r"flat has no labels"):
        caco.knn(run, data=photos, val=flat)


def test_nothing_left_to_hold_out(run, tmp_path):
    single = make_photos(tmp_path / "single", 1)
    with pytest.raises(CacoError, match="no class has two images.*--val"):
        caco.knn(run, data=single)


class Counted(ArraySource):
    """Counts how often an image is read."""

    loads = 0

    def load(self, index):
        self.loads += 1
        return super().load(index)


def test_a_rate_that_cannot_be_chosen_is_told_before_the_work(run):
    train, val = (Counted(np.zeros((3, 20, 20, 3), np.uint8), [0, 1, 2]) for _ in range(2))
    assert caco.linear(run, data=train, val=val, lr=0.1, epochs=2)["train_images"] == 3
    assert (train.loads, val.loads) == (3, 3)
    with pytest.raises(UsageError, match="no class has two training images.*--lr 0.1"):
        caco.linear(run, data=train, val=val, epochs=2)
    assert (train.loads, val.loads) == (3, 3)


def test_the_result_is_asked_for_before_the_work(tmp_path):
    """A wrong --out is told before images are opened, which would fail."""
    photos = tmp_path / "absent"
    with pytest.raises(UsageError, match="absent"):
        caco.knn("pixels", data=photos, out=tmp_path / "result.json")
    with pytest.raises(UsageError, match="written as .json"):
        caco.knn("pixels", data=photos, out=tmp_path / "result.txt")
    with pytest.raises(UsageError, match=r"written as \.npz or \.parquet"):
        caco.embed("pixels", data=photos, out=tmp_path / "result.json")
    with pytest.raises(UsageError, match="must be at least 1"):
        caco.knn("pixels", data=photos, neighbours=[0])


def test_pretrain_prints_the_next_commands(photos, tmp_path, capsys):
    caco.pretrain(photos, tmp_path / "run", val=photos, **TINY)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("caco ")]
    assert [line[1] for line in lines] == ["knn", "knn", "knn", "linear", "embed", "report"]
    assert lines[0] == ["caco", "knn", str(tmp_path / "run"), "--data", str(photos), "--val", str(photos)]
    assert [line[2:4] for line in lines[1:3]] == [["random", "--beside"], ["pixels", "--beside"]]
    assert [main(line[1:]) for line in lines[:3]] == [0, 0, 0]  # what is printed works


def printed_commands(capsys) -> list[list[str]]:
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("caco ")]


def test_the_next_commands_work_without_labels_too(photos, tmp_path, capsys, monkeypatch):
    """No judging of what has no labels; names with spaces and patterns are quoted."""
    flat = make_photos(tmp_path / "my photos", 12, ("only",))
    monkeypatch.chdir(tmp_path)
    caco.pretrain(f"{flat}/only/*.jpg", tmp_path / "a run", **TINY)
    commands = printed_commands(capsys)
    assert [words[0] for words in commands] == ["embed", "report"]
    assert commands[0][1:4] == [str(tmp_path / "a run"), "--data", f"{flat}/only/*.jpg"]
    for words in commands:
        assert main(words) == 0
    caco.pretrain(flat, tmp_path / "b", val=photos, **TINY)
    capsys.readouterr()
    caco.pretrain(flat, tmp_path / "b", val=photos, resume=True)
    commands = printed_commands(capsys)
    assert commands[0] == ["knn", str(tmp_path / "b"), "--data", str(photos)]
    assert main(commands[0]) == 0


def test_val_without_labels_is_refused_at_once(photos, tmp_path):
    flat = make_photos(tmp_path / "flat", 4, ("only",))
    with pytest.raises(UsageError, match="--val .*flat has no labels.*leave --val out"):
        caco.pretrain(photos, tmp_path / "run", val=flat, **TINY)
    assert not (tmp_path / "run").exists()


def test_weights_is_another_name_of_the_encoder(run, photos, val, tmp_path):
    caco.export(weights=run, format="reference", out=tmp_path / "pub.pth.tar")
    options = {"data": photos, "val": val, "size": 16}
    by_name = caco.knn(weights=tmp_path / "pub.pth.tar", **options)
    assert by_name == caco.knn(tmp_path / "pub.pth.tar", **options)
    weights = ["--weights", str(tmp_path / "pub.pth.tar")]
    for command, *more in (
        ["linear", "--data", str(photos), "--epochs", "2"],
        ["embed", "--data", str(val), "--out", str(tmp_path / "f.npz")],
        ["export", "--format", "timm", "--out", str(tmp_path / "b.safetensors")],
    ):
        assert main([command, *weights, *more]) == 0
    with pytest.raises(UsageError, match="name one encoder, not two"):
        caco.knn(run, weights=run, data=photos)


def snapshot(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CONDEMNED)
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val": "nowhere"}, "nowhere: no such file"),
        ({"batch_size": 31}, "30 images, fewer than one batch"),
        ({"backbone": "resnet19"}, "Did you mean"),
        ({"weights": "nowhere.pt"}, "there is no run folder or file"),
        ({"monitor": {"knn_share": 0.0}}, "share"),
    ],
)
def test_overwrite_deletes_nothing_when_the_new_run_cannot_begin(photos, tmp_path, options, words):
    caco.pretrain(photos, tmp_path / "run", **TINY)
    before = snapshot(tmp_path / "run")
    with pytest.raises(UsageError, match=words):
        caco.pretrain(photos, tmp_path / "run", overwrite=True, **{**TINY, **options})
    assert snapshot(tmp_path / "run") == before
    with pytest.raises(UsageError):
        caco.pretrain(photos, tmp_path / "new", **{**TINY, **options})
    assert not (tmp_path / "new").exists()  # and the corrected command meets no "holds a run"


def test_a_refused_resume_changes_nothing(photos, tmp_path, monkeypatch):
    caco.pretrain(photos, tmp_path / "run", **TINY).unlink()  # as if it were stopped before the last file
    before = snapshot(tmp_path / "run")
    fewer = make_photos(tmp_path / "fewer", 9)
    renamed = tmp_path / "renamed"
    shutil.copytree(photos, renamed)
    first = min(path for path in renamed.rglob("*") if path.is_file())
    first.rename(first.with_name(f"0{first.name}"))
    monkeypatch.chdir(tmp_path)
    for options, words in (
        ({"data": fewer}, "resume needs the same images"),
        ({"data": renamed}, "images of other names, or in another order, than .*renamed has now; resume needs"),
        ({"data": photos, "lr": 9.0}, "cannot change --lr"),
        ({"data": tmp_path / "gone"}, r"no such file or folder\. If the images have moved .*: --data, --val$"),
        ({"data": "fewe"}, r"Did you mean fewer\? If the images have moved"),
    ):
        with pytest.raises(UsageError, match=words):
            caco.pretrain(out=tmp_path / "run", resume=True, **options)
        assert snapshot(tmp_path / "run") == before


def test_too_many_broken_images_of_one_size_are_told_before_the_run_begins(tmp_path):
    """Pictures of one size are decoded first: no folder is made yet, and one of the broken ones is named."""
    folder = tmp_path / "photos"
    for number in range(16):
        (folder / "all").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / "all" / f"{number:02}.png")
    for number in range(4):
        (folder / "all" / f"{number:02}.png").write_bytes(b"")
    with pytest.raises(CacoError, match=r"images are broken.*among them all/0\d\.png: empty: 0 bytes"):
        caco.pretrain(folder, tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()
    monitor = {"broken_share": 0.5}
    path = caco.pretrain(folder, tmp_path / "run", monitor=monitor, **TINY)
    assert path.exists()
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 4


def test_a_stopped_demo_tells_how_to_get_its_table(tmp_path, monkeypatch):
    from caco import commands
    from caco.config import Demo
    from caco.demo import demo
    from caco.errors import Interrupted

    def stopped(config):
        assert config.distributed.processes == 1  # whatever number of GPUs there are
        raise Interrupted(
            f"stopped by Ctrl-C at step 3 and saved to here; go on with: caco pretrain --out {config.out} --resume"
        )

    monkeypatch.setattr(commands, "pretrain", stopped)
    out = tmp_path / "demo"
    with pytest.raises(Interrupted) as told:
        demo(Demo(out=str(out)))
    said = str(told.value)
    assert said.startswith(
        f"stopped by Ctrl-C at step 3 and saved to here; go on with: caco pretrain --out {out} --resume ("
    )
    assert said.endswith(f"for the demo's table: caco demo --out {out} --overwrite)")


def test_a_stopped_demo_in_a_folder_with_a_blank_is_pasted_as_it_was_called(tmp_path):
    out = tmp_path / "my first"
    process = Command(["demo", "--out", str(out), "--seed", "3"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.finish()
    assert process.returncode == 75, said
    assert f"go on with: caco pretrain --out '{out}' --resume (which only pre-trains" in said
    assert said.endswith(f"for the demo's table: caco demo --out '{out}' --seed 3 --overwrite)\n")


def test_a_run_below_its_own_images_goes_on_after_its_report(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    finished = caco.pretrain(".", "runs/my first", **TINY)
    before = finished.read_bytes()
    finished.unlink()  # as if it had been stopped before the end
    caco.report("runs/my first", images=10)
    assert (tmp_path / "photos/runs/my first/gallery.png").exists()
    assert caco.pretrain(out="runs/my first", resume=True).read_bytes() == before
    assert "30 images" in capsys.readouterr().err


DOUBLED = ("crane", "dog", "crane")


def test_two_classes_of_one_name_are_judged_apart():
    """As in ImageNet, which has two cranes. What the second looks like decides, not what it is called."""
    labels = np.arange(60) % 3
    pixels = np.random.default_rng(0).integers(0, 60, (60, 8, 8, 3)) + 150 * np.eye(3)[labels][:, None, None]
    train, val = (
        ArraySource(pixels[part].astype(np.uint8), labels[part], DOUBLED) for part in (slice(0, 30), slice(30, 60))
    )
    assert caco.knn("pixels", train, val=val, size=8, neighbours=3)["top1"] == 100.0
    result = caco.linear("pixels", train, val=val, size=8, epochs=30)
    assert result["top1"] == 100.0
    assert result["per_class"] == {"crane (class 0)": 100.0, "dog": 100.0, "crane (class 2)": 100.0}
