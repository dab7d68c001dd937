"""Weights in and out of files: every usual form gives the same features, and nothing in a file is ever run."""

import io
import json
import pickle
import random
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from caco.backbone import adopt_backbone, create_backbone
from caco.data.augment import centre_view
from caco.errors import CacoError, UsageError
from caco.weights import (
    BackboneCard,
    download_weights,
    load_backbone,
    load_into,
    load_torch,
    read_weights,
    save_backbone,
    strip_prefix,
)

SIZE = 32
CARD = BackboneCard(backbone="test_resnet", size=SIZE, resize=36, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), step=7)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    module = create_backbone("test_resnet", SIZE)
    for name, buffer in module.named_buffers():  # statistics that a mistake would show in
        if name.endswith("running_mean"):
            buffer.normal_()
    return module.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def assert_same_features(module, backbone, images):
    with torch.no_grad():
        assert torch.equal(module.eval()(images), backbone(images))


def test_our_file_says_all_that_is_needed(tmp_path, backbone, images):
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, backbone, CARD)
    module, card = load_backbone(path)
    assert card == CARD
    assert not module.training
    assert_same_features(module, backbone, images)


def test_the_same_weights_are_the_same_file(tmp_path, backbone):
    """Byte for byte, in every process: safetensors orders several header entries at random."""
    for name in "abcdefgh":
        save_backbone(tmp_path / name, backbone, CARD)
    assert len({(tmp_path / name).read_bytes() for name in "abcdefgh"}) == 1


def test_our_file_is_plain_safetensors_with_timms_names(tmp_path, backbone):
    import timm

    save_backbone(tmp_path / "backbone.safetensors", backbone, CARD)
    tensors = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    timm.create_model("test_resnet", num_classes=0).load_state_dict(tensors, strict=True)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (64, 73), (32, 32)])
def test_timm_prepares_pictures_as_we_do(tmp_path, size, resize):
    import timm.data

    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((300, 260), Image.Resampling.BICUBIC)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    card = BackboneCard(backbone="test_resnet", size=size, resize=resize, mean=mean, std=std)
    save_backbone(tmp_path / "b.safetensors", create_backbone("test_resnet", size), card)
    module, _ = load_backbone(tmp_path / "b.safetensors")
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(module))
    ours = torch.from_numpy(centre_view(np.asarray(picture), resize, size).copy()).permute(2, 0, 1) / 255
    ours = (ours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert prepare(picture).shape == (3, size, size)
    assert (prepare(picture) - ours).abs().mean() < 0.02  # crop and resize in one, or one after the other


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_the_stem_comes_back(tmp_path, stem):
    """Whatever the size says: the card holds the stem, and a foreign file is recognised by its first kernel."""
    torch.manual_seed(0)
    backbone, images = create_backbone("resnet18", SIZE, stem).eval(), torch.randn(2, 3, SIZE, SIZE)
    save_backbone(tmp_path / "a.safetensors", backbone, BackboneCard("resnet18", stem, size=SIZE, resize=SIZE))
    assert_same_features(load_backbone(tmp_path / "a.safetensors")[0], backbone, images)
    torch.save(backbone.state_dict(), tmp_path / "a.pt")
    module, card = load_backbone(tmp_path / "a.pt", "resnet18", SIZE)
    assert (card.stem, card.size) == (stem, SIZE)
    assert_same_features(module, backbone, images)


def published_checkpoint(state):
    encoders = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    encoders |= {f"module.encoder_k.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    encoders |= {f"module.encoder_q.fc.{number}.weight": torch.zeros(2, 2) for number in (0, 1, 3, 4, 6)}
    bank = {"W": torch.zeros(4, 8), "v": torch.zeros(4, 8)}
    return {"epoch": 200, "arch": "test_resnet", "state_dict": encoders, "best_acc": 0.5, "Memory_Bank": bank}


FORMS = {
    "state dict": lambda state: state,
    "with a classifier": lambda state: {**state, "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)},
    "published checkpoint": published_checkpoint,
    "data parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "container": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "ours, in the middle": lambda state: {
        "format": "caco-checkpoint-1",
        "model": {
            **{f"encoder.backbone.{name}": tensor for name, tensor in state.items()},
            **{f"key_encoder.backbone.{name}": torch.zeros_like(tensor) for name, tensor in state.items()},
            "encoder.projector.0.weight": torch.zeros(2, 2),
            "bank.weight": torch.zeros(4, 4),
        },
    },
    "MoCo v3": lambda state: {
        "state_dict": {
            **{f"module.base_encoder.{name}": tensor for name, tensor in state.items()},
            **{f"module.momentum_encoder.{name}": torch.zeros_like(tensor) for name, tensor in state.items()},
            "module.base_encoder.fc.0.weight": torch.zeros(2, 2),
            "module.predictor.0.weight": torch.zeros(2, 2),
        }
    },
    "SwAV": lambda state: {
        **{f"module.{name}": tensor for name, tensor in state.items()},
        "module.projection_head.0.weight": torch.zeros(2, 2),
        "module.prototypes.weight": torch.zeros(2, 2),
    },
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "no counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        *((form, ending) for form in FORMS for ending in (".pth", "old.pt")),
        *((form, ".safetensors") for form in ("state dict", "with a classifier", "data parallel", "no counters")),
    ],
)
def test_every_usual_form_gives_the_same_features(tmp_path, backbone, images, form, ending):
    content, path = FORMS[form](backbone.state_dict()), tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=ending == ".pth")
    module, card = load_backbone(path, "test_resnet", SIZE)
    # A published file names its model, and was trained on views of 224 px.
    expected = (224, 256) if form == "published checkpoint" else (SIZE, SIZE)  # small pictures are not enlarged first
    assert (card.backbone, card.size, card.resize) == ("test_resnet", *expected)
    assert_same_features(module, backbone, images)


