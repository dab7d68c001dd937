"""Published checkpoints: read safely and whole, and used wherever a file of weights is."""

import argparse
import functools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_imagenet import make_tree
from torchvision import models

import caco
from caco.backbone import create_backbone, projector
from caco.config import BankOptions, EncoderOptions, OptimizerOptions, Pretrain, Views
from caco.distributed.world import World
from caco.errors import UsageError
from caco.reference.checkpoint import from_ours, from_published, read_snapshot, to_published
from caco.train.prepare import create_state
from caco.train.start import start_from, take_over
from caco.train.state import TrainingState
from caco.weights import load_backbone, load_torch

D, K = 8, 32


def published_checkpoint() -> dict:
    """Return a file's contents, made as the published code does: torchvision's network, `fc` replaced by the projector."""
    made = dict(make_checkpoint())
    return {**made, "optimizer": dict(made["optimizer"]), "Memory_Bank": dict(made["Memory_Bank"])}


@functools.cache
def make_checkpoint() -> dict:
    torch.manual_seed(0)
    arch = "resnet18"

    def network() -> torch.nn.Module:
        model = models.get_model(arch)
        model.fc = projector(model.fc.in_features, 16, D)
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
        return model

    both = torch.nn.ModuleDict({"encoder_q": network(), "encoder_k": network()})
    parameters = list(both.parameters())
    return {
        "epoch": 90,
        "arch": arch,
        "best_acc": torch.tensor(61.5),
        "knn_acc": np.float64(55.25),
        "state_dict": {f"module.{name}": tensor for name, tensor in both.state_dict().items()},
        "optimizer": {
            "state": {n: {"mu": torch.randn(p.shape)} for n, p in enumerate(parameters[: len(parameters) // 2])},
            "param_groups": [
                {
                    **{"lr": 1.2, "weight_decay": 1.5e-6, "momentum": 0.9, "trust_coefficient": 0.001},
                    "params": list(range(len(parameters))),
                }
            ],
        },
        "Memory_Bank": {"W": torch.randn(D, K), "v": torch.randn(D, K)},
        "args": argparse.Namespace(lr=0.3, moco_t=np.float32(0.08), arch=arch),
    }


def small_checkpoint() -> dict:
    """The same with the projectors only: enough where nothing is loaded into a network."""
    content = published_checkpoint()
    content["state_dict"] = {name: tensor for name, tensor in content["state_dict"].items() if ".fc." in name}
    content["optimizer"]["state"] = {}
    return content


def config(**changes: object) -> Pretrain:
    return replace(
        Pretrain(
            backbone="resnet18",
            epochs=200,
            batch_size=8,
            bank_size=K,
            views=Views(size=32, evaluation_resize=32),
            encoder=EncoderOptions(embedding=D, projector=16, stem="standard"),
            bank=BankOptions(),
            optimizer=OptimizerOptions(),
        ),
        **changes,
    )


def new_state(settings: Pretrain) -> TrainingState:
    torch.manual_seed(1)
    backbone = create_backbone(settings.backbone, settings.views.size, settings.encoder.stem)
    return create_state(settings, backbone, World(torch.device("cpu")))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "checkpoint_best.pth.tar"
    torch.save(published_checkpoint(), path)
    return path


def test_numpy_numbers_and_argparse_leftovers_are_read(published):
    content = load_torch(published)
    assert content["knn_acc"] == 55.25 and type(content["knn_acc"]) is float
    assert content["args"] == argparse.Namespace(lr=0.3, moco_t=pytest.approx(0.08), arch="resnet18")


@pytest.mark.parametrize(
    "number", [np.float64(1.5), np.float32(-2), np.float16(3), np.int64(-7), np.uint8(9), np.bool_(True)]
)
def test_every_kind_of_numpy_number(number, tmp_path):
    torch.save({"n": number, "big": np.dtype(">f8").type(2)}, tmp_path / "numbers.pth")
    assert load_torch(tmp_path / "numbers.pth")["n"] == number


def test_names_of_numpy_1_and_2_are_both_known(tmp_path):
    """Old files say numpy.core, new ones numpy._core."""
    path = tmp_path / "file.pth"
    torch.save({"n": np.float64(2.5)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw or b"numpy.core.multiarray" in raw
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        path.write_bytes(raw.replace(b"numpy._core.multiarray", name))
        assert load_torch(path)["n"] == 2.5


class Runs:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("place", ["top", "namespace", "bank"])
def test_files_that_would_run_code_are_refused(place, tmp_path):
    content, mark = small_checkpoint(), tmp_path / "was run"
    evil = Runs(os.system, f"touch '{mark}'")
    if place == "top":
        content["evil"] = evil
    elif place == "namespace":
        content["args"] = argparse.Namespace(lr=evil)
    else:
        content["Memory_Bank"]["W"] = Runs(os.system, f"touch '{mark}'")
    torch.save(content, tmp_path / "evil.pth.tar")
    with pytest.raises(UsageError, match="is refused: it holds more than tensors"):
        read_snapshot(tmp_path / "evil.pth.tar")
    assert not mark.exists()


def test_numpy_objects_are_not_unpickled(tmp_path):
    torch.save({"n": np.array([1.0, 2.0])}, tmp_path / "array.pth")
    with pytest.raises(UsageError):
        load_torch(tmp_path / "array.pth")
    torch.save({"n": Runs(np.float64(0).__reduce__()[0], np.dtype("O"), b"12345678")}, tmp_path / "object.pth")
    with pytest.raises(UsageError):
        load_torch(tmp_path / "object.pth")


def test_the_backbone_is_torchvisions(published):
    """knn, linear and embed read it by the name that the file gives: the same features as torchvision's own model."""
    module, card = load_backbone(published)
    assert (card.backbone, card.stem, card.size, card.resize) == ("resnet18", "standard", 224, 256)
    theirs = models.resnet18()
    theirs.fc = torch.nn.Identity()
    prefix, contents = "module.encoder_q.", load_torch(published)["state_dict"]
    backbone = {k.removeprefix(prefix): v for k, v in contents.items() if k.startswith(prefix) and ".fc." not in k}
    # random statistics make no sensible network: variances must be positive
    for tensors in (module.state_dict(), backbone):
        for name, tensor in tensors.items():
            if name.endswith("running_var"):
                tensor.abs_()
    theirs.load_state_dict(backbone)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(module(images), theirs.eval()(images))


def test_import_and_export_is_the_identity(published):
    content = load_torch(published)
    del content["args"]
    again = to_published(from_published(content))
    assert list(again) == list(content)
    assert_same(again, content)


def test_import_into_a_run_and_export_is_the_identity(published):
    """File → networks, bank and optimizers of a run → checkpoint of ours → file."""
    state, settings = new_state(config()), config(weights=str(published), start_epoch=90)
    world = World(torch.device("cpu"))
    start_from(state, settings, steps_per_epoch=5, warm_start_steps=4, world=world)
    assert (state.step, state.warm_start_step) == (450, 4)
    ours = {**state.state_dict(world), "epoch": 90, "card": {"backbone": "resnet18"}}
    for group in ours["optimizer"]["param_groups"]:  # set anew in every step
        group["lr"] = 1.2
    content = load_torch(published)
    again = to_published(from_ours(ours))
    for part in ("epoch", "arch", "state_dict", "optimizer", "Memory_Bank"):
        assert_same(again[part], content[part])


def assert_same(one, other) -> None:
    if isinstance(other, dict):
        assert set(one) == set(other)
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, torch.Tensor) and other.ndim:
        assert torch.equal(one, other)
    elif isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_slots_are_the_columns_of_the_file(published):
    state = new_state(config())
    taken = take_over(state, read_snapshot(published))
    assert taken == ["backbone", "projector", "key encoder", "bank", "momenta"]
    bank = load_torch(published)["Memory_Bank"]
    weight = state.model.bank.weight
    assert torch.equal(weight[3], bank["W"][:, 3])
    assert torch.equal(state.bank_optimizer.state[weight]["momentum_buffer"][3], bank["v"][:, 3])
    keys = load_torch(published)["state_dict"]
    name = "module.encoder_k.fc.4.running_mean"
    assert torch.equal(state.model.key_encoder.projector[4].running_mean, keys[name])


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"bank_size": 16}, ["backbone", "projector", "key encoder", "momenta"]),
        ({"encoder": EncoderOptions(embedding=4, projector=16, stem="standard")}, ["backbone"]),
        ({"optimizer": OptimizerOptions(name="sgd")}, ["backbone", "projector", "key encoder", "bank"]),
    ],
    ids=["another bank", "another projector", "another optimizer"],
)
def test_what_does_not_fit_is_left_out(published, changes, taken):
    state = new_state(config(**changes))
    before = state.model.bank.weight.clone()
    assert take_over(state, read_snapshot(published)) == taken
    content = load_torch(published)["state_dict"]
    assert torch.equal(state.model.encoder.backbone.conv1.weight, content["module.encoder_q.conv1.weight"])
    if "bank" not in taken:
        assert torch.equal(state.model.bank.weight, before)
    if "key encoder" not in taken:
        pairs = zip(state.model.encoder.parameters(), state.model.key_encoder.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("missing", ["v", "W", "state_dict", "arch", "encoder_k"])
def test_a_file_without_a_part_is_refused_in_words(missing, tmp_path):
    content = small_checkpoint()
    if missing == "encoder_k":
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "encoder_k" not in k}
    else:
        (content if missing in content else content["Memory_Bank"]).pop(missing)
    torch.save(content, tmp_path / "part.pth.tar")
    with pytest.raises(UsageError, match="is not a whole checkpoint"):
        read_snapshot(tmp_path / "part.pth.tar")


