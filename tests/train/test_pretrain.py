"""The whole job in this process: what a run leaves behind, and how it goes wrong."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import caco
import caco.train.prepare as prepare_module
from caco.backbone import create_backbone
from caco.config import EncoderOptions, Pretrain, Views
from caco.data.arrays import ArraySource
from caco.data.order import epoch_order
from caco.data.source import open_source
from caco.errors import CacoError, Interrupted, UsageError
from caco.recipes import find_recipe
from caco.train.run_folder import read_config
from caco.winograd.network import can_use_winograd

SMALL = {
    "epochs": 2,
    "batch_size": 8,
    "bank_size": 16,
    "device": "cpu",
    "workers": 1,
    "views": {"size": 16},
    "encoder": {"projector": 16, "embedding": 8},
    "bank": {"warm_start_steps": 2},
    "optimizer": {"name": "lars"},
    "monitor": {"log_steps": 2, "knn_epochs": 1},
}


def pictures(count: int = 24, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_a_flat_folder_without_labels_gives_a_backbone_that_timm_loads(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = caco.pretrain(folder, tmp_path / "run", backbone="test_resnet", **SMALL)
    assert path == tmp_path / "run/export/backbone.safetensors"
    assert not records(tmp_path / "run", "knn"), "there are no labels to check with"
    standard = caco.load_backbone(tmp_path / "run")
    images = torch.rand(3, 3, 16, 16)
    model = timm.create_model("test_resnet", num_classes=0)
    if not isinstance(standard.get_submodule("maxpool") if hasattr(standard, "maxpool") else None, nn.Identity):
        model.load_state_dict(safetensors.torch.load_file(path))
        torch.testing.assert_close(model.eval()(images), standard(images))
    config = json.loads((tmp_path / "run/config.json").read_text())
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert config["epochs"] == 2 and len(environment) == 1 and environment[0]["packages"]["torch"] == torch.__version__


def test_own_module_and_own_images(tmp_path):
    own = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())  # [B, 6, H, W]
    source = ArraySource(pictures(), np.arange(24) % 2, ("even", "odd"))
    path = caco.pretrain(source, tmp_path / "run", backbone=own, **SMALL)
    assert set(safetensors.torch.load_file(path)) == set(own.state_dict())
    assert [r["epoch"] for r in records(tmp_path / "run", "knn")] == [0, 1]


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 64, 3, stride=2), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())


@pytest.mark.skipif(not can_use_winograd(), reason="numba is not installed")
def test_winograds_convolutions_train_the_same_and_leave_the_callers_module_as_it_was(tmp_path):
    torch.manual_seed(0)
    own, source, losses = wide(), ArraySource(pictures()), []
    kinds = [type(layer) for layer in own]
    for convolution in ("direct", "winograd"):
        out, module = tmp_path / convolution, copy.deepcopy(own)
        caco.pretrain(source, out, backbone=module, **SMALL, engine={"convolution": convolution})
        losses.append([record["loss"] for record in records(out, "train")])
        assert json.loads((out / "config.json").read_text())["engine"]["convolution"] == convolution
        assert [type(layer) for layer in module] == kinds
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    usual = find_recipe(str(tmp_path / "winograd")).engine
    assert (usual.convolution, usual.decoder) == ("auto", "auto"), "another machine may not have it"


@pytest.mark.skipif(not can_use_winograd(), reason="numba is not installed")
def test_a_run_that_cannot_start_leaves_the_callers_module_as_it_was(tmp_path):
    own, engine = wide(), {"convolution": "winograd", "checkpointing": True}
    with pytest.raises(UsageError, match="checkpointing"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone=own, **SMALL, engine=engine)
    assert [type(layer) for layer in own] == [type(layer) for layer in wide()]


def test_a_run_from_before_there_was_a_choice_of_convolutions_has_direct_ones(tmp_path):
    source, out = ArraySource(pictures()), tmp_path / "run"
    caco.pretrain(source, out, backbone="test_resnet", **SMALL)
    config = json.loads((out / "config.json").read_text())
    del config["engine"]["convolution"]
    (out / "config.json").write_text(json.dumps(config))
    assert read_config(out).engine.convolution == "direct"


def test_multi_crop_trains(tmp_path):
    views = {"size": 16, "small": 3, "small_size": 8, "small_area": (0.1, 0.4)}
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", **{**SMALL, "views": views})
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert losses and np.isfinite(losses).all()


def test_the_seed_decides_everything(tmp_path):
    source = ArraySource(pictures())
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        caco.pretrain(source, tmp_path / name, backbone="test_resnet", seed=seed, **SMALL)
    one, same, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    source = ArraySource(pictures())
    options = {**SMALL, "epochs": 6, "monitor": {"log_steps": 1, "knn_epochs": 0, "checkpoint_minutes": 0}}
    with pytest.raises(CacoError, match=r"not finite at step (\d+).*Last good checkpoint: step-\d+\.pt") as caught:
        caco.pretrain(
            source,
            tmp_path / "run",
            backbone="test_resnet",
            lr=1e30,
            **{**options, "optimizer": {"name": "sgd", "warmup_epochs": 0}, "bank": {"warm_start_steps": 0}},
        )
    assert caught.value.exit_status == 1
    for path in (tmp_path / "run/checkpoints").glob("step-*.pt"):
        saved = torch.load(path, weights_only=True)
        assert saved["meters"]["first_bad_step"] == 2**62
        assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())


def test_weights_that_are_not_finite_are_neither_saved_nor_delivered(tmp_path):
    """The last step of a run has a finite loss, and its update overflows: no later step would have told."""
    options = {**SMALL, "epochs": 1, "monitor": {"log_steps": 1, "knn_epochs": 0}, "bank": {"warm_start_steps": 0}}
    options |= {"batch_size": 24, "optimizer": {"name": "sgd", "warmup_epochs": 0, "weight_decay": 1e25}}
    with pytest.raises(CacoError, match="the weights are not finite at step 1; the run stops"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", lr=1e25, **options)
    assert not list((tmp_path / "run").rglob("*.pt")) and not (tmp_path / "run/export").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 1e-4}, "--lr 0.0001 grows over the run, for --optimizer.final-lr is 0.0024"),
        ({"bank": {"lr": 3.0}}, "--bank.lr 3 grows over the run, for --bank.final-lr is 15"),
        ({"lr": 1e-4, "optimizer": {"final_lr": 1e-6}}, ""),
    ],
)
def test_a_rate_that_grows_is_told(tmp_path, capfd, given, words):
    """Of a pair of rates one was given; the other is still that of the recipe."""
    bank = {"warm_start_steps": 1, **given.get("bank", {})}
    optimizer = {"warmup_epochs": 0, **given.get("optimizer", {})}
    options = {**SMALL, **given, "epochs": 1, "bank": bank, "optimizer": optimizer}
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", **options)
    said = capfd.readouterr().err
    assert words in said and ("grows over" in said) == bool(words)


@pytest.mark.parametrize("early", [0, 100])
def test_embeddings_that_hardly_differ_are_told_in_plain_words_once(early, tmp_path, capfd, monkeypatch):
    """Without a warm start and at a rate far too high, all images soon get nearly the same embedding; at first they may."""
    monkeypatch.setattr("caco.train.trainer.EARLY", early)
    options = {
        **SMALL,
        "epochs": 3,
        "batch_size": 64,
        "bank_size": 512,
        "encoder": {**SMALL["encoder"], "centred": False},
        "optimizer": {"name": "sgd", "warmup_epochs": 0},
    }
    bank = {"warm_start_steps": 0, "lr": 3000.0, "final_lr": 3000.0}
    source = ArraySource(pictures(128))
    caco.pretrain(source, tmp_path / "run", backbone="test_resnet", lr=3.0, **{**options, "bank": bank})
    said = capfd.readouterr().err
    assert records(tmp_path / "run", "train")[-1]["feature_spread"] < 0.2
    assert said.count("narrow cone") == (0 if early else 1)
    assert ("raise --bank.warm-start-steps" in said) == (not early)


def test_too_many_broken_images_stop_with_the_list(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(pictures(20)):
        Image.fromarray(pixels[: 12 + number % 3]).save(folder / f"{number:02}.png")
    for number in range(5):
        (folder / f"broken-{number}.jpg").write_bytes(b"")
    with pytest.raises(CacoError, match=r"images are broken.*skipped\.txt"):
        caco.pretrain(folder, tmp_path / "run", backbone="test_resnet", **SMALL)
    assert (tmp_path / "run/skipped.txt").read_text().count("broken-") >= 3


def test_after_an_outage_of_the_disk_a_run_goes_on(tmp_path):
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for number, pixels in enumerate(pictures(20)):
        Image.fromarray(pixels[: 12 + number % 3]).save(folder / f"{number:02}.png")
    options = {**SMALL, "monitor": {**SMALL["monitor"], "checkpoint_minutes": 0}}
    path = caco.pretrain(folder, run, backbone="test_resnet", **options)
    finished = path.read_bytes()
    path.unlink()
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    newest.unlink()
    # As a start leaves it that met the outage: more than the share of 0.1.
    (run / "skipped.txt").write_text("".join(f"{n:02}.png\tcannot be read: Input/output error\n" for n in range(5)))
    again = caco.pretrain(folder, run, backbone="test_resnet", resume=True, **options).read_bytes()
    assert again == finished
    listed = (run / "skipped.txt").read_text() if (run / "skipped.txt").exists() else ""
    assert listed.count("\n") < 5, "those read since are still listed"


def test_work_is_saved_before_too_many_broken_images_end_it(tmp_path):
    """Each process meets one broken image, which is allowed; both together, which is found at the checkpoint, are not."""
    folder, run = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for number, pixels in enumerate(pictures(20)):
        Image.fromarray(pixels[: 12 + number % 3]).save(folder / f"{number:02}.png")
    order = epoch_order(20, 0, 0)
    for number in (order[2], order[12]):
        (folder / f"{number:02}.png").write_bytes(b"")
    monitor = {**SMALL["monitor"], "checkpoint_minutes": 0, "broken_share": 0.05}
    options = {**SMALL, "batch_size": 20, "bank": {"warm_start_steps": 0}, "monitor": monitor}
    with pytest.raises(CacoError, match="at least 2 of 20 images are broken"):
        caco.pretrain(folder, run, backbone="test_resnet", distributed={"processes": 2}, **options)
    assert [path.name for path in (run / "checkpoints").glob("step-*.pt")] == ["step-00000001.pt"]


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(UsageError, match="--batch-size 6 or less"):
        caco.pretrain(ArraySource(pictures(6)), tmp_path / "run", backbone="test_resnet", **SMALL)


def test_parts_that_do_not_divide_the_batch(tmp_path):
    with pytest.raises(UsageError, match="--batch-size 8 cannot be divided"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", accumulate=3, **SMALL)


def test_accumulation_trains(tmp_path):
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", accumulate=2, **SMALL)
    assert records(tmp_path / "run", "train")[-1]["step"] == 6


def test_the_listing_is_kept_with_the_run_and_used_by_a_resume(tmp_path):
    folder = tmp_path / "photos"
    for number, pixels in enumerate(pictures()):
        path = folder / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    caco.pretrain(folder, tmp_path / "run", backbone="test_resnet", **SMALL).unlink()
    index = tmp_path / "run/index.npz"
    before = index.stat().st_mtime_ns
    caco.pretrain(folder, tmp_path / "run", resume=True)
    assert index.stat().st_mtime_ns == before


def test_a_run_starts_from_another_runs_folder(tmp_path, capfd):
    """From its latest checkpoint, which has the bank, too; without one from its finished backbone."""
    source, first = ArraySource(pictures()), tmp_path / "first"
    caco.pretrain(source, first, backbone="test_resnet", **SMALL)
    capfd.readouterr()
    caco.pretrain(source, tmp_path / "second", backbone="test_resnet", weights=first, **SMALL)
    said = capfd.readouterr().err
    assert (
        "took over backbone, projector, key encoder, bank, momenta; that bank takes the place of a warm start" in said
    )
    with pytest.raises(UsageError, match="lies in the run that overwrite=True deletes"):
        caco.pretrain(source, first, backbone="test_resnet", weights=first / "checkpoints", overwrite=True, **SMALL)
    shutil.rmtree(first / "checkpoints")
    caco.pretrain(source, tmp_path / "third", backbone="test_resnet", weights=first, **SMALL)
    assert "took over backbone\n" in capfd.readouterr().err
    with pytest.raises(UsageError, match="there is no run folder or file"):
        caco.pretrain(source, tmp_path / "fourth", backbone="test_resnet", weights=tmp_path / "none", **SMALL)


def test_weights_with_another_stem_name_the_option(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "tv.pth")
    options = {**SMALL, "backbone": "resnet18", "weights": tmp_path / "tv.pth"}
    with pytest.raises(UsageError, match=r"first convolution of 7 x 7.* 3 x 3.*use --encoder\.stem standard"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("warmup", "words"),
    [(10, "the learning rate never reaches --lr: it warms up over 10 epochs"), (2, "in the last epoch only"), (1, "")],
)
def test_a_warm_up_as_long_as_the_run_is_told(tmp_path, capfd, warmup, words):
    options = {**SMALL, "optimizer": {"warmup_epochs": warmup}}
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", backbone="test_resnet", **options)
    said = capfd.readouterr().err
    assert words in said and ("the learning rate" in said) == bool(words)
    assert np.isfinite([record["lr"] for record in records(tmp_path / "run", "train")]).all()


def test_the_log_tells_the_loss_of_every_epoch_and_a_finished_run_says_so(tmp_path, capfd):
    source, run = ArraySource(pictures()), tmp_path / "run"
    caco.pretrain(source, run, backbone="test_resnet", **SMALL)
    log = (run / "train.log").read_text()
    assert len(re.findall(r"epoch [12]/2: step [36], loss \d+\.\d+, .* images/s", log)) == 2
    assert log.endswith("the run is finished\n")
    capfd.readouterr()
    metrics = (run / "metrics.jsonl").read_bytes()
    caco.pretrain(source, run, resume=True)
    assert capfd.readouterr().err == "the run is finished; nothing to do\n"
    assert (run / "metrics.jsonl").read_bytes() == metrics


def folder_of(path, count=24, classes=2):
    """Write pictures, the same number for each class."""
    for number, pixels in enumerate(pictures(count)):
        place = path / str(number % classes) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    return path


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone": nn.Conv2d(3, 8, 3), "engine": {"checkpointing": True}},  # nothing to compute again
        {"weights": "nowhere.pt"},
        {"batch_size": 100},
    ],
)
def test_a_run_outlives_a_new_one_that_cannot_start(tmp_path, wrong):
    photos = folder_of(tmp_path / "photos")
    caco.pretrain(photos, tmp_path / "run", backbone="test_resnet", **SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    with pytest.raises(UsageError):
        caco.pretrain(photos, tmp_path / "run", overwrite=True, **{"backbone": "test_resnet", **SMALL, **wrong})
    assert {path: path.read_bytes() for path in before} == before


class GoesAway:
    """The images of a folder whose disk is taken away when the first has been read."""

    def __init__(self, folder):
        self.folder, self.away, self.source = folder, folder.with_name("away"), open_source(folder)
        self.name, self.labels, self.classes = self.source.name, self.source.labels, self.source.classes

    def __len__(self):
        return len(self.source)

    def key(self, index):
        return self.source.key(index)

    def load(self, index):
        pixels = self.source.load(index)
        self.folder.rename(self.away)
        return pixels


def test_a_check_that_fails_costs_no_epoch(tmp_path):
    """The kNN check cannot read its images; put right, or without it, the run goes on to what it would have been."""
    photos, val = folder_of(tmp_path / "photos"), folder_of(tmp_path / "val", 8)
    options = {"backbone": "test_resnet", **SMALL, "epochs": 1}
    caco.pretrain(photos, tmp_path / "whole", val=val, **options)
    going = GoesAway(val)
    with pytest.raises(
        CacoError, match="the kNN check after epoch 1 failed: none of the 8 images of .* can be read"
    ) as told:
        caco.pretrain(photos, tmp_path / "run", val=going, **options)
    assert str(told.value).endswith(
        ". Add --monitor.knn-epochs 0 (no kNN checks), or --val with other labelled images, to: "
        f"caco.pretrain(val=labelled, out='{tmp_path}/run', resume=True) in Python"
    )
    assert (tmp_path / "run/checkpoints/step-00000005.pt").exists()  # 2 of the warm start, 3 of the epoch
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    caco.pretrain(photos, tmp_path / "without", val=photos, resume=True, **{**options, "monitor": {"knn_epochs": 0}})
    going.away.rename(val)
    caco.pretrain(photos, tmp_path / "run", val=val, resume=True, **options)
    assert (tmp_path / "without/export/backbone.safetensors").exists()
    for name in ("metrics.jsonl", "export/backbone.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert records(tmp_path / "run", "knn") and (tmp_path / "run/checkpoints/best.pt").exists()


def test_val_that_cannot_be_read_is_told_before_the_run_begins(tmp_path):
    """Of a run that goes on, too. One good image is enough; without kNN checks none is needed."""
    photos, val = folder_of(tmp_path / "photos"), folder_of(tmp_path / "val", 8)
    options = {"backbone": "test_resnet", **SMALL, "epochs": 1}
    first, *others = sorted(val.rglob("*.png"), reverse=True)
    for path in others:
        path.write_bytes(b"broken")
    path = caco.pretrain(photos, tmp_path / "run", val=val, **options)
    path.unlink()
    first.write_bytes(b"broken")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    for out, resume in (("run", True), ("new", False)):
        with pytest.raises(UsageError) as told:
            caco.pretrain(photos, tmp_path / out, val=val, resume=resume, **options)
        assert str(told.value).startswith(f"--val: none of the 8 images of {val} can be read; the first, 0/0.png: ")
        assert str(told.value).endswith(". Name other labelled images, or add --monitor.knn-epochs 0 (no kNN checks)")
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "new").exists()
    caco.pretrain(photos, tmp_path / "new", val=val, **{**options, "monitor": {"knn_epochs": 0}})


def test_a_run_from_a_later_epoch_names_its_steps_as_they_are(tmp_path, capfd):
    """While the bank is filled, no step has been taken of the training, which begins at step 3 of 6."""
    options = {**SMALL, "epochs": 2, "start_epoch": 1, "backbone": "test_resnet"}
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", **options)
    said = capfd.readouterr().err
    assert "24 images of array: 1 of 2 epochs, 3 steps of 8 after a warm start of 2, " in said
    options |= {"optimizer": {"name": "sgd", "warmup_epochs": 0, "final_lr": 1e30}, "monitor": {"log_steps": 1}}
    options["bank"] = {"warm_start_steps": 6}
    with pytest.raises(CacoError, match=r"not finite at warm-start step [1-6]; the run stops"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "wild", lr=1e30, **options)


def press_ctrl_c_when_begun(out):
    """Do so as soon as the run in a folder has written a record."""

    def wait_and_press():
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        if (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        ):  # else the run has ended, and pytest would
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait_and_press, daemon=True).start()


@pytest.mark.parametrize(
    ("given", "go_on"),
    [
        ({}, "caco pretrain --out '{out}' --resume"),
        ({"data": ArraySource(pictures())}, "caco.pretrain(data=images, out='{out}', resume=True) in Python"),
        (
            {"val": ArraySource(pictures(), np.arange(24) % 2, ("0", "1")), "backbone": wide()},
            "caco.pretrain(val=labelled, backbone=module, out='{out}', resume=True) in Python",
        ),
    ],
    ids=["names", "images", "module"],
)
def test_a_stopped_run_tells_how_it_goes_on(tmp_path, given, go_on):
    """A folder's name with a blank is quoted; a shell cannot name what was given as an object."""
    out = tmp_path / "my first"
    start = {**SMALL, "start_epoch": 1, "backbone": "test_resnet", "bank": {"warm_start_steps": 1000}}
    press_ctrl_c_when_begun(out)
    with pytest.raises(Interrupted) as told:
        caco.pretrain(**{"data": folder_of(tmp_path / "photos"), "out": out, **start, **given})
    assert re.search(r"at warm-start step \d+ and saved to", str(told.value))
    assert str(told.value).endswith(f"; go on with: {go_on.format(out=out)}")
    assert re.search(r"at warm-start step \d+ and saved$", (out / "train.log").read_text().strip())


