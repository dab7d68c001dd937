"""The README's commands, token for token, train for real; then linear.py judges what they leave."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_imagenet import README, README_LINEAR, make_tree, readme, smaller

from caco.reference import linear, main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def checkpoint(tree, tmp_path_factory):
    """The published checkpoint that the README's first command leaves."""
    logs = tmp_path_factory.mktemp("train_log")
    assert main.main([*readme("imagenet-200-b1024"), *smaller(tree, logs)]) == 0
    return run_folder(logs) / "checkpoint_0001.pth.tar"


def run_folder(logs: Path) -> Path:
    (folder,) = (logs / "ImageNet").iterdir()
    return folder


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)


@pytest.mark.parametrize("name", README)
def test_each_readme_command_trains(name, tree, tmp_path, capsys):
    assert main.main([*readme(name), *smaller(tree, tmp_path)]) == 0
    printed = capsys.readouterr().out
    folder = run_folder(tmp_path)
    assert printed.startswith(f"caco pretrain --recipe {name.partition(',')[0]} ") and str(folder) in printed
    assert len(losses(folder)) == 2 and all(value > 0 for value in losses(folder))
    assert "(--bank.lr and --bank.final-lr are per 65,536 slots; with 32 the bank's rates are 3 and 3," in printed
    checkpoint = last_checkpoint(folder)
    assert checkpoint["epoch"] == 2 and checkpoint["arch"] == "test_resnet" and checkpoint["knn_acc"] > 0
    assert checkpoint["Memory_Bank"]["W"].shape == (8, 32)
    views = json.loads((folder / "config.json").read_text())["views"]
    assert (views["large"], views["small"]) == ((2, 6) if "multicrop" in name else (2, 0))


def test_the_programs_at_the_root(tree, tmp_path):
    """`python3 main.py …` and `python linear.py …` from the project's root; the first as two processes, as on two GPUs."""

    def run(program: str, arguments: list[str]) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, program, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    said = run("main.py", [*readme("imagenet-200-b1024"), *smaller(tree, tmp_path, "--nproc=2")])
    assert "--distributed.processes 2" in said[0] and "2 processes" in said[1] and "of 10 images" in said[1]
    checkpoint = run_folder(tmp_path) / "checkpoint_0001.pth.tar"
    words = shlex.split(README_LINEAR.format(checkpoint=checkpoint, data=tree))
    words += ["-a", "test_resnet", "--epochs", "3", "--size", "32", "--lr", "10"]
    *_, last = run("linear.py", words)[0].splitlines()
    assert last.startswith(" * Acc@1 ") and " Acc@5 100.000" in last
    folder = checkpoint.parent / "linear_lars" / "bs_4096" / "lr_10.000" / "wd_0.0"
    result = json.loads((folder / "result.json").read_text())
    assert f" * Acc@1 {result['top1']:.3f} " in last and result["val_images"] == 10 and result["train_images"] == 24


def test_linear_judges_a_written_classifier_again(tree, checkpoint, capsys):
    words = ["--data", str(tree), "--pretrained", str(checkpoint), "-b", "24"]
    assert linear.main([*words, "--epochs", "1"]) == 0
    *_, trained = capsys.readouterr().out.splitlines()
    assert linear.main([*words, "--evaluate"]) == 0
    assert capsys.readouterr().out == trained + "\n"
    written = checkpoint.parent / "linear_lars" / "bs_24" / "lr_0.100" / "wd_0.0" / "checkpoint.pth.tar"
    content = torch.load(written, weights_only=True)
    assert set(content) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "classes", "card"}
    assert content["card"]["size"] == 32  # as main.py trained it, which its file says
    assert content["state_dict"]["module.fc.weight"].shape == (2, 96)
    assert linear.main(["--data", str(tree), "--resume", str(written), "-e"]) == 0
    assert capsys.readouterr().out == trained + "\n"


