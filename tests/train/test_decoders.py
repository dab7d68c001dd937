"""Who decodes: threads as long as they keep up, the GPU where it is faster by enough, and only in a long run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from file_sets import write_set
from torch import nn

import caco
from caco.backbone import create_backbone
from caco.config import Pretrain
from caco.data.broken import BrokenImages
from caco.data.loader import TrainingViews
from caco.data.source import open_source
from caco.train import decoders
from caco.train.decoders import choose_decoder, step_seconds
from caco.train.run_folder import read_config

RESOLVED = Pretrain(precision="fp32", engine=replace(Pretrain().engine, layout="channels_last", compile="off"))
MANY = 10_000


class Loader(TrainingViews):
    """A loader whose makers take given times."""

    def __init__(self, threads: float, gpu: float | None) -> None:
        self.maker, self.taken = "threads", {"threads": threads, "gpu": gpu}
        self.order = SimpleNamespace(share=256)
        self.asked: list[str] = []

    def gpu_maker(self) -> str | None:
        return None if self.taken["gpu"] is None else "gpu"

    def seconds(self, maker: str) -> float:
        self.asked.append(maker)
        return self.taken[maker]


@pytest.mark.parametrize(
    ("threads", "gpu", "step", "steps", "chosen", "tried"),
    [
        (0.5, 0.1, 1.0, MANY, "cpu", False),  # threads keep up
        (0.9, 0.1, 1.0, MANY, "gpu", True),
        (2.0, 0.1, 1.0, MANY, "gpu", True),
        (2.0, 1.9, 1.0, MANY, "cpu", True),  # not faster by enough
        (2.0, 0.1, 1.0, 100, "cpu", False),  # a short run
        (2.0, None, 1.0, MANY, "cpu", False),
    ],
)
def test_it_is_measured(threads, gpu, step, steps, chosen, tried, monkeypatch):
    loader, said = Loader(threads, gpu), []
    monkeypatch.setattr(decoders, "step_seconds", lambda *work: step)
    assert choose_decoder(RESOLVED, loader, nn.Identity(), steps, said.append)[0] == chosen
    assert ("gpu" in loader.asked) == tried == bool(said)


@pytest.mark.parametrize(
    ("asked", "gpu", "chosen", "told"), [("cpu", 0.1, "cpu", 0), ("gpu", 9.0, "gpu", 0), ("gpu", None, "cpu", 1)]
)
def test_what_is_asked_for_is_taken_where_it_can_be_had(asked, gpu, chosen, told):
    loader, said = Loader(1.0, gpu), []
    config = replace(RESOLVED, engine=replace(RESOLVED.engine, decoder=asked))
    assert choose_decoder(config, loader, nn.Identity(), MANY, said.append) == (chosen, "")
    assert len(said) == told and not loader.asked


def test_times_are_of_real_batches_and_passes(tmp_path: Path):
    write_set(tmp_path / "set")
    source, views = open_source(tmp_path / "set"), replace(RESOLVED.views, size=32)
    loader = TrainingViews.create(
        source,
        views.augmentations(),
        views.mean,
        views.std,
        batch_size=8,
        seed=0,
        workers=2,
        device=torch.device("cpu"),
        broken=BrokenImages(len(source), 0.5),
    )
    assert loader.gpu_maker() is None
    assert 0 < loader.seconds(loader.maker) < 10
    config, backbone = replace(RESOLVED, views=views), create_backbone("resnet10_narrow", 32)
    before = torch.get_rng_state()
    two = step_seconds(config, loader, backbone)
    assert 0 < two < 60 and torch.equal(before, torch.get_rng_state())


def test_without_a_gpu_it_is_told_and_threads_decode(tmp_path: Path, capfd):
    write_set(tmp_path / "set")
    options = {"backbone": "resnet10_narrow", "views.size": 32, "epochs": 1, "batch_size": 8, "bank_size": 16}
    options |= {"encoder.projector": 16, "encoder.embedding": 8, "engine.decoder": "gpu", "device": "cpu"}
    caco.pretrain(tmp_path / "set", out=tmp_path / "run", **{"monitor.broken_share": 0.2}, **options)
    assert "--engine.decoder gpu cannot be had" in capfd.readouterr().err
    assert read_config(tmp_path / "run").engine.decoder == "cpu"
    path = tmp_path / "run" / "config.json"
    older = json.loads(path.read_text())
    del older["engine"]["decoder"]  # of a run from before there was a choice
    path.write_text(json.dumps(older))
    assert read_config(tmp_path / "run").engine.decoder == "cpu"
