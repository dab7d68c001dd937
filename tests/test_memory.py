"""What does not fit is told in a line, whoever notices it first."""

import os

import numpy as np
import pytest
import torch

from caco.cli import main
from caco.errors import CacoError
from caco.memory import free_memory, in_words, out_of_memory_is_told


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
