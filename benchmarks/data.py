"""The data path of one core: decoding, augmentation, both together, large photos, and listing of folders.

    python benchmarks/data.py [--quick] [--parts decode augment nvjpeg ...] [--rounds N] [--files N] [--device cpu]
                              [--out FILE.json]

Every contestant makes the two published views, from the same pictures, drawing its own parameters. Rates are of the
processor time of one thread (GPU and nvjpeg: of the clock, with nothing left to do), the median over rounds in which the
contestants take turns, so that a busy machine disturbs all alike. The first, compiling call is not counted. Contestants
that are not installed are left out (simplejpeg, numba, kornia).
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchvision
from measure import arguments, save
from numpy.typing import NDArray
from PIL import Image
from view_makers import Pictures, Run, caco_on_gpu, caco_views, kornia_views, one_by_one, pillow_view, tensor_view

from caco.config import Views
from caco.data import decode
from caco.data.augment import draw_parameters, render_views, render_with_numba, render_with_torch
from caco.data.decode import decode_rgb
from caco.data.folder import folder_source
from caco.data.parameters import largest_shrink
from caco.views import IMAGENET_MEAN, IMAGENET_STD

torch.set_num_threads(1)
PILLOW = "torchvision on Pillow"


def photos(count: int, height: int, width: int) -> list[NDArray[np.uint8]]:
    """Smooth colours with grain: as JPEG some 100 kB at 500 x 375, 3 MB at 4000 x 3000, as photographs have."""
    strength = 19 if height * width < 1_000_000 else 8
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
        grain = random.normal(0, strength, (min(height, 512), min(width, 512), 3))
        tiles = np.tile(grain, (-(-height // len(grain)), -(-width // grain.shape[1]), 1))[:height, :width]
        images.append(np.clip(np.asarray(coarse) + tiles, 0, 255).astype(np.uint8))
    return images


def jpegs(images: Pictures) -> list[bytes]:
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def contest(
    title: str, unit: str, contestants: dict[str, tuple[int, Run]], rounds: int, peer: str
) -> dict[str, object]:
    """Return and print the units per second of each contestant, (units of a call, call), and its ratio to `peer`."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (units, run) in contestants.items():
            on_gpu = name.endswith("on the GPU")
            clock = time.perf_counter if on_gpu else time.thread_time
            start = clock()
            run(turn)
            if on_gpu:
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                rates[name].append(units / (clock() - start))
    base = float(np.median(rates[peer]))
    print(f"\n{title}: {unit}/s of one core (least - most), and times {peer}")
    result: dict[str, object] = {}
    for name, values in rates.items():
        middle = float(np.median(values))
        print(f"  {name:30s}{middle:12,.0f}  {f'({min(values):,.0f} - {max(values):,.0f})':22s}{middle / base:7.2f} x")
        result[name] = {"per_second": middle, "least": min(values), "most": max(values), "ratio": middle / base}
    return result


# --- contestants: decoding --------------------------------------------------------------------------------------------


def by_pillow(file: bytes, shrink: int = 1) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(file))
    if shrink > 1:
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    return np.array(image.convert("RGB"))


def by_torchvision(file: bytes) -> torch.Tensor:
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8))


def decoders() -> dict[str, Callable[[bytes], object]]:
    named: dict[str, Callable[[bytes], object]] = {
        "Pillow": by_pillow,
        "Pillow, draft 1/2": partial(by_pillow, shrink=2),
        "torchvision.io": by_torchvision,
        "caco": partial(decode_rgb, key="picture"),
        "caco, shrink 2": partial(decode_rgb, key="picture", shrink=lambda height, width: 2),
    }
    if decode.simplejpeg is not None:
        named["simplejpeg"] = decode.simplejpeg.decode_jpeg
    return named


