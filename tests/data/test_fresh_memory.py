"""What nvJPEG wrote to memory that is fresh from the driver is decoded anew. A stand-in for the GPU; on one: test_nvjpeg.py."""

from types import SimpleNamespace

import pytest
import torch
import torchvision.io

from caco.data import nvjpeg


class Driver:
    """Gives memory: at each decoding as many times as it is told."""

    def __init__(self, gives: list[int]) -> None:
        self.gives, self.given, self.decoded, self.waited = list(gives), 0, [], 0

    def decode(self, encoded, mode, device):
        assert self.waited == len(self.decoded) + 1, "the stream must be done first"
        self.decoded.append([bytes(file.numpy()) for file in encoded])
        self.given += self.gives.pop(0)
        return [torch.full((3, 2, 2), len(self.decoded), dtype=torch.uint8) for _ in encoded]

    def wait(self) -> None:
        self.waited += 1


@pytest.mark.parametrize(
    ("gives", "tries"),
    [([0], 1), ([2, 0], 2), ([1, 1, 0], 3), ([1, 1, 1], 3)],
    ids=["cached", "fresh", "twice", "always"],
)
def test_what_is_in_fresh_memory_is_decoded_anew(gives, tries, monkeypatch):
    driver = Driver(gives)
    monkeypatch.setattr(torchvision.io, "decode_jpeg", driver.decode)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=driver.wait))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"segment.all.allocated": driver.given})
    pictures = nvjpeg.decode_jpegs([b"one", b"two"], torch.device("cpu"))
    assert [int(picture[0, 0, 0]) for picture in pictures] == [tries, tries]  # of the last time, each once
    assert driver.decoded == [[b"one", b"two"]] * tries
