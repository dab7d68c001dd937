"""What a run writes down: one JSON object a line, cut back on a resume, and console lines that are kept."""

import json
import os
import sys
import time

import pytest

from caco.errors import CacoError
from caco.train.journal import Journal


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_json_lines(tmp_path):
    journal = Journal(tmp_path)
    journal.record("train", 10, loss=1.5, epoch=0)
    journal.record("knn", 10, top1=33.0)
    assert lines(tmp_path / "metrics.jsonl") == [  # readable while the run goes on
        {"kind": "train", "step": 10, "loss": 1.5, "epoch": 0},
        {"kind": "knn", "step": 10, "top1": 33.0},
    ]
    journal.record_speed(10, 123.456789, 0.123456)
    assert lines(tmp_path / "speed.jsonl") == [{"step": 10, "images_per_second": 123.46, "data_wait": 0.1235}]
    journal.close()


def test_a_resume_cuts_back_to_the_checkpoint(tmp_path):
    """What came after the checkpoint is done again; the file ends up as if nothing had happened."""
    journal = Journal(tmp_path)
    journal.record("train", 1, loss=3.0)
    length = journal.sync()
    assert length == (tmp_path / "metrics.jsonl").stat().st_size
    journal.record("train", 2, loss=2.0)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    journal.record("train", 3, loss=9.0)
    journal.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tr')  # killed while writing
    journal = Journal(tmp_path, length)
    journal.record("train", 2, loss=2.0)
    assert journal.sync() == len(whole)
    journal.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_new_run_starts_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "old"}\n')
    Journal(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_shorter_file_is_not_filled_with_zeros(tmp_path):
    """A user who deleted metrics.jsonl gets a shorter file, not one of null bytes."""
    journal = Journal(tmp_path, keep_bytes=500)
    journal.record("train", 1, loss=3.0)
    journal.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "loss": 3.0}]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["speed.jsonl", "train.log"])
def test_a_full_disk_is_told_with_the_file(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    journal = Journal(tmp_path)
    with pytest.raises(CacoError, match=rf"{name} cannot be written: No space left on device; free some space there"):
        journal.note("words") if name == "train.log" else journal.record_speed(1, 1.0, 0.0)
    journal.close()  # says nothing else in the place of that error


@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl", "train.log"])
def test_a_file_that_cannot_be_opened_is_told(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CacoError, match=rf"{name} cannot be written: Is a directory"):
        Journal(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /dev/full")
def test_records_that_cannot_be_brought_to_the_disk_are_told(tmp_path):
    journal = Journal(tmp_path)
    nowhere = os.open("/dev/full", os.O_WRONLY)
    os.dup2(nowhere, journal._metrics.fileno())  # as if the disk had gone: that device refuses to sync
    os.close(nowhere)
    with pytest.raises(CacoError, match=r"metrics\.jsonl cannot be written: Invalid argument"):
        journal.sync()
    journal.close()


def test_said_on_the_console_and_in_the_log(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.say("first")
    journal.close()
    journal = Journal(tmp_path)
    journal.say("second")
    journal.close()
    assert capsys.readouterr().err == "first\nsecond\n"
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == ["first", "second"]  # a resume adds to it


def test_tensorboard_has_the_same_numbers(tmp_path):
    journal = Journal(tmp_path, tensorboard=True)
    journal.record("train", 7, loss=2.5, note="text is left out")
    journal.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (7, 2.5)


def test_tensorboard_forgets_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    starts = [(None, (1, 2, 3), ()), (-8, (3, 4, 5, 10), (1, 2, 3, 4)), (2, (), (3, 4, 5))]
    for resumed_at, warm_start, training in starts:
        journal = Journal(tmp_path, tensorboard=True, warm_start_steps=10, resumed_at=resumed_at)
        for step in warm_start:
            journal.record("warm start", step, loss=float(step))
        for step in training:
            journal.record("train", step, loss=float(step))
        journal.close()
        time.sleep(1.1)  # files are read in the order of their names, which have whole seconds
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("warm start/loss")] == [-9, -8, -7, -6, -5, 0]
    assert [event.value for event in events.Scalars("warm start/loss")] == [1, 2, 3, 4, 5, 10]
