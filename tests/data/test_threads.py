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


@pytest.mark.parametrize(("count", "workers", "together"), [(200, 2, 5), (20, 4, 2), (7, 4, 1), (200, 1, 8), (0, 2, 1)])
def test_several_images_at_a_time(count, workers, together):
    """Of few images fewer, so that all threads have work; broken ones are left out wherever they stand."""
    handed, broken, lock = {}, [], threading.Lock()

    def view(index):
        with lock:
            handed.setdefault(threading.get_ident(), []).append(index)
        if index % 5 in (2, 3):
            raise BrokenImage(str(index), "made so")
        return -index

    stream = map_in_order(view, range(count), broken, depth=20, workers=workers)
    seen = []
    for index, result in stream:
        seen.append(index)
        assert result == -index and max(map(max, handed.values())) < index + 20 + together
    assert seen == [index for index in range(count) if index % 5 not in (2, 3)]
    assert broken == [(str(index), "made so") for index in range(count) if index % 5 in (2, 3)]
    for indices in handed.values():
        starts = [index for index in indices if index % together == 0]
        assert indices == [index for start in starts for index in range(start, min(start + together, count))]


def test_when_it_is_closed_hardly_more_is_done():
    done = []
    stream = map_in_order(lambda index: done.append(index) or index, range(1000), [], depth=32, workers=2)
    assert next(stream) == (0, 0)
    stream.close()
    assert len(done) <= 32


def test_an_error_in_a_thread_reaches_the_caller():
    def view(index):
        raise ZeroDivisionError(index)

    with pytest.raises(ZeroDivisionError):
        list(map_in_order(view, range(100), [], depth=10, workers=2))


def test_batched():
    assert list(batched(((i, 2 * i) for i in range(5)), 2)) == [([0, 1], [0, 2]), ([2, 3], [4, 6]), ([4], [8])]
    assert list(batched([], 2)) == []