def test_a_written_classifier_keeps_its_classes(tree, checkpoint, tmp_path, capsys):
    """Whatever folders stand beside the images it judges."""
    words = ["--pretrained", str(checkpoint), "-b", "8", "--lr", "100"]
    assert linear.main(["--data", str(tree), *words, "--epochs", "3"]) == 0
    folder = checkpoint.parent / "linear_lars" / "bs_8" / "lr_100.000" / "wd_0.0"
    other = shutil.copytree(tree, tmp_path / "other")
    for split in ("train", "val"):
        shutil.rmtree(other / split / "n01440764")
        shutil.copytree(other / split / "n01443537", other / split / "n02")
        for number in range(2):
            (other / split / "n02" / f"{number}.JPEG").write_bytes(b"nonsense")
    capsys.readouterr()
    assert linear.main(["--data", str(other), *words, "-e"]) == 2
    assert "has the class 'n02', which the training images lack" in capsys.readouterr().err
    for split in ("train", "val"):
        (other / split / "n02").rename(other / split / "n01440764")
    for path in (other / "val" / "n01440764").glob("n*"):
        path.unlink()
    (other / "val" / "n01440764" / "one.JPEG").write_bytes((tree / "val/n01440764/n01440764_0.JPEG").read_bytes())
    assert linear.main(["--data", str(other), *words, "-e"]) == 0
    said = capsys.readouterr()
    assert "2 of 8 images were skipped, the first: n01440764/0.JPEG" in said.err
    content = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    del content["classes"], content["card"]  # as the published code leaves it
    torch.save(content, tmp_path / "theirs.pth.tar")
    shutil.copytree(tree / "train" / "n01443537", other / "train" / "n02")
    assert linear.main(["--data", str(other), "-e", "--resume", str(tmp_path / "theirs.pth.tar"), "--size", "32"]) == 2
    assert "is a classifier of 2 classes" in capsys.readouterr().err


def test_linear_refuses_another_architecture(tree, checkpoint, capsys):
    """The published code loads what fits and says nothing."""
    assert linear.main(["-a", "resnet50", "--data", str(tree), "--pretrained", str(checkpoint)]) == 2
    assert "holds a test_resnet, not a resnet50" in capsys.readouterr().err


def test_the_same_command_goes_on_with_its_run(tree, tmp_path, capsys):
    """As the published code does; put back by an epoch, it ends as if it had never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main.main([*readme("imagenet-200-b1024"), *smaller(tree, whole)]) == 0
    assert main.main([*readme("imagenet-200-b1024"), *smaller(tree, parts)]) == 0
    folder = run_folder(parts)
    last, *_ = sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True)
    last.unlink()  # back to the end of the first epoch
    capsys.readouterr()
    assert main.main([*readme("imagenet-200-b1024"), *smaller(tree, parts)]) == 0
    said = capsys.readouterr()
    assert "holds a run of the same settings, which goes on" in said.err and "--resume" in said.out
    one, other = last_checkpoint(run_folder(whole)), last_checkpoint(folder)
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])
    assert torch.equal(one["Memory_Bank"]["v"], other["Memory_Bank"]["v"])
    for path in (folder / "checkpoints").glob("step-*.pt"):
        path.unlink()  # somebody has made room; the result is there
    starts = (folder / "environment.json").read_text()
    assert main.main([*readme("imagenet-200-b1024"), *smaller(tree, parts)]) == 0
    assert "nothing to do" in capsys.readouterr().err and (folder / "environment.json").read_text() == starts
    assert torch.equal(last_checkpoint(folder)["Memory_Bank"]["v"], other["Memory_Bank"]["v"])


def test_resume_from_a_published_checkpoint_goes_on_at_its_epoch(tree, checkpoint, tmp_path, capsys):
    """Epoch, networks, bank, velocity and momenta all come from the file; there is no second warm start."""
    words = [*readme("imagenet-200-b1024"), *smaller(tree, tmp_path, "--resume", str(checkpoint), "--epochs=3")]
    assert main.main(words) == 0
    said = capsys.readouterr()
    assert "going on from" in said.err and "2 epochs done" in said.err
    assert "took over backbone, projector, key encoder, bank, momenta" in said.err
    assert f"--weights {checkpoint}" in said.out and "--start-epoch 2" in said.out
    records = [json.loads(line) for line in (run_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert not [record for record in records if record["kind"] == "warm start"]
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [2]