def test_a_published_file_says_which_model_it_holds(tmp_path, backbone, images):
    path = tmp_path / "checkpoint_best.pth.tar"
    torch.save(published_checkpoint(backbone.state_dict()), path)
    assert_same_features(load_backbone(path)[0], backbone, images)
    with pytest.raises(UsageError, match="holds a test_resnet, not a resnet18"):
        load_backbone(path, "resnet18")
    torch.save({**published_checkpoint(backbone.state_dict()), "arch": "my_net"}, path)
    with pytest.raises(UsageError, match="does not say which model it holds"):
        load_backbone(path)


def test_a_file_without_a_card_needs_a_name(tmp_path, backbone):
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="does not say which model it holds; name it with --backbone"):
        load_backbone(tmp_path / "weights.pt")


def test_own_modules_are_loaded_into_not_built(tmp_path, images):
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_backbone(tmp_path / "own.safetensors", own, BackboneCard("own"))
    with pytest.raises(UsageError, match="load_weights"):
        load_backbone(tmp_path / "own.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    load_into(other, read_weights(tmp_path / "own.safetensors")[0], "own")
    assert_same_features(other, own.eval(), images)


# --- files that do not fit -------------------------------------------------------------------------------------------


def test_misfits_name_the_first_keys(backbone):
    def problem(tensors) -> str:
        fresh = create_backbone("test_resnet", SIZE)
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        with pytest.raises(UsageError) as caught:
            load_into(fresh, tensors, "some.pt")
        assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())  # not in part
        return str(caught.value)

    state = backbone.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    fewer = {name: tensor for name, tensor in state.items() if name not in names[:5]}
    assert problem(fewer) == f"some.pt does not fit the backbone: it lacks {', '.join(names[:3])} and 2 more"
    assert "it has unknown extra.weight" in problem({**state, "extra.weight": torch.zeros(1)})
    name = names[0]
    wrong = {**state, name: torch.zeros(1, 2)}
    assert f"another shape: {name} (1, 2) for {tuple(state[name].shape)}" in problem(wrong)
    assert "lacks" in problem({"fc.weight": torch.zeros(3, 3)})


