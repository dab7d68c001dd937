"""What a run writes down: one JSON object a line, cut back on a resume, and console lines that are kept."""

import fcntl
import json
import os
import re
import select
import struct
import sys
import termios

import pytest

from caco.config import Views
from caco.errors import CacoError
from caco.train.journal import Forecast, Journal, ProgressBar, Stopwatch
from caco.train.step import warm_start_cost


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


@pytest.mark.parametrize("name", ["speed.jsonl", "train.log"])
def test_a_full_disk_is_told_with_the_file(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    journal = Journal(tmp_path)
    with pytest.raises(CacoError, match=rf"{name} cannot be written: No space left on device; free some space there"):
        journal.note("words") if name == "train.log" else journal.record_speed(1, 1.0, 0.0)
    journal.close()  # says nothing else in the place of that error


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


def test_without_a_terminal_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    journal = Journal(tmp_path)
    with ProgressBar(journal, steps=100, done=10) as bar:
        bar.advance()
        assert capsys.readouterr().err == "step 11/100 took 0.0 s\n"
        bar.show(11, "loss 1.000")
        assert capsys.readouterr().err == ""  # too soon
        monkeypatch.setattr(ProgressBar, "SECONDS_BETWEEN_LINES", -1.0)
        bar.advance()
        bar.show(12, "loss 0.900")
    journal.close()
    assert capsys.readouterr().err == "step 12/100 loss 0.900, 0:00 left\n"


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes sys.stderr a terminal of some columns; what is written there is what it returns."""
    opened = []

    def make(columns: int) -> int:
        main, end = os.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        opened.append(os.fdopen(end, "w"))
        monkeypatch.setattr(sys, "stderr", opened[-1])
        return main

    yield make
    for file in opened:
        file.close()


def read_all(terminal: int) -> str:
    """Return everything that was written to a terminal, which gives it out piece by piece."""
    pieces = []
    while select.select([terminal], [], [], 0.5)[0]:
        pieces.append(os.read(terminal, 100_000))
    return b"".join(pieces).decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_the_bar_has_its_room_and_is_gone_before_an_error(tmp_path, terminal, columns):
    main, journal = terminal(columns), Journal(tmp_path)

    def fail() -> None:
        with ProgressBar(journal, steps=12_000, done=4_000) as bar:
            for _ in range(2_000):
                bar.advance()
            bar.show(6_000, "loss 8.317, positive probability 0.017, 1,038.2 images/s, 100% waiting for data")
            bar._bar.refresh()
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        fail()
    journal.close()
    lines = read_all(main).split("\r")
    shown = max(lines, key=len)
    assert re.match(r" 50% \|.{20}\| 6000/12000, [0-9:]+ left, loss 8\.317", shown) and len(shown) <= columns
    assert columns < 120 or shown.rstrip().endswith("p(positive) 0.017, 1,038.2 images/s, 100% waiting")
    assert not lines[-1].strip() and not lines[-2].strip(), "the bar is still there"
    assert "step 4,001/12,000 took" in (tmp_path / "train.log").read_text()  # in the file only


def test_a_terminal_without_columns_gets_lines(tmp_path, terminal):
    main, journal = terminal(0), Journal(tmp_path)
    with ProgressBar(journal, steps=3, done=0) as bar:
        bar.advance()
    journal.close()
    assert os.read(main, 1000).decode() == "step 1/3 took 0.0 s\r\n"


@pytest.mark.parametrize(
    ("seconds", "new", "said"),
    [
        (2.4, True, "about 8 h to go at this speed; Ctrl-C saves, --resume goes on; --epochs 100 takes about an hour"),
        (2.4, False, "about 8 h to go at this speed; Ctrl-C saves, --resume goes on"),
        (600.0, True, "about 1995 h to go at this speed; Ctrl-C saves, --resume goes on"),
        (0.2, True, ""),
    ],
)
def test_a_long_run_is_foretold_once(monkeypatch, seconds, new, said):
    import time

    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    forecast, told = Forecast(15, new), []
    for step in range(1, 61):
        now[0] += seconds if step > 1 else 1e6  # the first step may compile
        told.append(forecast.note(12_000 - step, measured=step % 10 == 0))
    assert [text for text in told if text] == ([said] if said else [])
    assert told[29] == said


def test_the_warm_start_foretells_the_training(monkeypatch):
    """A step of the warm start with two views costs half a training step."""
    import time

    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cost, forecast, told = warm_start_cost(Views()), Forecast(15, new=True), []
    assert cost == 0.5
    for step in range(1, 41):
        now[0] += 1.2
        told.append(forecast.note(12_000 + (200 - step) * cost, measured=step % 10 == 0, cost=cost))
    assert [text for text in told if text] == [
        "about 8 h to go at this speed; Ctrl-C saves, --resume goes on; --epochs 100 takes about an hour"
    ]


def test_time_left_is_told_from_the_steps_of_this_start(tmp_path, capsys, monkeypatch):
    """A resumed run must not count the steps that were done before it started."""
    import time

    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path)
    bar = ProgressBar(journal, steps=1000, done=900)
    now[0] += 3600.0
    bar.show(910, "loss")  # 10 steps an hour, 90 to go
    journal.close()
    assert capsys.readouterr().err == "step 910/1,000 loss, 9:00:00 left\n"


def test_time_left_leaves_out_the_first_step_which_may_compile(tmp_path, capsys, monkeypatch):
    import time

    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path)
    bar = ProgressBar(journal, steps=101, done=0)
    now[0] += 60.0  # the first step compiles
    bar.advance()
    for _ in range(40):
        now[0] += 1.0
        bar.advance()
    bar.show(41, "loss")
    journal.close()
    assert capsys.readouterr().err == "step 1/101 took 60.0 s\nstep 41/101 loss, 1:00 left\n"


def test_stopwatch_counts_images_and_waiting(monkeypatch):
    import time

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow_batches():
        for _ in range(3):
            now[0] += 2.0  # loading
            yield object()

    clock = Stopwatch()
    for _ in clock.waiting(slow_batches()):
        now[0] += 6.0  # training
        clock.images += 12
    assert clock.take() == (pytest.approx(36 / 24), pytest.approx(6 / 24))
    now[0] += 5.0
    clock.images += 10
    assert clock.take() == (2.0, 0.0)  # started anew
