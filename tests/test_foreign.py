"""Encoders from elsewhere are judged as their own libraries use them: pictures prepared, names and tables understood."""

import dataclasses

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from timm.models import _registry
from torch import nn

import caco
from caco.backbone import create_backbone
from caco.cli import main
from caco.errors import UsageError
from caco.foreign import named_preparation
from caco.views import IMAGENET_MEAN, IMAGENET_STD
from caco.weights import BackboneCard, load_backbone, read_weights, save_backbone

VIT = "test_vit.r160_in1k"  # timm's: 160 px of 168, bicubic, mean and std 0.5
HALF = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of 168 x 168 px, which that model's preparation crops and does not resize; two classes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(12):
        path = folder / str(number % 2) / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        small = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(small).resize((168, 168), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A transformer of timm's, as timm makes it, and its weights in a file."""
    torch.manual_seed(0)
    module = timm.create_model("test_vit", num_classes=0).eval()
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(module.state_dict(), path)
    return module, path


@pytest.fixture
def known(vit, monkeypatch, tmp_path):
    """timm has these weights under the model's name: from a file, in the place of its hub, which nobody answers for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    configuration = timm.models.get_pretrained_cfg(VIT)
    of_file = dataclasses.replace(configuration, file=str(vit[1]), url="", hf_hub_id=None)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, VIT, of_file)
    model = timm.create_model(VIT, pretrained=True, num_classes=0).eval()
    assert torch.equal(model.pos_embed, vit[0].pos_embed)
    return model


def features_by_timm(model, photos) -> np.ndarray:
    """Return what timm's own transform and model give for every picture, in path order."""
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        rows = [model(prepare(Image.open(path).convert("RGB"))[None])[0] for path in sorted(photos.rglob("*.png"))]
    return torch.stack(rows).numpy()


def embedded(encoder, photos, out, **options) -> np.ndarray:
    with np.load(caco.embed(encoder, data=photos, out=out, device="cpu", workers=1, **options)) as file:
        return file["vectors"]


def test_weights_of_timm_give_timms_features(known, photos, tmp_path):
    expected = features_by_timm(known, photos)
    np.testing.assert_allclose(embedded(f"timm:{VIT}", photos, tmp_path / "a.npz"), expected, rtol=1e-3, atol=1e-4)
    usual = embedded(f"timm:{VIT}", photos, tmp_path / "b.npz", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert np.abs(usual - expected).max() > 0.02  # it makes a difference


def test_a_file_with_its_tag_gives_timms_features(vit, photos, tmp_path, capsys):
    expected = features_by_timm(vit[0], photos)
    found = embedded(vit[1], photos, tmp_path / "a.npz", backbone=VIT)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    said = capsys.readouterr().err
    assert "shorter side 168 px (bicubic), of which 160 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in said


def test_a_module_of_timms_says_how_itself(vit, photos, tmp_path):
    expected = features_by_timm(vit[0], photos)
    found = embedded("random", photos, tmp_path / "a.npz", backbone=vit[0])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("judge", [caco.knn, caco.linear])
def test_a_result_says_how_pictures_were_prepared(judge, known, vit, photos):
    options = {"data": photos, "held_out": 0.5, "device": "cpu", "workers": 1}
    if judge is caco.linear:
        options |= {"epochs": 2, "lr": 0.1}
    result = judge(f"timm:{VIT}", **options)
    prepared = {name: result[name] for name in ("size", "resize", "interpolation", "squash", "mean", "std")}
    own = {"size": 160, "resize": 168, "interpolation": "bicubic", "squash": False, "mean": HALF, "std": HALF}
    assert prepared == own
    result = judge(vit[1], backbone="test_vit", mean=[0.1, 0.2, 0.3], **options)
    assert (result["mean"], result["std"]) == ([0.1, 0.2, 0.3], list(IMAGENET_STD))
    assert caco.knn("pixels", data=photos, size=16)["mean"] == list(IMAGENET_MEAN)


def test_a_file_of_unknown_origin_is_told_of(vit, photos, capsys):
    """Its model's name alone does not say how it was trained."""
    options = ["--data", str(photos), "--backbone", "test_vit", "--held-out", "0.5", "--device", "cpu"]
    assert main(["knn", str(vit[1]), *options]) == 0
    said = capsys.readouterr().err
    assert "ImageNet's mean and std; timm's own weights of test_vit have mean 0.5 0.5 0.5" in said and "--mean" in said
    assert main(["knn", str(vit[1]), *options, "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]) == 0
    assert "ImageNet" not in capsys.readouterr().err


def test_every_way_of_preparing_that_timm_has_is_known():
    """All its weights: another way would be judged by wrong pictures without a word."""
    ways = {
        (known.interpolation, known.crop_mode) for known in map(timm.models.get_pretrained_cfg, timm.list_pretrained())
    }
    assert {interpolation for interpolation, _ in ways} <= {"bilinear", "bicubic"}
    assert {mode for _, mode in ways} <= {"center", "squash", "border"}
    squashed = named_preparation("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384")
    assert (squashed.squash, squashed.size, squashed.resize) == (True, 384, 384)
    clip = named_preparation("vit_base_patch16_clip_224.openai")
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073) and clip.interpolation == "bicubic"


def test_a_card_keeps_it_all(tmp_path, vit, photos):
    """Written to a file of ours and read again, by caco and by timm."""
    module, card = load_backbone(vit[1], VIT)
    save_backbone(tmp_path / "b.safetensors", module, card)
    again, same = load_backbone(tmp_path / "b.safetensors")
    assert same == card and same.interpolation == "bicubic" and same.mean == (0.5, 0.5, 0.5)
    expected = features_by_timm(vit[0], photos)
    np.testing.assert_allclose(features_by_timm(again, photos), expected, rtol=1e-3, atol=1e-4)


def test_tags_that_do_not_exist(vit):
    with pytest.raises(UsageError, match=r"no weights called 'test_vit\.nothing'; of test_vit: test_vit\.r160_in1k"):
        load_backbone(vit[1], "test_vit.nothing")


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_the_size_of_a_table_of_positions(vit):
    """Without --size a file is used at the size it was made for; 224 px where its tables do not tell."""
    assert load_backbone(vit[1], "test_vit")[1].size == 160
    other = timm.create_model("test_vit", num_classes=0, img_size=224)
    assert named_preparation(VIT, 96).resize == 101  # the same share as 160 of 168
    torch.save(other.state_dict(), vit[1].with_name("224.pth"))
    assert load_backbone(vit[1].with_name("224.pth"), "test_vit")[1].size == 224


@pytest.mark.parametrize("size", [96, 224])
def test_another_size_is_timms_own_resizing(known, vit, size):
    ours = load_backbone(vit[1], "test_vit", size)[0]
    theirs = timm.create_model(VIT, pretrained=True, num_classes=0, img_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_a_window_transformer_of_ours_at_another_size(tmp_path, photos):
    """Swin is built for one size: for another it is built anew from the same weights."""
    torch.manual_seed(0)
    module = create_backbone("swinv2_cr_tiny_224", 64).eval()
    card = BackboneCard("swinv2_cr_tiny_224", size=64, resize=64)
    save_backbone(tmp_path / "swin.safetensors", module, card)
    assert embedded(tmp_path / "swin.safetensors", photos, tmp_path / "a.npz", size=96).shape == (12, 768)


def test_patches_of_another_size_are_another_model(tmp_path):
    """timm would resize them, too; the result would be no one's encoder."""
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict(), tmp_path / "a.pth")
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, patch_size=32)
    with pytest.raises(UsageError, match=r"another shape: .*patch_embed\.proj\.weight"):
        caco.load_weights(other, tmp_path / "a.pth")


def test_a_run_starts_from_a_transformer_of_another_size(vit, photos, tmp_path, capfd):
    """And is told when those weights know pictures of another mean and std."""
    torch.save(vit[0].state_dict(), tmp_path / "w.pth")
    module, card = load_backbone(tmp_path / "w.pth", VIT)
    save_backbone(tmp_path / "w.safetensors", module, card)
    small = {"epochs": 1, "batch_size": 8, "bank_size": 8, "encoder": {"projector": 8, "embedding": 4}, "device": "cpu"}
    options = {"backbone": "test_vit", "weights": tmp_path / "w.safetensors", "bank": {"warm_start_steps": 0}, **small}
    caco.pretrain(photos, tmp_path / "a", views={"size": 32}, **options)
    assert "theirs: --views.mean 0.5 0.5 0.5 --views.std 0.5 0.5 0.5" in capfd.readouterr().err
    caco.pretrain(photos, tmp_path / "b", views={"size": 32, "mean": HALF, "std": HALF}, **options)
    assert "another mean" not in capfd.readouterr().err
    assert load_backbone(tmp_path / "b" / "export" / "backbone.safetensors")[1].mean == (0.5, 0.5, 0.5)


# --- files of other systems ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()


def lightly(model):
    """lightly's examples: a Sequential of torchvision's parts, all but the last."""
    parts = nn.Sequential(*list(model.children())[:-1])
    projector = {"projection_head.layers.0.weight": torch.zeros(2, 2)}
    return {**{f"backbone.{key}": tensor for key, tensor in parts.state_dict().items()}, **projector}


def moco_v2(model):
    encoders = {f"module.encoder_{name}.{k}": v for name in "qk" for k, v in model.state_dict().items()}
    head = {f"module.encoder_q.fc.{number}.weight": torch.zeros(2, 2) for number in (0, 2)}
    return {**encoders, **head, "module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1)}


def simsiam(model):
    encoder = {f"module.encoder.{key}": tensor for key, tensor in model.state_dict().items()}
    return {**encoder, "module.encoder.fc.0.weight": torch.zeros(2, 2), "module.predictor.0.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("form", [lightly, moco_v2, simsiam])
def test_resnets_of_other_systems(form, resnet, tmp_path):
    torch.save({"state_dict": form(resnet), "epoch": 200, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    ours = load_backbone(tmp_path / "w.ckpt", "resnet18", 64)[0]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), resnet(images))


@pytest.mark.parametrize("form", ["DINO", "MAE"])
def test_transformers_of_other_systems(form, vit, tmp_path):
    state = vit[0].state_dict()
    if form == "DINO":
        head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
        teacher = {**{f"backbone.{key}": tensor for key, tensor in state.items()}, **head}
        student = {f"module.{key}": torch.zeros_like(tensor) for key, tensor in teacher.items()}
        content = {"student": student, "teacher": teacher, "epoch": 100}
    else:
        decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(2, 2)}
        content = {"model": {**state, **decoder}}
    torch.save(content, tmp_path / "w.pth")
    ours = load_backbone(tmp_path / "w.pth", "test_vit")[0]
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), vit[0](images))


def test_a_transformer_of_torchvisions_keeps_its_encoder(tmp_path):
    """Its own names begin with "encoder.": that is no other system's prefix."""
    model = torchvision.models.vit_b_16()
    model.heads = nn.Identity()
    state = {key: tensor for key, tensor in model.state_dict().items() if "encoder_layer_1" not in key}
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")[0].keys() == state.keys()
