"""The commands as Python functions: `import caco` is light, options are checked, own modules and sources work."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import caco
from caco.backbone import create_backbone
from caco.config import Demo
from caco.data.arrays import ArraySource
from caco.demo import demo
from caco.errors import UsageError

TINY = {
    "epochs": 1,
    "batch_size": 8,
    "bank_size": 16,
    "device": "cpu",
    "workers": 1,
    "views": {"size": 8, "evaluation_resize": 8, "blur": (0.0, 0.0)},
    "encoder": {"projector": 16, "embedding": 8},
    "bank": {"warm_start_steps": 0},
    "optimizer": {"warmup_epochs": 1},
    "monitor": {"knn_epochs": 0},
}


class Own(nn.Module):
    """A user's own network, with feature maps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images):
        return self.layers(images)


def test_import_is_light():
    script = "import sys, caco; dir(caco); assert not {'torch', 'numpy', 'timm'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_everything_announced_is_there():
    for name in caco.__all__:
        assert callable(getattr(caco, name)), name
        assert getattr(caco, name).__doc__, name
    assert dir(caco) == sorted(caco.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        caco.pretrian  # noqa: B018


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bank_sise": 5}, "unknown option bank_sise. Did you mean bank_size"),
        ({"views": {"sise": 5}}, "unknown option views.sise. Did you mean views.size"),
        ({"views": 32}, 'views=32: is a group of options, such as views={"size": …}'),
        ({"precision": "fp16"}, "precision='fp16': must be auto|fp32|bf16."),
        ({"epochs": "ten"}, "epochs='ten': must be int"),
        ({"epochs": float("nan")}, "epochs=nan: must be int"),
        ({"batch_size": float("inf")}, "batch_size=inf: must be int"),
        ({"views": {"size": "big"}}, "views.size='big': must be int"),
        ({"recipe": "cifr"}, "Did you mean cifar"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"backbone": "resnet19"}, "Did you mean resnet"),
        ({"resume": True}, "there is no run in"),
    ],
)
def test_wrong_options_are_usage_errors(options, words, tmp_path):
    with pytest.raises(UsageError) as caught:
        caco.pretrain("textures:64", tmp_path / "run", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_checked_before_anything_is_done(tmp_path):
    with pytest.raises(UsageError, match="--batch-size 1: batch norm needs at least 2 images"):
        caco.pretrain("textures:64", tmp_path / "run", batch_size=1)
    with pytest.raises(UsageError, match="--out is missing"):
        demo(Demo(out=""))
    assert not (tmp_path / "run").exists()


def test_judging_checks_its_options_too():
    for command in (caco.knn, caco.linear, caco.embed):
        with pytest.raises(UsageError, match="unknown option valid"):
            command("pixels", data="textures:40", valid="textures:20")
        with pytest.raises(UsageError, match="batch_size='many': must be int"):
            command("pixels", data="textures:40", batch_size="many")


def test_recipe_groups_and_single_options_together(tmp_path):
    """A recipe first, everything else over it; the run's own record shows what came out."""
    from caco.train.run_folder import read_config

    caco.pretrain("textures:16", tmp_path / "run", recipe="cifar", backbone=Own(), **TINY)
    config = read_config(tmp_path / "run")
    assert (config.recipe, config.lr, config.optimizer.weight_decay) == ("cifar", 0.24, 5e-4)
    assert (config.views.size, config.views.solarize) == (8, (0.0, 0.2))
    assert config.optimizer.warmup_epochs == 1


def test_own_modules_are_trained_and_come_back(tmp_path):
    own = Own()
    start = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    path = caco.pretrain("textures:32", tmp_path / "run", backbone=own, **TINY)
    assert path == tmp_path / "run" / "export" / "backbone.safetensors"
    with pytest.raises(UsageError, match="load_weights"):
        caco.load_backbone(path)
    bare = Own()
    again = caco.load_weights(bare, tmp_path / "run")
    assert again is bare
    trained = bare.state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert safetensors.torch.load_file(path).keys() == trained.keys()
    with torch.no_grad():
        assert bare.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 6, 8, 8)
    judged = caco.knn(tmp_path / "run", backbone=Own(), data="textures:32", val="textures:16", device="cpu")
    assert judged["val_images"] == 16 and 0 <= judged["top1"] <= 100


