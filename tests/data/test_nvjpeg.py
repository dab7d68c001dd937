"""JPEG files decoded by a GPU: nearly the CPU's pixels, and what it refuses is left to the CPU. (Skipped where there is none.)"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from file_sets import jpeg, smooth, write_set

from caco.config import Views
from caco.data.broken import BrokenImages
from caco.data.decode import decode_rgb
from caco.data.file_maker import FromFiles
from caco.data.loader import TrainingViews
from caco.data.makers import FromSource, RandomViews
from caco.data.nvjpeg import can_decode, decode_jpegs
from caco.data.source import open_source
from caco.device import choose_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PLACE = "cuda"
LEVELS = 3.0
"""Average difference of both decoders on views of smooth pictures, of 255."""


def test_pictures_are_nearly_the_same_and_what_is_no_jpeg_is_refused():
    """Colours stored at half the size are smoothed in another way: 4.9 levels were seen on small pictures of strong colours."""
    device = choose_device(PLACE)
    assert can_decode(device)
    pictures = [smooth(0, 60, 90), smooth(1, 33, 47), smooth(2, 200, 120), smooth(3, 375, 500), smooth(4, 1201, 1603)]
    for halved, levels in ((2, 8.0), (0, 3.0)):
        files = [jpeg(picture, subsampling=halved) for picture in pictures]
        decoded = decode_jpegs([*files[:2], b"no picture at all", *files[2:]], device)
        assert decoded.pop(2) is None
        for data, ours in zip(files, decoded, strict=True):
            plain = torch.from_numpy(decode_rgb(data, "a picture").pixels).permute(2, 0, 1)
            assert ours.shape == plain.shape
            assert float((ours.cpu().float() - plain.float()).abs().mean()) < levels


def test_pictures_in_fresh_memory():
    """Of grey and progressive ones, too, which are left to threads: once, the lower part of a grey one was black."""
    device = choose_device(PLACE)
    pictures = [smooth(0, 375, 500), smooth(1, 200, 120).convert("L"), smooth(2, 61, 47), smooth(3, 1201, 1603)]
    files = [jpeg(picture, progressive=number == 2) for number, picture in enumerate(pictures)]
    plain = [torch.from_numpy(decode_rgb(data, "a picture").pixels).permute(2, 0, 1).float() for data in files]
    for _ in range(50):
        torch.cuda.empty_cache()
        for ours, theirs in zip(decode_jpegs(files, device), plain, strict=True):
            assert float((ours.cpu().float() - theirs).abs().mean()) < 8.0


@pytest.mark.parametrize("compiled", [False, True])
def test_views_are_nearly_those_of_threads(compiled, tmp_path):
    device = choose_device(PLACE)
    write_set(tmp_path / "set")
    source = open_source(tmp_path / "set")
    views = RandomViews(Views(size=32, small=1, small_size=16).augmentations(), (0.0,) * 3, (1.0,) * 3, seed=1)
    met = [BrokenImages(len(source), 0.5) for _ in range(2)]
    ours = FromFiles(source, views, met[0], device, compiled)
    plain = FromSource(source, views, met[1], device)
    with ThreadPoolExecutor(4) as pool:
        for epoch in range(3):
            indices = np.random.default_rng(epoch).permutation(len(source))
            both = ours(indices, epoch, pool), plain(indices, epoch, pool)
            again = ours(indices, epoch, pool)
            for one, other, same in zip(*both, again, strict=True):
                assert one.is_contiguous(memory_format=torch.channels_last) and one.device == other.device
                assert 255 * float((one - other).abs().mean()) < LEVELS
                assert torch.equal(one, same)
    assert len(met[0]) == len(met[1]) == 2


def test_batches_ahead_are_those_of_the_maker(tmp_path):
    """While the GPU is busy with other work, on a stream of their own: nvJPEG must not write into what is still read."""
    device = choose_device(PLACE)
    write_set(tmp_path / "set", plain=40)
    source = open_source(tmp_path / "set")
    loader = TrainingViews.create(
        source,
        Views(size=32).augmentations(),
        (0.0,) * 3,
        (1.0,) * 3,
        batch_size=8,
        seed=0,
        workers=4,
        device=device,
        broken=BrokenImages(len(source), 0.5),
    )
    maker = loader.gpu_maker()
    assert maker is not None
    loader.use(maker)
    busy = torch.randn(4096, 4096, device=device)
    expected = list(loader.order.epochs_and_indices(0, range(30)))
    seen = []
    for batch in loader.batches(0, 0, 30):
        busy = (busy @ busy).clamp(-1, 1)
        seen.append([view.clone() for view in batch.views])
    with ThreadPoolExecutor(4) as pool:
        for (epoch, indices), views in zip(expected, seen, strict=True):
            for one, other in zip(views, maker(indices, epoch, pool), strict=True):
                assert torch.equal(one, other)


def test_a_run_whose_files_the_gpu_decodes(tmp_path):
    write_set(tmp_path / "set", plain=40)
    command = [sys.executable, "-m", "caco", "pretrain", "--data", str(tmp_path / "set"), "--device", PLACE]
    command += ["--out", str(tmp_path / "run"), "--backbone", "resnet10_narrow", "--views.size", "32", "--epochs", "3"]
    command += ["--batch-size", "8", "--bank-size", "16", "--encoder.projector", "16", "--encoder.embedding", "8"]
    command += ["--engine.decoder", "gpu", "--engine.compile", "off", "--monitor.broken-share", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be had" not in done.stderr and "not used" not in done.stderr, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["engine"]["decoder"] == "gpu"
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines()[0].startswith("nothing.jpg")
