"""What does not fit is told in a line, whoever notices it first."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import caco
from caco.cli import exit_status, main
from caco.data.arrays import ArraySource
from caco.errors import CacoError
from caco.memory import free_in_groups, free_memory, in_words, out_of_memory_is_told


def test_free_memory_is_a_part_of_all_there_is():
    """In bytes: as kB it would be less than a thousandth."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total / 1000 < free_memory(torch.device("cpu")) <= total


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**52), lambda: np.empty(2**52), lambda: bytearray(2**62)])
def test_an_allocation_that_fails_is_told_with_what_to_do(allocate):
    with pytest.raises(CacoError, match=r"out of memory.*Lower what is large \(--batch-size"), out_of_memory_is_told():
        allocate()


def test_the_message_of_a_gpu_is_told_in_short():
    message = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which ..."
    with pytest.raises(CacoError, match=r"^out of memory \(2.50 GiB more were wanted\)\. "), out_of_memory_is_told():
        raise torch.OutOfMemoryError(message)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_is_told():
        raise RuntimeError("shape mismatch")


def test_what_does_not_fit_a_report_is_told(tmp_path, capsys):
    """A command without processes of its own, on a real run whose views have become as large as a country."""
    source = ArraySource(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    tiny = {"views": {"size": 16}, "encoder": {"projector": 16, "embedding": 8}, "monitor": {"knn_epochs": 0}}
    run = tmp_path / "run"
    caco.pretrain(source, run, backbone="test_resnet", epochs=1, batch_size=8, bank_size=16, device="cpu", **tiny)
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    config = json.loads((run / "config.json").read_text())
    config |= {"data": str(tmp_path / "picture.png"), "views": {**config["views"], "size": 10**7}}
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["report", str(run), "--device", "cpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("caco: out of memory (") and "Lower what is large" in line


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**52), lambda: bytearray(2**62)])
def test_every_program_tells_it(allocate, capsys):
    assert exit_status(lambda: bool(allocate()), "program") == 1
    assert capsys.readouterr().err.startswith("program: out of memory")


def test_bytes_in_words():
    assert in_words(3 * 2**30) == "3.0 GiB"
    assert in_words(2**29) == "512.0 MiB"


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--bank-size", str(10**15)], 2, "--bank-size 1000000000000000 x --encoder.embedding"),
        (["--encoder.projector", str(10**11)], 1, "out of memory ("),
        (["--encoder.projector", str(10**11), "--distributed.processes", "2"], 1, "out of memory ("),
        (["--engine.compile", "on", "--engine.checkpointing"], 2, "exclude each other"),
    ],
)
def test_the_command_line_ends_with_one_line(tmp_path, capfd, options, status, words):
    folder = tmp_path / "run"
    arguments = ["pretrain", "--data", "textures:300", "--backbone", "resnet10_narrow", "--out", str(folder)]
    arguments += ["--precision", "fp32", "--engine.layout", "channels_last", "--engine.compile", "off"]  # no trials
    assert main([*arguments, *options]) == status
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("caco: ")
    assert words in last
    assert not (folder / "checkpoints").exists()


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_the_limits_of_a_job_and_of_its_user_count(tmp_path):
    """As version 2 of cgroups tells them: of the group and of those it is in; cached files can be dropped."""
    processes, root = tmp_path / "cgroup", tmp_path / "root"
    processes.write_text("0::/user/job\n")
    write(root, memory__stat="anon 5\ninactive_file 0\n")
    write(root / "user", memory__max="max\n", memory__current="900\n")
    write(
        root / "user/job",
        memory__max="1000\n",
        memory__current="700\n",
        memory__stat="anon 5\ninactive_file 60\nactive_file 40\n",
    )
    assert list(free_in_groups(processes, root)) == [400]
    (root / "user/memory.max").write_text("950\n")
    (root / "user/memory.stat").write_text("inactive_file 0\n")
    assert list(free_in_groups(processes, root)) == [400, 50]


def test_the_limit_of_a_container_of_version_one(tmp_path):
    """Whose path is the host's, which is not seen inside: its own group is at the top."""
    processes, root = tmp_path / "cgroup", tmp_path / "root"
    processes.write_text("4:memory:/docker/f219\n3:cpu,cpuacct:/docker/f219\n")
    write(
        root / "memory",
        memory__limit_in_bytes="800\n",
        memory__usage_in_bytes="300\n",
        memory__stat="total_inactive_file 7\n",
    )
    assert list(free_in_groups(processes, root)) == [507]
    assert list(free_in_groups(tmp_path / "none", root)) == []