def test_a_frozen_module_cannot_be_trained(tmp_path):
    with pytest.raises(UsageError, match="no parameter to train: requires_grad is False"):
        caco.pretrain("textures:32", tmp_path / "run", backbone=Own().requires_grad_(False), **TINY)
    assert not (tmp_path / "run").exists()


def test_own_modules_are_named_in_the_errors_about_them(tmp_path):
    caco.pretrain("textures:32", tmp_path / "run", backbone=Own(), **TINY)
    for judge in (caco.knn, caco.linear, caco.embed):
        with pytest.raises(UsageError, match="take it as backbone=module"):
            judge(tmp_path / "run", "textures:32", out=tmp_path / ("a.npz" if judge is caco.embed else "a.json"))
    for kind in ("timm", "torchvision"):
        with pytest.raises(UsageError, match=r"caco.load_weights\(module, path\) and save module.state_dict\(\)"):
            caco.export(tmp_path / "run", format=kind, out=tmp_path / "a.safetensors")


def test_errors_speak_of_switches_as_python_has_them(tmp_path):
    caco.pretrain("textures:32", tmp_path / "--resume", backbone="test_resnet", **TINY)
    with pytest.raises(UsageError) as caught:
        caco.pretrain("textures:32", tmp_path / "--resume", backbone="test_resnet", **TINY)
    words = f"--out {tmp_path}/--resume holds a run; go on with resume=True, or delete it with overwrite=True"
    assert str(caught.value) == words


def test_own_modules_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="does not take pictures of 8 x 8 pixels"):
        caco.pretrain("textures:32", tmp_path / "run", backbone=nn.Linear(5, 5), **TINY)
    assert not (tmp_path / "run").exists()


def test_own_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 10, 10, 3), dtype=np.uint8)
    path = caco.pretrain(ArraySource(images, name="mine"), tmp_path / "run", backbone="test_resnet", **TINY)
    assert caco.load_backbone(path)(torch.zeros(2, 3, 8, 8)).shape == (2, 96)