def test_a_folder_for_each_image_is_no_class(tmp_path, capfd):
    caco.pretrain(folder_of(tmp_path / "photos", classes=24), tmp_path / "run", backbone="test_resnet", **SMALL)
    assert "no kNN check while training: every class has only one image" in capfd.readouterr().err


def test_a_start_behind_the_end(tmp_path):
    with pytest.raises(UsageError, match="--start-epoch 900: nothing is left of 800 epochs"):
        caco.pretrain(ArraySource(pictures()), tmp_path / "run", **{**SMALL, "epochs": "auto"}, start_epoch=900)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_told(tmp_path, capfd):
    options = {"backbone": "test_resnet", **SMALL, "monitor": {**SMALL["monitor"], "checkpoint_minutes": 0}}
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", **options).unlink()
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    capfd.readouterr()
    caco.pretrain(ArraySource(pictures()), tmp_path / "run", resume=True, **options)
    assert re.search(rf"an earlier checkpoint is taken: .*{newest.name}", capfd.readouterr().err)


def test_a_console_that_is_gone_stops_nothing(tmp_path):
    photos = folder_of(tmp_path / "photos")
    arguments = ["--data", photos, "--out", tmp_path / "run", "--backbone", "test_resnet", "--views.size", "16"]
    arguments += ["--batch-size", "8", "--bank-size", "16", "--bank.warm-start-steps", "2", "--epochs", "3"]
    command = shlex.join([sys.executable, "-m", "caco", "pretrain", *map(str, arguments)])
    subprocess.run(["sh", "-c", f"{command} 2>&1 | head -1"], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run/export/backbone.safetensors").exists()


def test_skipped_images_and_an_unfinished_run_are_told(tmp_path, capfd):
    photos = folder_of(tmp_path / "photos")
    (photos / "0" / "0.png").write_bytes(b"broken")
    caco.pretrain(photos, tmp_path / "run", backbone="test_resnet", **SMALL)
    assert re.search(r"1 broken image skipped so far; which, and why: .*skipped\.txt", capfd.readouterr().err)
    shutil.rmtree(tmp_path / "run/export")
    caco.knn(tmp_path / "run", photos)
    assert "run is not finished: its latest checkpoint is used, step-" in capfd.readouterr().err
    caco.export(tmp_path / "run", out=tmp_path / "backbone.safetensors")
    assert "run is not finished: its latest checkpoint is used, step-" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "size", "stem", "is_said"),
    [
        ("resnet18", 64, "auto", True),
        ("resnet18", 32, "auto", False),
        ("resnet18", 96, "auto", False),
        ("resnet18", 64, "small", False),
        ("resnet10_narrow", 64, "auto", False),
    ],
)
def test_a_stem_that_costs_much_is_told(name, size, stem, is_said, capsys):
    config = Pretrain(backbone=name, views=Views(size=size), encoder=EncoderOptions(stem=stem))
    prepare_module._say_stem(config, create_backbone(name, size, stem))
    assert ("--encoder.stem standard" in capsys.readouterr().err) is is_said
