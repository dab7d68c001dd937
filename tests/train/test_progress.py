"""How far a run is: a bar on a terminal, else lines now and then; the forecast, and the speed."""

import fcntl
import os
import re
import select
import struct
import sys
import termios
import time

import pytest

from caco.config import Views
from caco.train.journal import Journal
from caco.train.progress import Forecast, ProgressBar, Stopwatch
from caco.train.step import warm_start_cost


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

    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path)
    bar = ProgressBar(journal, steps=1000, done=900)
    now[0] += 3600.0
    bar.show(910, "loss")  # 10 steps an hour, 90 to go
    journal.close()
    assert capsys.readouterr().err == "step 910/1,000 loss, 9:00:00 left\n"


def test_time_left_leaves_out_the_first_step_which_may_compile(tmp_path, capsys, monkeypatch):

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
