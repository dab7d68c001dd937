"""Who counts as lost: silence between machines does, silence on a busy machine does not. Real stores and processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

# Two processes at one store (argument 1), process 0 supervised or not (argument 2). Process 1 beats until it is
# stopped; process 0 says what it thinks of that.
SCRIPT = """
import sys, time
from caco.distributed.heartbeat import Heartbeat
from caco.distributed.membership import Membership
import caco.distributed.heartbeat as heartbeat
heartbeat.LOST_AFTER = 4.0
rank, port, supervised = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
Heartbeat(Membership(rank, 2, rank, "127.0.0.1", port, supervised), 60.0).start()
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture
def pair():
    """Return a function that starts both processes and returns them once they have seen each other."""
    started, stores = [], []

    def start(supervised: bool) -> list[subprocess.Popen[str]]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for rank in (0, 1):
            words = [sys.executable, "-c", SCRIPT, str(rank), str(stores[-1].port), str(supervised)]
            started.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for process in started[-2:]:
            assert process.stdout.readline() == "started\n"
        time.sleep(3)
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_that_falls_silent_is_named(pair):
    watcher, silent = pair(False)
    os.kill(silent.pid, signal.SIGSTOP)
    assert watcher.wait(timeout=15) == 76
    assert "process 1, " not in (said := watcher.stderr.read()) and "process 1 has given no sign of life" in said


def test_on_a_supervised_machine_silence_ends_nothing(pair):
    watcher, silent = pair(True)
    os.kill(silent.pid, signal.SIGSTOP)
    time.sleep(7)
    assert watcher.poll() is None


def test_who_did_not_run_itself_blames_nobody(pair):
    """Both are starved: they run for a moment now and then, never long enough for a sign of life to come through.

    Three attempts: a busy machine may let one of them run and starve the other, who is then rightly missed. Whoever
    counts the time in which it was stopped fails in each.
    """
    for _ in range(3):
        both = pair(False)
        starve(both)
        if both[0].poll() is None:
            return
    raise AssertionError(both[0].stderr.read())


def starve(both):
    """Stop both for 8 seconds, twice what is let pass; a second is rightly counted each time that one looks again."""
    for _ in range(2):
        for process in both:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(both[0].pid, signal.SIGCONT)
        time.sleep(0.1)
