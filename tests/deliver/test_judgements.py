"""Train, judge, report: what caco knn and caco linear find is kept with the run, and its page shows it."""

import dataclasses
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from colour_photos import make_photos
from torch import nn

import caco
from caco.after_training import Knn
from caco.cli import main
from caco.data.arrays import ArraySource
from caco.deliver.judgements import read_comparisons
from caco.errors import UsageError
from caco.evaluate.encoder import load_encoder
from caco.train.run_folder import WRITTEN
from caco.views import Preparation

TINY = {
    "backbone": "test_resnet",
    "epochs": 1,
    "batch_size": 8,
    "bank_size": 16,
    "device": "cpu",
    "workers": 2,
    "views": {"size": 16, "evaluation_resize": 18, "mean": (0.4, 0.4, 0.4)},
    "encoder": {"projector": 16, "embedding": 8},
    "bank": {"warm_start_steps": 1},
    "optimizer": {"warmup_epochs": 1},
    "monitor": {"knn_epochs": 0},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    caco.pretrain(photos, out, **TINY)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def results(page):
    """Return the text of the section on results, a table's rows as lines; and the commands that it shows."""
    section = re.search(r'<section id="results">.*?</section>', page.read_text(encoding="utf-8"), re.DOTALL)[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", section)]
    commands = re.search(r"<pre>(.*?)</pre>", section, re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", " ", section))
    lines = html.unescape(commands[1]).splitlines() if commands else []
    return text, [row for row in rows if row], [shlex.split(line)[1:] for line in lines]


def test_the_report_asks_for_judgements_and_shows_them(run, photos, capsys):
    """The commands on the page are ready: done one after another, they fill the table, and nothing is asked for any more."""
    before = (run / "metrics.jsonl").read_bytes()
    text, rows, commands = results(caco.report(run, device="cpu"))
    assert "It has not been judged by labels yet." in text and rows == []
    assert [command[:2] for command in commands] == [["knn", str(run)], ["knn", "random"], ["knn", "pixels"]]
    for command in commands:
        assert main(command) == 0
    assert capsys.readouterr().out.count(f"kept for the report of {run}\n") == 3
    text, rows, commands = results(caco.report(run, device="cpu"))
    kept = {json.loads(path.read_text())["run"]: json.loads(path.read_text()) for path in run.glob("results/*.json")}
    assert [row[0] for row in rows][0] == "this run"
    assert {row[0] for row in rows} == {"this run", "untrained test_resnet", "pixels"}
    low, high = kept[str(run)]["top1_interval"]
    assert rows[0][1:3] == [f"{kept[str(run)]['top1']:.1f} %", f"{low:.1f}–{high:.1f}"]
    assert "kNN, 20 neighbours, temperature 0.2, fp32, seed 0" in text
    assert (
        f"6 images of {photos}, held out: 0.2, judged by the other 24; 3 classes, at 16 px; the run was trained on these"
        in text
    )
    assert commands == []
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_verdict_takes_them_into_account(run, photos):
    for judged in (run, "random", "pixels"):
        caco.knn(judged, photos, val=photos, beside=run)
    header = re.search(r"<header>.*?</header>", caco.report(run, device="cpu").read_text(), re.DOTALL)[0]
    assert "Nearest neighbours: 100.0 % of 30 images right; " in header
    assert "No better than an untrained encoder, as far as these images tell" in header  # all get colours right
    assert "on the images it was trained on" in header


def shards(folder, photos, count):
    """Write photos into tar files with their labels, the first into the first file and so on in turns."""
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"shard-{number:03}.tar", "w") as tar:
            for path in sorted(photos.rglob("*.jpg"))[number::count]:
                tar.add(path, f"{path.stem}.jpg")
                member = tarfile.TarInfo(f"{path.stem}.cls")
                member.size = len(path.parent.name)
                tar.addfile(member, io.BytesIO(path.parent.name.encode()))


def test_one_of_the_shards_it_was_trained_on(tmp_path, photos, monkeypatch):
    """Training images by a relative pattern, judged ones by the whole path of one of its files; a third kept apart."""
    shards(tmp_path / "set", photos, 3)
    monkeypatch.chdir(tmp_path / "set")
    caco.pretrain("shard-{000..001}.tar", "run", **TINY)
    said = {}
    for number in (1, 2):
        for judged in ("run", "random", "pixels"):
            caco.knn(judged, "shard-000.tar", val=tmp_path / "set" / f"shard-{number:03}.tar", beside="run")
        (comparison,) = (one for one in read_comparisons(Path("run")) if f"-{number:03}" in one.val)
        said[number] = comparison.seen
    assert said == {1: True, 2: False}
    assert results(caco.report("run", device="cpu"))[0].count("; the run was trained on these images") == 1


def test_of_arrays_nobody_can_tell_whether_it_was_trained_on_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
    source = ArraySource(pixels, np.arange(40) % 2)
    caco.pretrain(source, tmp_path / "run", **TINY)
    caco.knn(tmp_path / "run", source, val=source)
    assert "; the run may have been trained on these images" in results(caco.report(tmp_path / "run", device="cpu"))[0]


def test_missing_baselines_are_asked_for_as_the_run_was_judged(run, photos):
    caco.linear(run, photos, val=photos, epochs=2, lr=0.1, size=20, seed=3)
    _, rows, commands = results(caco.report(run, device="cpu"))
    assert [row[0] for row in rows] == ["this run"]
    assert len(commands) == 1 and commands[0][:4] == ["linear", "random", "--beside", str(run)]
    assert main(commands[0]) == 0
    (comparison,) = read_comparisons(run)
    assert [judged.name for judged in comparison.judged] == ["this run", "untrained test_resnet"]
    assert comparison.size == 20


def test_what_differs_is_not_compared(run, photos):
    """Of the same judgement the newest counts; another size, seed, setting or set of images is another table."""
    for _ in range(2):
        caco.knn(run, photos, neighbours=5)
    assert len(list((run / "results").iterdir())) == 1
    for options in ({"neighbours": 3}, {"size": 20}, {"seed": 1}, {"val": photos}, {"temperature": 0.1}):
        caco.knn(run, photos, **{"neighbours": 5, **options})
    assert len(read_comparisons(run)) == len(list((run / "results").iterdir())) == 6


def test_one_place_by_two_names_is_the_same_judgement(run, photos, monkeypatch):
    caco.knn(run, photos)
    monkeypatch.chdir(photos.parent)
    caco.knn(run, f"{photos.name}/")
    assert len(list((run / "results").iterdir())) == 1


def test_arrays_of_one_name_are_told_apart_by_their_labels(run):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
    for labels in (np.arange(40) % 2, np.arange(40) // 20):
        caco.knn(run, ArraySource(pixels, labels))
    text, rows, commands = results(caco.report(run, device="cpu"))
    assert len(rows) == 2 and commands == []
    assert 'in Python the same calls with "random" and "pixels" in place of the run, and beside=run' in text


def test_a_baseline_is_as_the_run_it_stands_beside(run, photos):
    """Model, stem, size, centre crop and normalisation; options that are given come first."""
    options = Knn(run="random", data=str(photos), beside=str(run))
    module, card = load_encoder(options)
    assert (card.backbone, card.preparation()) == ("test_resnet", Preparation(16, 18, (0.4, 0.4, 0.4)))
    assert card.step == 0
    trained = caco.load_backbone(run).state_dict()
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in trained.items()}
    assert load_encoder(dataclasses.replace(options, size=24))[1].size == 24
    assert load_encoder(dataclasses.replace(options, backbone="resnet10_narrow"))[1].backbone == "resnet10_narrow"
    assert load_encoder(dataclasses.replace(options, run="pixels"))[1].size == 16


def test_another_encoder_beside_the_run(run, photos, tmp_path):
    """A second run, or a file, is kept with both; each page calls its own run so."""
    other = shutil.copytree(run, tmp_path / "other")
    caco.knn(run, photos)
    caco.knn(other, photos, beside=run)
    caco.knn(other / "export/backbone.safetensors", photos, beside=run)
    (comparison,) = read_comparisons(run)
    assert {judged.name for judged in comparison.judged} == {
        "this run",
        str(other),
        str(other / "export/backbone.safetensors"),
    }
    assert [judged.name for judged in read_comparisons(other)[0].judged] == ["this run"]


def test_a_result_of_an_earlier_state_says_so(run, photos):
    caco.knn(run, photos)
    (path,) = (run / "results").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 1}))
    assert "this run at step 1 (since then it has gone on)" in results(caco.report(run, device="cpu"))[0]


