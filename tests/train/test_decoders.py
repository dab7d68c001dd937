"""Who decodes: threads as long as they keep up, the GPU where a step is the faster for it, and only in a long run."""

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
from caco.data import loader as loader_module
from caco.data.broken import BrokenImages
from caco.data.loader import TrainingViews
from caco.data.makers import FromSource
from caco.data.source import open_source
from caco.train import decoders
from caco.train.decoders import choose_decoder, step_seconds
from caco.train.run_folder import as_decided, read_config

RESOLVED = Pretrain(precision="fp32", engine=replace(Pretrain().engine, layout="channels_last", compile="off"))
MANY = 10_000


class Loader(TrainingViews):
    """A loader whose makers take given times."""

    def __init__(self, threads: float, gpu: float | None, has_files: bool = True) -> None:
        self.maker, self.taken, self.has_files = "threads", {"threads": threads, "gpu": gpu}, has_files
        self.order, self.device = SimpleNamespace(share=256), torch.device("cpu")
        self.asked: list[tuple[str, int]] = []

    @property
    def has_files_for_gpu(self) -> bool:
        return self.has_files

    def gpu_maker(self) -> str | None:
        self.asked.append(("is there one?", 0))
        return None if self.taken["gpu"] is None else "gpu"

    def seconds(self, maker: str, first_step: int = 0) -> float:
        self.asked.append((maker, first_step))
        if self.taken[maker] == FULL:
            raise torch.OutOfMemoryError("too little")
        return self.taken[maker]


FULL = -1.0
"""The GPU's memory is."""


@pytest.mark.parametrize(
    ("threads", "gpu", "step", "steps", "chosen", "tried"),
    [
        (0.5, 0.1, 1.0, MANY, "cpu", False),  # threads keep up
        (0.9, 0.1, 1.0, MANY, "cpu", False),
        (2.0, 0.1, 1.0, MANY, "gpu", True),
        (2.0, 0.9, 1.0, MANY, "gpu", True),
        (2.0, 1.1, 1.0, MANY, "cpu", True),  # it would have no time for the training
        (2.0, FULL, 1.0, MANY, "cpu", True),
        (0.5, 0.1, 0.4, 500, "cpu", False),  # a short run
        (2.0, None, 1.0, MANY, "cpu", False),
    ],
)
def test_it_is_measured(threads, gpu, step, steps, chosen, tried, monkeypatch):
    """And neither reads what the other has read: files come faster a second time."""
    loader, said = Loader(threads, gpu), []
    monkeypatch.setattr(decoders, "step_seconds", lambda *work: step)
    decoder, why = choose_decoder(RESOLVED, loader, nn.Identity(), steps, said.append)
    assert decoder == chosen and ("the GPU" in why) == (tried and gpu != FULL)
    assert loader.asked[0] == ("threads", 0)
    assert (("gpu", 3) in loader.asked) == tried == bool(said)


@pytest.mark.parametrize(("steps", "has_files"), [(10, True), (MANY, False)])
def test_nothing_is_tried_in_a_run_of_few_steps_or_without_files(steps, has_files):
    loader = Loader(2.0, 0.1, has_files)
    assert choose_decoder(RESOLVED, loader, nn.Identity(), steps, print) == ("cpu", "")
    assert not loader.asked


@pytest.mark.parametrize(
    ("asked", "gpu", "chosen", "told"), [("cpu", 0.1, "cpu", 0), ("gpu", 9.0, "gpu", 0), ("gpu", None, "cpu", 1)]
)
def test_what_is_asked_for_is_taken_where_it_can_be_had(asked, gpu, chosen, told):
    loader, said = Loader(1.0, gpu), []
    config = replace(RESOLVED, engine=replace(RESOLVED.engine, decoder=asked))
    assert choose_decoder(config, loader, nn.Identity(), MANY, said.append) == (chosen, "")
    assert len(said) == told and not [maker for maker, _ in loader.asked if maker in loader.taken]


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
    two = step_seconds(config, loader, backbone, False)
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


class Other(FromSource):
    """In the place of the GPU's maker, for there is no GPU: it counts its batches."""

    made = 0

    def __call__(self, *work: object) -> list[torch.Tensor]:
        Other.made += 1
        return super().__call__(*work)


def test_what_was_chosen_decodes_and_a_run_that_goes_on_with_it_holds_nothing(tmp_path: Path, monkeypatch, capfd):
    def other(loader: TrainingViews) -> Other:
        maker = loader.maker
        assert isinstance(maker, FromSource)
        return Other(maker.source, maker.views, maker.broken, maker.device)

    held = []
    monkeypatch.setattr(TrainingViews, "gpu_maker", other)
    monkeypatch.setattr(loader_module, "_is_for_gpu", lambda *place: True)
    monkeypatch.setattr(loader_module, "decode_whole_set", lambda *work: held.append(work))
    monkeypatch.setattr(decoders, "_faster", lambda *work: ("gpu", "images decoded by the GPU, as it is told"))
    monkeypatch.setattr(decoders, "FEW_STEPS", 1)
    write_set(tmp_path / "set")
    options = {"backbone": "resnet10_narrow", "views.size": 32, "epochs": 4, "batch_size": 8, "bank_size": 16}
    options |= {"encoder.projector": 16, "encoder.embedding": 8, "device": "cpu", "monitor.broken_share": 0.2}
    caco.pretrain(tmp_path / "set", out=tmp_path / "run", **options)
    assert read_config(tmp_path / "run").engine.decoder == "gpu" and len(held) == 1
    assert "images decoded by the GPU, as it is told" in capfd.readouterr().err
    assert Other.made >= 4
    saved, Other.made = read_config(tmp_path / "run"), 0
    resumed = as_decided(replace(saved, engine=replace(saved.engine, decoder="auto")), saved)
    assert resumed.engine.decoder == "gpu"
    monkeypatch.setattr(decoders, "_faster", lambda *work: ("cpu", ""))
    caco.pretrain(tmp_path / "set", out=tmp_path / "other", **options, **{"engine.decoder": resumed.engine.decoder})
    assert Other.made >= 4 and len(held) == 1, "what might be held now is not"