class Pictures:
    """A map-style Dataset as torchvision's are: pairs of a PIL image and a number, `targets` beside."""

    def __init__(self, labelled=True, as_arrays=False):
        self.images = np.random.default_rng(0).integers(0, 256, (24, 10, 10, 3), dtype=np.uint8)
        self.as_arrays = as_arrays
        if labelled:
            self.targets, self.classes = [number % 3 for number in range(24)], ["a", "b", "c"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (image, 0) if self.as_arrays else (Image.fromarray(image), 0)


def test_images_that_are_python_objects(tmp_path, capsys):
    """Every form of the same 24 pictures trains the same backbone."""
    images = Pictures().images
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    files = sorted(tmp_path.glob("*.png"))
    forms = [images, files, [str(file) for file in files], f"{tmp_path}/*.png", Pictures(False), Pictures(False, True)]
    backbones = []
    for number, data in enumerate(forms):
        path = caco.pretrain(data, tmp_path / "runs" / str(number), backbone="test_resnet", val=None, **TINY)
        backbones.append(path.read_bytes())
    assert len(set(backbones)) == 1
    said = capsys.readouterr().out
    assert said.count("the images are your own") == 5


def test_a_dataset_with_labels_is_checked_by_them(tmp_path):
    options = {**TINY, "monitor": {"knn_epochs": 1}}
    caco.pretrain(Pictures(), tmp_path / "run", backbone="test_resnet", **options)
    assert '"kind": "knn"' in (tmp_path / "run" / "metrics.jsonl").read_text()


class Sorted(Pictures):
    """Labelled pictures, a class after another, as folders list them; one of a class has a little more of a colour."""

    def __init__(self, per_class=8, seed=0):
        super().__init__()
        self.images = np.random.default_rng(seed).integers(0, 90, (3 * per_class, 10, 10, 3), dtype=np.uint8)
        self.targets = [number // per_class for number in range(3 * per_class)]
        for image, label in zip(self.images, self.targets, strict=True):
            image[:, :, label] += 6

    def write(self, folder):
        for number, label in enumerate(self.targets):
            path = folder / self.classes[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.images[number]).save(path)
        return folder

    def source(self):
        return ArraySource(self.images, self.targets, self.classes)


@pytest.mark.parametrize(("command", "options"), [("knn", {"neighbours": 3}), ("linear", {"epochs": 5})])
def test_own_images_are_judged_as_the_same_pictures_in_folders(command, options, tmp_path):
    train, val = Sorted(), Sorted(4, seed=1)
    judge = getattr(caco, command)
    caco.pretrain(train, tmp_path / "run", backbone="test_resnet", **TINY)
    folders = train.write(tmp_path / "train"), val.write(tmp_path / "val")
    options = {"device": "cpu", "workers": 1, **options}
    wanted = judge(tmp_path / "run", folders[0], val=folders[1], **options)
    for data, queries, named in [
        (train, val, ("Sorted", "Sorted")),
        (train.source(), val.source(), ("array", "array")),
        (folders[0], val, (str(folders[0]), "Sorted")),
    ]:
        result = judge(tmp_path / "run", data, val=queries, out=tmp_path / "result.json", overwrite=True, **options)
        assert (result["data"], result["val"]) == named
        assert result == json.loads((tmp_path / "result.json").read_text())
        assert {**result, "data": 0, "val": 0} == {**wanted, "data": 0, "val": 0}
    held_out = judge(tmp_path / "run", train, **options)
    assert held_out["val"] == "held out: 0.2"
    assert held_out["top1"] == judge(tmp_path / "run", folders[0], **options)["top1"]


def test_own_images_are_the_queries_of_the_check(tmp_path):
    train, val = Sorted(), Sorted(4, seed=1)
    options = {**TINY, "backbone": "test_resnet", "monitor": {"knn_epochs": 1, "knn_neighbours": 3}}
    folder = val.write(tmp_path / "val")
    caco.pretrain(train, tmp_path / "named", val=folder, **options)
    for number, own in enumerate((val, val.source())):
        caco.pretrain(train, tmp_path / str(number), val=own, **options)
        records = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("named", str(number))]
        assert records[0] == records[1] and '"kind": "knn"' in records[0]
    with pytest.raises(UsageError, match=r"--val array has no labels \(caco.data.arrays.ArraySource"):
        caco.pretrain(train, tmp_path / "none", val=val.images, **options)


def test_own_images_are_embedded(tmp_path):
    pictures = Sorted(4)
    photos = pictures.write(tmp_path / "photos")
    forms = [photos, pictures, pictures.source(), pictures.images, sorted(photos.glob("*/*.png"))]
    written = []
    for number, data in enumerate(forms):
        written.append(np.load(caco.embed("pixels", data, size=8, out=tmp_path / f"{number}.npz")))
    for one in written[1:]:
        np.testing.assert_array_equal(one["vectors"], written[0]["vectors"])
    np.testing.assert_array_equal(written[1]["labels"], written[0]["labels"])


def test_own_images_are_judged_by_several_processes():
    train, val = Sorted(), Sorted(4, seed=1)
    options = {"size": 8, "device": "cpu", "workers": 1}
    one = caco.knn("pixels", train.source(), val=val.source(), **options)
    assert caco.knn("pixels", train.source(), val=val.source(), distributed={"processes": 2}, **options) == one


@pytest.mark.parametrize(
    ("data", "val", "words"),
    [
        (Sorted().images, None, "--data array has no labels (caco.data.arrays.ArraySource(images, labels))"),
        (Pictures(labelled=False), None, "--data Pictures has no labels (the Dataset's `targets` or `labels`"),
        (Sorted(), Sorted().images, "array has no labels (caco.data.arrays.ArraySource(images, labels))"),
        (
            (Sorted().images, [0] * 24),
            None,
            "labels go with their images: caco.data.arrays.ArraySource(images, labels)",
        ),
        (np.zeros((0, 8, 8, 3), np.uint8), None, "array holds no images"),
        (Sorted(), 5, "val is a int; it must be a path"),
    ],
)
def test_own_images_that_cannot_be_judged(data, val, words):
    for judge in (caco.knn, caco.linear):
        with pytest.raises(UsageError) as caught:
            judge("pixels", data, val=val, size=8)
        assert words in str(caught.value)


def test_embedding_takes_no_val():
    with pytest.raises(UsageError, match="unknown option val"):
        caco.embed("pixels", "textures:40", val="textures:20", out="features.npz")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (5, "data is a int; it must be a path, a list of files"),
        (
            np.zeros((4, 8, 8, 3), np.float32),
            '(255 * images).round().astype("uint8") makes bytes of numbers from 0 to 1',
        ),
        (
            np.zeros((4, 3, 8, 8), np.uint8),
            "not uint8 [4, 3, 8, 8]: images.transpose(0, 2, 3, 1) puts the channels last",
        ),
        (np.zeros((4, 1, 8, 8), np.uint8), "images[:, 0] takes away the axis"),
        ([], "no files given"),
        (["nowhere.png"], "nowhere.png is not a file"),
        (torch.zeros(4, 3, 8, 8), "data is a Tensor; use .numpy(), uint8 [N, H, W, 3]: images.transpose(0, 2, 3, 1)"),
        ([torch.zeros(3, 8, 8)], "leave out the Dataset's own transform"),
        (None, "--data is missing"),
    ],
)
def test_what_is_no_images_is_a_usage_error(data, words, tmp_path):
    with pytest.raises(UsageError) as caught:
        caco.pretrain(data, tmp_path / "run", **TINY)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_none_is_not_given_and_one_number_is_a_list_of_one():
    result = caco.knn("pixels", data="textures:60", val=None, size=8, neighbours=5)
    assert result["neighbours"] == 5 and result["val"] == "held out: 0.2"