def test_another_model_does_not_fit(tmp_path, backbone):
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=r"weights\.pt does not fit the backbone"):
        load_backbone(tmp_path / "weights.pt", "test_vit", SIZE)


# --- files that are not what they should be --------------------------------------------------------------------------


class Payload:
    """A pickle that runs code: it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "hidden among weights"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, backbone, protocol):
    target, path = tmp_path / "it-ran", tmp_path / "evil.pt"
    if protocol == "torch":
        torch.save({"state_dict": Payload(target)}, path)
    elif protocol == "hidden among weights":
        torch.save({**backbone.state_dict(), "zzz": Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"conv1.weight": Payload(target)}, protocol=protocol))
    pickle.loads(pickle.dumps(Payload(target))).close()  # it is a real one
    assert target.exists()
    target.unlink()
    for read in (load_torch, read_weights, lambda path: load_backbone(path, "test_resnet", SIZE)):
        with pytest.raises(UsageError) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1
        if protocol:
            assert "is refused: it holds more than tensors, and loading it could run code" in str(caught.value)
    assert not target.exists()


def test_whole_modules_are_refused(tmp_path, backbone):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UsageError, match="more than tensors"):
        read_weights(tmp_path / "module.pt")


def as_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("photo.txt", "not weights")
    return buffer.getvalue()


def as_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, vectors=np.zeros(3))
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "one byte": b"\x80",
    "text": b"hello, this is no network\n" * 9,
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(300),
    "zip": as_zip(),
    "npz": as_npz(),
    "random": random.Random(0).randbytes(4000),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_foreign_files(tmp_path, kind, ending):
    path = tmp_path / f"file{ending}"
    path.write_bytes(FOREIGN[kind])
    expected = "torch" if ending == ".pt" else "safetensors"
    with pytest.raises(UsageError, match=rf"is not a {expected} file, or is damaged"):
        read_weights(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", [".pt", "old.pt", ".safetensors"])
def test_truncated_files(tmp_path, backbone, share, ending):
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_backbone(path, backbone, CARD)
    else:
        torch.save(backbone.state_dict(), path, _use_new_zipfile_serialization=ending == ".pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=r"damaged|refused"):
        read_weights(path)


def test_damaged_at_random(tmp_path):
    """Whatever a damaged pickle raises inside torch, its reader sees a UsageError. (It may also still be readable.)"""
    generator = random.Random(0)
    content = {"a": torch.arange(6.0), "b": [1, 2.5, ("x", None)], "c": {"d": True}}
    forms = [pickle.dumps({"b": content["b"]}, protocol=2)]
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        forms.append(buffer.getvalue())
    refused = 0
    path = tmp_path / "damaged.pt"
    for number in range(400):
        damaged = bytearray(forms[number % 3])
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.randrange(len(damaged))] if number % 4 == 0 else damaged)
        try:
            load_torch(path)
        except UsageError:
            refused += 1
    assert refused > 200


def test_other_content(tmp_path):
    path = tmp_path / "content.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UsageError, match="holds a list, not a dictionary of weights"):
        read_weights(path)
    torch.save({"epoch": 3, "name": "x"}, path)
    with pytest.raises(UsageError, match="holds no weights; its entries are epoch, name"):
        read_weights(path)
    for content in ({0: torch.zeros(1)}, {"state_dict": {0: torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(UsageError, match="holds no weights; its entries are 0$"):
            read_weights(path)
    torch.save({0: torch.zeros(1), "module.conv1.weight": torch.ones(1)}, path)
    assert read_weights(path) == ({"conv1.weight": torch.ones(1)}, None)
    torch.save({}, path)
    with pytest.raises(UsageError, match="its entries are none"):
        read_weights(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="there is no file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("text", ["not json", "[1]", "null", '{"backbone": "resnet18", "size": "8"}'])
def test_a_damaged_card_is_told_with_its_file(tmp_path, text):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"caco-backbone-1": text})
    with pytest.raises(UsageError, match=r"a\.safetensors.*its description of itself"):
        read_weights(path)


@pytest.mark.parametrize("card", [{"backbone": "x", "colour": "red"}, {"size": 3}, {"backbone": "x", "mean": 3}])
def test_a_card_of_another_version(tmp_path, card):
    """A card with other fields: of a newer version, or another program's."""
    torch.save({"card": card, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    header = {"caco-backbone-1": json.dumps(card)}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=header)
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(UsageError, match=f"{name}: its description .* does not understand"):
            read_weights(tmp_path / name)


def test_prefixes():
    tensor = torch.zeros(1)
    assert list(strip_prefix({"module.encoder_q.conv1.weight": tensor, "module.encoder_k.conv1.weight": tensor})) == [
        "conv1.weight"
    ]
    assert list(strip_prefix({"conv1.weight": tensor})) == ["conv1.weight"]
    assert list(strip_prefix({"backbone.backbone.x": tensor})) == ["backbone.x"]  # one prefix, once


def test_saving_is_atomic(tmp_path, backbone, monkeypatch):
    import os

    path = tmp_path / "backbone.safetensors"
    save_backbone(path, backbone, CARD)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(CacoError, match="cannot be written: no space left"):
        save_backbone(path, backbone, BackboneCard("test_resnet", step=8))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_own_modules_of_maps_keep_their_names(tmp_path, images):
    """Pooled for training, written under the module's own names, and read back into it, bare or pooled."""
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pooled = adopt_backbone(own, SIZE)
    save_backbone(tmp_path / "own.safetensors", pooled, BackboneCard("own", size=SIZE, resize=SIZE))
    assert set(safetensors.torch.load_file(tmp_path / "own.safetensors")) == set(own.state_dict())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    module, card = load_backbone(tmp_path / "own.safetensors", own=other)
    assert (card.backbone, card.size) == ("own", SIZE)
    assert_same_features(module, pooled.eval(), images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())  # a copy was filled
    load_into(other, read_weights(tmp_path / "own.safetensors")[0], "own")
    assert_same_features(other, own.eval(), images)


def test_the_narrow_resnet_of_a_published_file(tmp_path):
    """Its own first kernel is 3 x 3, which is not the small stem of another ResNet."""
    torch.manual_seed(0)
    backbone = create_backbone("resnet10_narrow", SIZE).eval()
    state = {f"module.encoder_q.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"arch": "resnet10_narrow", "state_dict": state}, tmp_path / "published.pth.tar")
    module, card = load_backbone(tmp_path / "published.pth.tar")
    assert (card.backbone, card.stem) == ("resnet10_narrow", "standard")
    assert_same_features(module, backbone, torch.randn(2, 3, SIZE, SIZE))


@pytest.fixture
def hub(monkeypatch):
    """A server in the hub's place, which refuses every request, and what it was asked."""
    from huggingface_hub import constants

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *words):
            pass

    asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("resnet18.a1_in2k", "resnet18.a1_in1k")])
def test_weights_that_timm_does_not_have(hub, name, near):
    """Told before the network is used."""
    with pytest.raises(UsageError, match=rf"timm has no weights of that name\. Did you mean .*{near}"):
        download_weights(name)
    assert hub == []


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch, tmp_path, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(CacoError, match=r"not downloaded \(the hub cannot be reached, and gave none before\)$"):
        download_weights("resnet18")
    assert time.monotonic() - began < 8 and "Retry" not in capfd.readouterr().err
    assert not constants.HF_HUB_OFFLINE


def test_a_download_that_fails_is_one_line(hub, monkeypatch):
    """The network is the hub's client's affair; whatever it raises is told in one line. (No network in tests.)"""
    import timm

    def unreachable(name, **keywords):
        assert keywords == {"pretrained": True, "num_classes": 0}
        raise ConnectionError("the hub cannot be reached\nsecond line")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CacoError, match=r"--weights timm:resnet50: not downloaded \(the hub cannot be reached\)$"):
        download_weights("resnet50")
    assert hub  # was asked first whether it answers


def test_a_file_without_a_tensor(tmp_path):
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="none.safetensors holds no weights"):
        read_weights(tmp_path / "none.safetensors")