def measure_decoding(count: int, rounds: int) -> dict[str, object]:
    files = jpegs(photos(count, 375, 500))

    def each(work: Callable[[bytes], object], turn: int) -> None:
        for file in files:
            work(file)

    size = f"{np.mean([len(file) for file in files]) / 1000:.0f} kB"
    named = {name: (count, partial(each, work)) for name, work in decoders().items()}
    result = contest(f"decode a JPEG of 500x375, {size}", "images", named, rounds, "Pillow")
    threads = {}
    for workers in (1, 2):
        with ThreadPoolExecutor(workers) as pool:
            start = time.perf_counter()
            list(pool.map(named["caco"][1], range(8)))
            threads[workers] = 8 * count / (time.perf_counter() - start)
    print(f"  caco by the clock: one thread {threads[1]:,.0f} images/s, two threads {threads[2]:,.0f}")
    return {**result, "by_threads": threads}


def measure_nvjpeg(count: int, rounds: int, device: str) -> dict[str, object]:
    """Decode on the GPU, in one call for all, and by a thread for each core; rates by the clock."""
    files = jpegs(photos(64, 375, 500)) * (count // 64)
    encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {"nvJPEG on the GPU": [], f"caco, {cores} threads": []}
    with ThreadPoolExecutor(cores) as pool:
        works = (
            lambda: torchvision.io.decode_jpeg(encoded, device=device),
            lambda: list(pool.map(partial(decode_rgb, key="picture"), files)),
        )
        for turn in range(rounds + 1):
            both = list(zip(rates.values(), works, strict=True))
            for rate, work in both if turn % 2 else reversed(both):
                start = time.perf_counter()
                work()
                torch.cuda.synchronize()
                if turn:
                    rate.append(count / (time.perf_counter() - start))
    print(f"\ndecode {count:,} JPEGs of 500x375, images/s by the clock, median (least - most)")
    for name, rate in rates.items():
        print(f"  {name:20s}{np.median(rate):10,.0f}  ({min(rate):,.0f} - {max(rate):,.0f})")
    return dict(rates)


# --- views of decoded pictures: the contestants are in view_makers.py ---------------------------------------------------


def measure_views(
    size: int, shape: tuple[int, int], count: int, slow: int, rounds: int, device: str
) -> dict[str, object]:
    """count: pictures a call; slow: of those that take long."""
    augmentations, images = Views(size=size).augmentations(), photos(count, *shape)
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images[:slow]]
    contestants: dict[str, tuple[int, Run]] = {}
    if find_spec("numba"):
        contestants["caco, numba"] = count, caco_views(render_with_numba, images, augmentations)
    contestants["caco, torch"] = slow, caco_views(render_with_torch, images[:slow], augmentations)
    contestants[PILLOW] = (
        slow,
        one_by_one(pillow_view, [Image.fromarray(image) for image in images[:slow]], augmentations),
    )
    contestants["torchvision v2 on tensors"] = slow, one_by_one(tensor_view, list(tensors), augmentations)
    if find_spec("kornia"):
        contestants["kornia"] = slow, kornia_views(images[:slow], augmentations, "cpu")
    if device == "cuda":
        contestants["caco on the GPU"] = count, caco_on_gpu(images, augmentations)
        if find_spec("kornia"):
            contestants["kornia on the GPU"] = count, kornia_views(images, augmentations, "cuda")
    doubled = {name: (len(augmentations) * units, run) for name, (units, run) in contestants.items()}
    title = f"augment {shape[1]}x{shape[0]} to {size} px"
    return contest(title, "views", doubled, rounds, PILLOW)


# --- from a file to two views, and listing ----------------------------------------------------------------------------


