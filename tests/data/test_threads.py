"""Work on images in threads: ahead of its use but not too far, and in order."""

import threading
import time

import pytest

from caco.data.decode import BrokenImage
from caco.data.threads import batched, map_in_order


def test_decoding_runs_ahead_but_not_too_far():
    started, broken = [], []
    release = threading.Event()

    def view(index):
        started.append(index)
        assert release.wait(10)
        if index == 1:
            raise BrokenImage("one", "made so")
        return -index

    stream = map_in_order(view, range(30), broken, depth=5, workers=3)
    first = threading.Thread(target=lambda: seen.append(next(stream)))
    seen = []
    first.start()
    while len(started) < 3:
        time.sleep(0.001)
    release.set()
    first.join()
    assert seen == [(0, 0)]
    while len(started) < 5:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(started) == list(range(5))  # index 5 is asked for only when another view is taken
    assert next(stream) == (2, -2)
    assert broken == [("one", "made so")]
    stream.close()
    assert len(started) < 30


def test_an_error_in_a_thread_reaches_the_caller():
    def view(index):
        raise ZeroDivisionError(index)

    with pytest.raises(ZeroDivisionError):
        list(map_in_order(view, range(100), [], depth=10, workers=2))


def test_batched():
    assert list(batched(((i, 2 * i) for i in range(5)), 2)) == [([0, 1], [0, 2]), ([2, 3], [4, 6]), ([4], [8])]
    assert list(batched([], 2)) == []
