"""Checkpoints: whole or not there, the last few and the best, and a way around a damaged one."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from caco.backbone import create_backbone
from caco.config import EncoderOptions, Pretrain, Views
from caco.data.source import open_source
from caco.distributed.world import World
from caco.errors import CacoError, UsageError
from caco.train.checkpoint import CheckpointFolder, identity, read_checkpoint, remove_leftovers
from caco.train.prepare import create_state


def state(step):
    return {
        "step": step,
        "weight": torch.full((3,), float(step)),
        "nested": {"list": [1, 2.5, None, "a"], "tuple": (1,)},
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_what_is_saved_is_read_and_needs_no_trust(tmp_path):
    path = CheckpointFolder(tmp_path / "checkpoints", 2).save(state(5), 5)
    assert path.name == "step-00000005.pt"
    content = torch.load(path, weights_only=True)
    assert content == {"format": "caco-checkpoint-1", **content}
    read = read_checkpoint(path)
    assert torch.equal(read["weight"], state(5)["weight"])
    assert read["nested"] == state(5)["nested"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(tmp_path, keep):
    checkpoints = CheckpointFolder(tmp_path, keep)
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(state(step), step, best=step in (10, 30))
    expected = [f"step-000000{step}.pt" for step in (10, 20, 30, 40, 50)[-keep:]]
    assert names(tmp_path) == ["best.pt", *expected]
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 30
    assert checkpoints.latest().content["step"] == 50


def test_at_least_one_is_kept(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, 0)
    checkpoints.save(state(1), 1)
    assert checkpoints.latest().content["step"] == 1


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, 2)
    checkpoints.save(state(1), 7)
    checkpoints.save(state(2), 7)
    assert names(tmp_path) == ["step-00000007.pt"]
    assert checkpoints.latest().content["step"] == 2


def test_other_files_are_left_alone(tmp_path):
    others = ["best.pt", "mine.pt", "step-1.pt", "step-final.pt", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    checkpoints = CheckpointFolder(tmp_path, 1)
    for step in (1, 2):
        checkpoints.save(state(step), step)
    assert names(tmp_path) == sorted([*others, "step-00000002.pt"])


def test_order_is_by_number_not_by_spelling(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, 2)
    checkpoints.save(state(1), 99_999_999)
    checkpoints.save(state(2), 100_000_000)
    assert [path.stem for path in checkpoints.paths()] == ["step-99999999", "step-100000000"]
    assert checkpoints.latest().content["step"] == 2


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    checkpoints = CheckpointFolder(tmp_path, 1)
    checkpoints.save(state(1), 1)
    before = (tmp_path / "step-00000001.pt").read_bytes()
    monkeypatch.setattr(os, moment, lambda *arguments: (_ for _ in ()).throw(SystemError("killed")))
    for step in (1, 2):
        with pytest.raises(SystemError):
            checkpoints.save(state(9), step)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001.pt"]
    assert (tmp_path / "step-00000001.pt").read_bytes() == before
    assert checkpoints.latest().content["step"] == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "another version"])
def test_latest_falls_back_over_a_damaged_one(tmp_path, damage):
    checkpoints = CheckpointFolder(tmp_path, 3)
    for step in (1, 2, 3):
        path = checkpoints.save(state(step), step)
    if damage == "truncated":
        truncate(path)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_text("a text\n" * 50)
    else:
        torch.save({"format": "caco-checkpoint-99"}, path)
    latest = checkpoints.latest()
    assert (latest.path.name, latest.content["step"]) == ("step-00000002.pt", 2)
    assert len(latest.problems) == 1 and "step-00000003.pt" in latest.problems[0]


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_fall_back_new_checkpoints_stay(tmp_path, keep):
    """The damaged file has the highest number: it must not push out what is saved on the way back to it."""
    checkpoints = CheckpointFolder(tmp_path, keep)
    CheckpointFolder(tmp_path, 5).save(state(10), 10)
    truncate(CheckpointFolder(tmp_path, 5).save(state(20), 20))
    assert checkpoints.latest().content["step"] == 10
    checkpoints.save(state(15), 15)
    assert checkpoints.latest().content["step"] == 15
    assert names(tmp_path) == ["step-00000010.pt", "step-00000015.pt"][-keep:]


def test_none_that_can_be_read(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, 2)
    with pytest.raises(CacoError, match=r"no checkpoint to resume from: .* is empty\. Use --overwrite"):
        checkpoints.latest()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "backbone.safetensors").touch()
    with pytest.raises(CacoError, match=r"anew \(which deletes its finished backbone, too: .*backbone.safetensors\)\."):
        CheckpointFolder(tmp_path / "checkpoints", 1).latest()
    with pytest.raises(CacoError, match="no checkpoint to resume from"):
        CheckpointFolder(tmp_path / "none", 2).latest()
    truncate(checkpoints.save(state(1), 1))
    with pytest.raises(CacoError, match=r"step-00000001\.pt is not a torch file, or is damaged"):
        checkpoints.latest()


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    target = tmp_path / "it-ran"
    for path, write in (("a.pt", torch.save), ("b.pt", lambda content, path: path.write_bytes(pickle.dumps(content)))):
        write({"format": "caco-checkpoint-1", "step": Payload(target)}, tmp_path / path)
        with pytest.raises(UsageError, match="could run code"):
            read_checkpoint(tmp_path / path)
    assert not target.exists()


def test_foreign_files_are_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="not a checkpoint of this version of caco .*it says None"):
        read_checkpoint(tmp_path / "other.pt")


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    leftovers = [tmp_path / ".config.json.999999999.tmp", tmp_path / "checkpoints" / ".step-00000003.pt.999999999.tmp"]
    living = [tmp_path / f".metrics.{os.getpid()}.tmp", tmp_path / "results" / f".knn.json.{os.getppid()}.tmp"]
    theirs = [
        tmp_path / "notes.tmp",
        tmp_path / ".hidden",
        tmp_path / ".draft.tmp",
        tmp_path / "notes" / ".a.999999999.tmp",
    ]
    kept = [*living, *theirs, tmp_path / "checkpoints" / "step-00000003.pt"]
    for path in [*leftovers, *kept]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("renamed", [0, 1])
def test_killed_while_the_best_is_saved(tmp_path, monkeypatch, renamed):
    """Whatever was written, going on from there and saving again gives both files."""
    folder, rename, done = CheckpointFolder(tmp_path / "checkpoints", keep=2), os.replace, []

    def dies(source, target):
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        folder.save({"step": 3}, 3, best=True)
    assert not folder.paths()
    if renamed:
        assert folder.latest().content["step"] == 3  # from the best, which is the same
    monkeypatch.undo()
    folder.save({"step": 3}, 3, best=True)
    assert {path.name for path in folder.folder.iterdir()} == {"best.pt", "step-00000003.pt"}


def test_the_best_takes_no_room_of_its_own(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    path = folder.save(state(1), 1, best=True)
    assert path.samefile(tmp_path / "best.pt")
    folder.save(state(2), 2)
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_the_best_without_links(tmp_path, monkeypatch):
    """On a file system without hard links the best is a copy."""
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "not here")))
    path = CheckpointFolder(tmp_path, keep=1).save(state(1), 1, best=True)
    assert path.read_bytes() == (tmp_path / "best.pt").read_bytes() and not path.samefile(tmp_path / "best.pt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    """torch.save tells an error of its own; the user hears what the disk said, and keeps what there was."""
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1)
    monkeypatch.setattr("builtins.open", lambda path, mode, _open=open: _open("/dev/full", mode, buffering=0))
    with pytest.raises(
        CacoError, match=r"step-00000002\.pt cannot be written: No space left on device; free some space"
    ):
        folder.save(state(2), 2)
    monkeypatch.undo()
    assert folder.latest().content["step"] == 1


def test_how_a_device_moves_the_bank_is_its_own():
    """A GPU's run moves it by one kernel; resumed elsewhere, or a CPU's run resumed on a GPU, it is done as suits the place."""
    config = Pretrain(backbone="resnet10_narrow", views=Views(size=32), bank_size=64, encoder=EncoderOptions(8, 16))
    torch.manual_seed(0)
    world = World(torch.device("cpu"))
    here, there = (create_state(config, create_backbone("resnet10_narrow", 32), world) for _ in range(2))
    there.bank_optimizer.param_groups[0]["fused"] = True
    there.bank_optimizer.param_groups[0]["lr"] = 0.125
    here.load_state_dict(there.state_dict(world), world)
    assert here.bank_optimizer.param_groups[0]["fused"] is None
    assert here.bank_optimizer.param_groups[0]["lr"] == 0.125


def test_a_list_of_images_may_be_written_anew_when_they_have_moved(tmp_path):
    """Absolute names begin with where the images were."""
    digests = []
    for place in ("here", "there/below"):
        for name in ("a/1.jpg", "b/1.jpg"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(path)
        (tmp_path / "list.txt").write_text("".join(f"{tmp_path / place / name}\n" for name in ("b/1.jpg", "a/1.jpg")))
        digests.append(identity(open_source(tmp_path / "list.txt")))
    assert digests[0] == digests[1] and digests[0]["images"] == 2
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path / place / name}\n" for name in ("a/1.jpg", "b/1.jpg")))
    assert identity(open_source(tmp_path / "list.txt")) != digests[0]  # the last parts of the names are the same