def measure_files(size: int, shape: tuple[int, int], count: int, rounds: int) -> dict[str, object]:
    """Decode and make two views: with shrink as training does, without it, and as torchvision's users do."""
    augmentations, files = Views(size=size).augmentations(), jpegs(photos(count, *shape))

    def caco(shrinks: bool, epoch: int) -> None:
        for index, file in enumerate(files):
            shrink = partial(largest_shrink, augmentations, seed=0, epoch=epoch, index=index) if shrinks else None
            decoded = decode_rgb(file, "picture", shrink)
            for view, augmentation in enumerate(augmentations):
                drawn = draw_parameters(augmentation, *shape, seed=0, epoch=epoch, indices=[index], view=view)
                drawn = drawn.shrunk(np.array([decoded.factor]))
                render_views([decoded.pixels], drawn, augmentation, IMAGENET_MEAN, IMAGENET_STD)

    pipelines = [pillow_view(augmentation) for augmentation in augmentations]

    def peer(epoch: int) -> None:
        for file in files:
            picture = Image.open(io.BytesIO(file)).convert("RGB")
            for view in pipelines:
                view(picture)

    contestants: dict[str, tuple[int, Run]] = {
        "caco": (count, partial(caco, True)),
        "caco, decoded at full size": (count, partial(caco, False)),
        PILLOW: (count, peer),
    }
    return contest(f"decode {shape[1]}x{shape[0]} and make two {size} px views", "images", contestants, rounds, PILLOW)


def measure_listing(files: int) -> dict[str, object]:
    """List a folder of empty files in folders of 1,000, then again from the index that the first listing wrote."""
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        for folder in range(files // 1000):
            os.makedirs(f"{place}/images/{folder:04d}")
            for number in range(1000):
                os.close(os.open(f"{place}/images/{folder:04d}/{number:06d}.jpg", os.O_CREAT))
        for _ in range(2):
            start = time.perf_counter()
            source = folder_source(Path(place, "images"), "images", Path(place, "index.npz"))
            seconds.append((time.perf_counter() - start) * 1e5 / files)
            assert len(source) == files
    print(f"\nlist {files:,} files: {seconds[0]:.2f} s per 100,000; again, from the index: {seconds[1]:.2f} s")
    return {"files": files, "first": seconds[0], "again": seconds[1]}


PARTS = ("decode", "augment", "files", "listing", "nvjpeg")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="turns of each contestant (default: 15; 3 with --quick)")
    parser.add_argument("--files", type=int, help="files of the folder to list, in thousands of one folder each")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS[:4]), help="default: all but nvjpeg, for GPUs"
    )
    options = parser.parse_args()
    quick, parts = options.quick, options.parts
    rounds = options.rounds or (3 if quick else 15)
    pictures = (1024, 512, 256) if options.device == "cuda" else (256, 128, 32)
    start = time.perf_counter()
    if find_spec("numba"):
        import caco.data.kernel.views  # noqa: F401  (compiles, or loads what was compiled before)
    result: dict[str, object] = {"kernel_ready_seconds": time.perf_counter() - start}
    if "decode" in parts:
        result["decode"] = measure_decoding(4 if quick else 16, rounds)
    if "augment" in parts:
        result["augment"] = augmented = {}
        many, some, few = pictures
        for name, size, shape, count, slow in (
            ("32 px", 32, (32, 32), many, 16 if quick else 64),
            ("64 px", 64, (64, 64), some, 8 if quick else 32),
            ("224 px", 224, (375, 500), 8 if quick else few, 2 if quick else 8),
        ):
            augmented[name] = measure_views(size, shape, count, slow, rounds, options.device)
            save(options, result)
    if "files" in parts:
        result["file to views"] = {
            "224 px from 500x375": measure_files(224, (375, 500), 4 if quick else 16, rounds),
            "128 px from 4000x3000": measure_files(128, (3000, 4000), 1 if quick else 2, 2 if quick else 7),
        }
    if "listing" in parts:
        result["listing"] = measure_listing(options.files or (10_000 if quick else 100_000))
    if "nvjpeg" in parts:
        if options.device == "cpu":
            parser.error("--parts nvjpeg is for a GPU")
        result["nvjpeg"] = measure_nvjpeg(64 if quick else 1024, min(rounds, 5), options.device)
    save(options, result)


if __name__ == "__main__":
    main()