def test_auto_means_what_the_run_to_resume_has_decided(tmp_path):
    path = caco.pretrain("textures:32", tmp_path / "run", backbone="test_resnet", **TINY)
    before = path.read_bytes()
    auto = {"epochs": "auto", "precision": "auto", "engine": {"compile": "auto", "layout": "auto"}}
    assert caco.pretrain("textures:32", tmp_path / "run", resume=True, **auto).read_bytes() == before


def test_a_run_is_resumed_without_naming_its_data(tmp_path):
    path = caco.pretrain("textures:32", tmp_path / "run", backbone="test_resnet", **TINY)
    before = path.read_bytes()
    path.unlink()
    assert caco.pretrain(out=tmp_path / "run", resume=True).read_bytes() == before


def test_a_file_that_does_not_say_its_model_is_loaded_by_its_name(tmp_path):
    module = create_backbone("test_resnet", 32).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"name it with --backbone \(Python: backbone=\)"):
        caco.load_backbone(tmp_path / "weights.pth")
    again, images = caco.load_backbone(tmp_path / "weights.pth", backbone="test_resnet"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), module(images))


def test_paths_may_be_paths_everywhere(tmp_path):
    first = caco.pretrain("textures:32", tmp_path / "first", backbone="test_resnet", **TINY)
    options = {"backbone": "test_resnet", "weights": first, **TINY}
    second = caco.pretrain("textures:32", tmp_path / "second", **options)
    assert second.exists()
    with pytest.raises(UsageError, match="there is no run folder or file"):
        caco.pretrain("textures:32", tmp_path / "third", **{**options, "weights": tmp_path / "none.pt"})


def test_weights_are_where_a_run_starts(tmp_path):
    """With a learning rate of nearly nothing, what comes out is what went in (batch-norm statistics apart)."""
    first = caco.pretrain("textures:32", tmp_path / "first", backbone="test_resnet", **TINY)
    options = {"backbone": "test_resnet", "weights": first, "seed": 5, "lr": 1e-9, **TINY}
    options["optimizer"] = {"warmup_epochs": 1, "final_lr": 1e-9}
    second = caco.pretrain("textures:32", tmp_path / "second", **options)
    other = caco.pretrain("textures:32", tmp_path / "other", **{**options, "weights": ""})
    ours, same, different = (dict(caco.load_backbone(path).named_parameters()) for path in (first, second, other))
    for name, parameter in ours.items():
        torch.testing.assert_close(same[name], parameter, rtol=0, atol=1e-5)
    assert any((different[name] - parameter).abs().max() > 0.01 for name, parameter in ours.items())
