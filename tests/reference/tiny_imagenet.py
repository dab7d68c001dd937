"""A tree laid out like ImageNet, and the commands of the published README, token for token."""

import shlex
from pathlib import Path

import numpy as np
from PIL import Image

SINGLE = (
    "--type=0 --lr=0.3 --lr_final=0.003 --memory_lr=3.0 --memory_lr_final=3.0 --cluster=65536 --moco_t=0.08 --mem_t=0.08 "
    "--data=datasets/imagenet --dist_url=tcp://{host}:10001 --batch_size={batch} --wd=1.5e-6 --mem_wd=0 --moco_dim=256 "
    "--moco_m=0.99 --moco_m_decay=1 --mlp_dim=2048 --epochs={epochs} --warmup_epochs=10 --nodes_num={nodes} "
    "--workers={workers} --world_size {machines} --rank={rank} --mem_momentum=0.9 --ad_init=1 --knn_batch_size={knn_batch} "
    "--multi_crop={multi} --knn_freq={knn}"
)
FOUR = {
    "batch": 4096,
    "epochs": 200,
    "nodes": 1,
    "workers": 128,
    "machines": 4,
    "knn_batch": 1024,
    "multi": 0,
    "knn": 20,
}
MULTI = {
    "batch": 2048,
    "epochs": 800,
    "nodes": 4,
    "workers": 128,
    "machines": 4,
    "knn_batch": 2048,
    "multi": 1,
    "knn": 50,
}
README = {
    # README 1.1, 1.2 (first machine, others), 2 (first machine, others); [master_id] and [rank_id] are filled in.
    "imagenet-200-b1024": SINGLE.format(
        host="localhost",
        batch=1024,
        epochs=200,
        nodes=1,
        workers=32,
        machines=1,
        rank=0,
        knn_batch=1024,
        multi=0,
        knn=10,
    ),
    "imagenet-200-b4096": SINGLE.format(host="localhost", rank=0, **FOUR),
    "imagenet-200-b4096, machine 3": SINGLE.format(host="10.0.0.1", rank=3, **FOUR),
    "imagenet-800-multicrop-b2048": SINGLE.format(host="localhost", rank=0, **MULTI),
    "imagenet-800-multicrop-b2048, machine 2": SINGLE.format(host="10.0.0.1", rank=2, **MULTI),
}
README_LINEAR = (
    "-a resnet50 --lr 0.025 --batch-size 4096 --pretrained {checkpoint} --dist-url 'tcp://localhost:10001' "
    "--multiprocessing-distributed --world-size 1 --rank 0 --data {data}"
)


def readme(name: str) -> list[str]:
    """Return the flags of one of the README's pre-training commands."""
    return shlex.split(README[name])


def smaller(data: Path, logs: Path, *more: str) -> list[str]:
    """Return the overrides that are appended to a command: data, epochs, batch, sizes, bank, one machine."""
    return [
        *(
            f"--data={data}",
            f"--log_path={logs}",
            "-a",
            "test_resnet",
            "--epochs=2",
            "--warmup_epochs=1",
            "--batch_size=8",
        ),
        *("--cluster=32", "--moco_dim=8", "--mlp_dim=16", "--size=32", "--size_crops", "32", "16", "--workers=2"),
        *("--world_size", "1", *more),
    ]


def make_tree(folder: Path) -> Path:
    """Write train/ and val/ with two classes of small noisy JPEGs each: one dark, one bright."""
    generator = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 5)):
        for name, low in (("n01440764", 0), ("n01443537", 130)):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(low, low + 100, (36 + number, 44, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}_{number}.JPEG")
    return folder
