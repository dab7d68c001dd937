"""The list of broken images: complete, the same after a restart, and the end of a run that has too many."""

import threading

import pytest

from caco.data.broken import BrokenImages
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
    with pytest.raises(CacoError):
        second.add("c.jpg", "the third of ten")


@pytest.mark.parametrize("key", ["caf\udce9.jpg", "line\u2028break.jpg", "naïve ☃.png", "form\x0cfeed.jpg"])
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