def test_an_unknown_architecture_needs_a_name(tmp_path):
    content = {**published_checkpoint(), "arch": "my_net"}
    torch.save(content, tmp_path / "file.pth.tar")
    with pytest.raises(UsageError, match="does not say which model"):
        load_backbone(tmp_path / "file.pth.tar")
    assert load_backbone(tmp_path / "file.pth.tar", "resnet18")[1].backbone == "resnet18"


def test_commands_take_a_published_file(published, tmp_path, capsys):
    """knn, linear and embed by its path; pretrain --weights starts from all of it, without another warm start."""
    tree = make_tree(tmp_path / "imagenet")
    content = load_torch(published)
    for name, tensor in content["state_dict"].items():
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path)
    data, val = tree / "train", tree / "val"
    assert caco.knn(path, data=data, val=val, size=32)["val_images"] == 10
    assert caco.linear(path, data=data, val=val, size=32, epochs=1)["train_images"] == 24
    assert caco.embed(path, data=val, size=32, out=tmp_path / "features.npz").exists()
    capsys.readouterr()
    out = tmp_path / "run"
    caco.pretrain(
        data,
        out,
        backbone="resnet18",
        weights=path,
        epochs=1,
        batch_size=8,
        bank_size=K,
        views={"size": 32, "evaluation_resize": 32},
        encoder={"embedding": D, "projector": 16, "stem": "standard"},
        optimizer={"name": "lars", "warmup_epochs": 0},
    )
    assert "took over backbone, projector, key encoder, bank, momenta" in capsys.readouterr().err
    assert "warm start" not in (out / "metrics.jsonl").read_text()


def test_snapshot_of_a_file_with_an_encoder_only_is_none(tmp_path):
    torch.save({"state_dict": models.resnet18().state_dict(), "arch": "resnet18"}, tmp_path / "moco.pth")
    assert read_snapshot(tmp_path / "moco.pth") is None
