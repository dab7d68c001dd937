"""The list of broken images: complete, the same after a restart, and the end of a run that has too many."""

import threading
import time

import pytest
import torch
from PIL import Image

from caco.data.broken import BrokenImages
from caco.data.load import load_or_next
from caco.data.source import open_source
from caco.distributed.world import World
from caco.errors import CacoError


def test_listed_once_in_order(tmp_path):
    path = tmp_path / "skipped.txt"
    broken = BrokenImages(100, 0.5)
    broken.list_in(path)
    for key in ("b.jpg", "a.jpg", "b.jpg"):
        broken.add(key, f"reason of {key}")
    assert len(broken) == 2
    assert not path.exists()  # written when asked to: not once an image
    broken.write()
    assert path.read_text() == "a.jpg\treason of a.jpg\nb.jpg\treason of b.jpg\n"


def test_written_only_when_it_has_grown(tmp_path):
    path = tmp_path / "skipped.txt"
    broken = BrokenImages(100, 0.5)
    broken.list_in(path)
    broken.write()
    assert not path.exists()  # a healthy run has no list
    broken.add("a.jpg", "empty")
    broken.write()
    path.unlink()
    broken.write()
    assert not path.exists()
    broken.add("b.jpg", "empty")
    broken.write()
    assert len(path.read_text().splitlines()) == 2


def test_a_restart_goes_on_with_the_list(tmp_path):
    path = tmp_path / "skipped.txt"
    first = BrokenImages(10, 0.2)
    first.list_in(path)
    first.add("a.jpg", "empty: 0 bytes")
    first.add("b.jpg", "a reason\twith a tab")
    first.write()
    before = path.read_bytes()
    second = BrokenImages(10, 0.2)
    second.list_in(path)
    assert len(second) == 2
    second.add("a.jpg", "empty: 0 bytes")
    second.write()
    assert path.read_bytes() == before
    second.add("c.jpg", "the second that this start has met: b.jpg may be whole by now")
    with pytest.raises(CacoError):
        second.add("b.jpg", "the third")


def test_after_an_outage_a_run_can_go_on(tmp_path):
    path = tmp_path / "skipped.txt"
    first = BrokenImages(10, 0.2)
    first.list_in(path)
    for number in (0, 1):
        first.add(f"{number}.jpg", "cannot be read: the disk is away")
    with pytest.raises(CacoError):
        first.add("2.jpg", "cannot be read: the disk is away")
    second = BrokenImages(10, 0.2)
    second.list_in(path)
    second.add("1.jpg", "damaged: this one is")
    second.merge(World(torch.device("cpu")))  # before: "at least 3 of 10 images are broken"
    assert len(path.read_text().splitlines()) == 3
    for number in (0, 2):
        second.forget(f"{number}.jpg")
    second.write()
    assert path.read_text() == "1.jpg\tdamaged: this one is\n"
    second.forget("1.jpg")
    second.write()
    assert not path.exists()


def test_an_image_that_is_read_after_all_leaves_the_list(tmp_path):
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(path.with_name(name))
    source = open_source(path.parent)
    path.rename(tmp_path / "away.png")
    broken = BrokenImages(2, 0.5)
    load_or_next(source, 0, broken, source.load)
    assert len(broken) == 1
    (tmp_path / "away.png").rename(path)
    load_or_next(source, 0, broken, source.load)
    assert len(broken) == 0


@pytest.mark.parametrize(
    "key", ["caf\udce9.jpg", "a tab\tin.jpg", "a\nb\r.jpg", "line\u2028break.jpg", "naïve ☃.png", "form\x0cfeed.jpg"]
)
def test_any_file_name_can_be_listed(tmp_path, key):
    """Names need not be UTF-8 (Python holds the bytes as surrogates), and may hold what counts as a line's end."""
    path = tmp_path / "skipped.txt"
    broken = BrokenImages(10, 0.5)
    broken.list_in(path)
    broken.add(key, "empty")
    broken.write()
    again = BrokenImages(10, 0.5)
    again.list_in(path)
    assert len(again) == 1
    again.add(key, "empty")
    assert len(again) == 1
    again.forget(key)
    assert len(again) == 0


def test_the_share_itself_is_allowed_and_one_more_is_not(tmp_path):
    path = tmp_path / "skipped.txt"
    broken = BrokenImages(20, 0.1)
    broken.list_in(path)
    broken.add("a", "empty")
    broken.add("b", "empty")
    with pytest.raises(CacoError) as caught:
        broken.add("c", "empty")
    message = str(caught.value)
    assert (
        "at least 3 of 20 images are broken, more than the share of 0.1 that --monitor.broken-share allows" in message
    )
    assert f"those seen so far are in {path}" in message
    assert len(path.read_text().splitlines()) == 3
    assert caught.value.exit_status == 1


def test_without_a_file_the_error_names_one_of_them():
    broken = BrokenImages(4, 0.0)
    with pytest.raises(CacoError, match=r"among them a\.jpg: empty"):
        broken.add("a.jpg", "empty")
    broken.write()


def test_share_1_never_stops():
    broken = BrokenImages(3, 1.0)
    for key in "abc":
        broken.add(key, "empty")
    assert len(broken) == 3


def test_brought_together_while_threads_add():
    """A run does so at every checkpoint, with the next batches being made."""
    broken = BrokenImages(10**6, 1.0)
    over = threading.Event()

    def add():
        number = 0
        while not over.is_set():
            broken.add(f"{number}", "empty")
            number += 1

    thread = threading.Thread(target=add)
    thread.start()
    try:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            broken.merge(World(torch.device("cpu")))
    finally:
        over.set()
        thread.join()


def test_many_threads(tmp_path):
    broken = BrokenImages(10_000, 1.0)
    broken.list_in(tmp_path / "skipped.txt")

    def add(first):
        for number in range(first, 2000, 2):  # each key by two threads
            broken.add(f"{number // 2}", "empty")
            if number % 100 == first:
                broken.write()

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken.write()
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == len(broken) == 1000