def test_a_module_of_ones_own(photos, tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return torch.relu(self.layer(x)).mean(dim=(2, 3))

    caco.pretrain(photos, tmp_path / "run", **{**TINY, "backbone": Own()})
    for judged in (tmp_path / "run", "random"):
        caco.knn(judged, photos, backbone=Own(), beside=tmp_path / "run", size=16)
    with pytest.raises(UsageError, match=r"random needs to know the model: backbone=module in Python"):
        caco.knn("random", photos, beside=tmp_path / "run")
    (comparison,) = read_comparisons(tmp_path / "run")
    assert {judged.name for judged in comparison.judged} == {"this run", "untrained own"}
    assert results(caco.report(tmp_path / "run"))[2] == []


def test_a_folder_that_refuses_costs_only_the_record(run, photos, tmp_path, capsys):
    (run / "results").write_text("in the way")
    out = tmp_path / "result.json"
    assert main(["knn", str(run), "--data", str(photos), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "top-1" in captured.out and out.exists() and "kept" not in captured.out
    (line,) = [line for line in captured.err.splitlines() if "not kept" in line]
    assert line.startswith(f"not kept for the report of {run}: ") and "cannot be written" in line
    assert "not been judged" in results(caco.report(run, device="cpu"))[0]


def test_beside_must_name_a_run(photos, tmp_path):
    with pytest.raises(UsageError, match="there is no run in .*nowhere"):
        caco.knn("pixels", photos, beside=tmp_path / "nowhere")


def test_damaged_records_are_left_out(run, photos):
    caco.knn(run, photos)
    (run / "results" / "knn-0.json").write_text('{"judge": "knn"')
    (run / "results" / "knn-1.json").write_text("[1, 2]")
    (path,) = (path for path in (run / "results").iterdir() if len(path.stem) > 6)
    (run / "results" / "knn-2.json").write_text(json.dumps({**json.loads(path.read_text()), "top1_interval": None}))
    assert [row[0] for row in results(caco.report(run, device="cpu"))[1]] == ["this run"]


def test_two_commands_at_once_lose_nothing(run, photos):
    line = [sys.executable, "-m", "caco", "knn", str(run), "--data", str(photos), "--device", "cpu"]
    processes = [subprocess.Popen([*line, "--neighbours", count], stdout=subprocess.DEVNULL) for count in ("3", "5")]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert {comparison.how[:17] for comparison in read_comparisons(run)} == {"kNN, 3 neighbours", "kNN, 5 neighbours"}


def test_overwrite_deletes_them_with_the_run(run, photos):
    caco.knn(run, photos)
    caco.linear(run, photos, epochs=2)
    assert len(list((run / "results").iterdir())) == 2
    caco.pretrain(photos, run, **TINY, overwrite=True)
    assert not (run / "results").exists()
    assert any(pattern.startswith("results/") for pattern in WRITTEN)
