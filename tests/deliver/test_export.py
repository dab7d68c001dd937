"""`caco export`: what others load is what the run has."""

import textwrap

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision import models

import caco
from caco.backbone import create_backbone, projector
from caco.cli import main
from caco.config import BankOptions, EncoderOptions, Pretrain, Views
from caco.distributed.world import World
from caco.errors import UsageError
from caco.reference.checkpoint import from_ours, to_published
from caco.train.prepare import create_state
from caco.weights import BackboneCard, load_torch, save_backbone

D, K, HIDDEN = 8, 32, 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(24):
        path = folder / ("bright" if number % 2 else "dark") / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        low = 40 if number % 2 else 0
        Image.fromarray(generator.integers(low, low + 200, (34, 36, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "resnet18"
    caco.pretrain(
        photos,
        out,
        backbone="resnet18",
        epochs=2,
        batch_size=8,
        bank_size=K,
        views={"size": 32, "evaluation_resize": 32},
        encoder={"embedding": D, "projector": HIDDEN, "stem": "standard"},
        bank={"warm_start_steps": 4},
        optimizer={"name": "lars", "warmup_epochs": 1},
        workers=2,
    )
    return out


def expected_keys(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes written out from the published format and torchvision alone: both encoders, `fc` numbered 0, 1, 3, 4, 6."""
    shapes = {name: tuple(tensor.shape) for name, tensor in models.get_model(arch).state_dict().items()}
    features = shapes.pop("fc.weight")[1]
    del shapes["fc.bias"]
    for linear, batch_norm, width in ((0, 1, features), (3, 4, HIDDEN)):
        shapes[f"fc.{linear}.weight"] = (HIDDEN, width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"fc.{batch_norm}.{part}"] = (HIDDEN,)
        shapes[f"fc.{batch_norm}.num_batches_tracked"] = ()
    shapes["fc.6.weight"] = (D, HIDDEN)
    return {
        f"module.{encoder}.{name}": shape for encoder in ("encoder_q", "encoder_k") for name, shape in shapes.items()
    }


def assert_published(content: dict, arch: str) -> None:
    assert list(content) == ["epoch", "arch", "best_acc", "knn_acc", "state_dict", "optimizer", "Memory_Bank"]
    assert content["arch"] == arch
    assert {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()} == expected_keys(arch)
    assert {name: tuple(tensor.shape) for name, tensor in content["Memory_Bank"].items()} == {"W": (D, K), "v": (D, K)}


def test_reference_has_exactly_the_published_keys(run, tmp_path):
    out = caco.export(run, format="reference", out=tmp_path / "checkpoint.pth.tar")
    content = torch.load(out, weights_only=True)
    assert content.pop("card")["size"] == 32
    assert_published(content, "resnet18")
    assert content["epoch"] == 2


def test_reference_of_another_size_than_the_published_one_is_judged_at_its_own(run, photos, tmp_path):
    file = caco.export(run, format="reference", out=tmp_path / "checkpoint.pth.tar")
    for name, encoder in (("run", run), ("file", file)):
        caco.embed(encoder, data=photos, out=tmp_path / f"{name}.npz", device="cpu")
    with np.load(tmp_path / "run.npz") as one, np.load(tmp_path / "file.npz") as other:
        assert np.array_equal(one["vectors"], other["vectors"])


def test_reference_of_a_resnet50_has_exactly_the_published_keys():
    config = Pretrain(
        backbone="resnet50",
        bank_size=K,
        views=Views(size=32),
        encoder=EncoderOptions(embedding=D, projector=HIDDEN, stem="standard"),
        bank=BankOptions(),
    )
    world = World(torch.device("cpu"))
    state = create_state(config, create_backbone("resnet50", 32, "standard"), world)
    content = to_published(from_ours({**state.state_dict(world), "epoch": 0, "card": {"backbone": "resnet50"}}))
    assert_published(content, "resnet50")


def test_reference_loads_as_the_published_programs_load_it(run, tmp_path):
    """`linear.py`: strip `module.encoder_q.`, all but `fc`, into torchvision's. `main.py`: everything, strictly."""
    content = torch.load(caco.export(run, format="reference", out=tmp_path / "checkpoint.pth.tar"), weights_only=True)
    prefix = "module.encoder_q."
    renamed = {
        key.removeprefix(prefix): value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix) and not key.startswith(prefix + "fc")
    }
    answer = models.resnet18(num_classes=1000).load_state_dict(renamed, strict=False)
    assert set(answer.missing_keys) == {"fc.weight", "fc.bias"} and not answer.unexpected_keys

    both = torch.nn.ModuleDict()
    for name in ("encoder_q", "encoder_k"):
        both[name] = models.resnet18()
        both[name].fc = projector(512, HIDDEN, D)
    torch.nn.ModuleDict({"module": both}).load_state_dict(content["state_dict"], strict=True)
    optimizer = torch.optim.Optimizer(both.parameters(), {"lr": 0.0})
    optimizer.load_state_dict(content["optimizer"])
    assert all(optimizer.state[p]["mu"].shape == p.shape for p in both["encoder_q"].parameters())
    assert not any(p in optimizer.state for p in both["encoder_k"].parameters())
    assert optimizer.param_groups[0].keys() >= {"lr", "weight_decay", "momentum", "trust_coefficient"}


def test_reference_of_a_reference_is_the_same(run, tmp_path):
    once = load_torch(caco.export(run, format="reference", out=tmp_path / "once.pth.tar"))
    twice = load_torch(caco.export(tmp_path / "once.pth.tar", format="reference", out=tmp_path / "twice.pth.tar"))
    assert list(once) == list(twice) and list(once["state_dict"]) == list(twice["state_dict"])
    for part in ("state_dict", "Memory_Bank"):
        assert all(torch.equal(tensor, twice[part][name]) for name, tensor in once[part].items())
    momenta = (content["optimizer"]["state"] for content in (once, twice))
    assert all(torch.equal(one["mu"], other["mu"]) for one, other in zip(*(m.values() for m in momenta), strict=True))
    assert once["optimizer"]["param_groups"] == twice["optimizer"]["param_groups"]
    assert all(once[name] == twice[name] for name in ("epoch", "arch", "best_acc", "knn_acc"))


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("timm", "b.safetensors"),
        ("timm", "b.pth"),
        ("torchvision", "b.safetensors"),
        ("torchvision", "b.pth"),
        ("reference", "b.pth.tar"),
    ],
)
@pytest.mark.parametrize("protocol", ["cached", "reference"])
def test_a_linear_probe_on_the_file_equals_one_on_the_run(run, photos, tmp_path, format, name, protocol):
    file = caco.export(run, format=format, out=tmp_path / name)
    options = {"data": photos, "protocol": protocol, "epochs": 2, "seed": 3, "lr": 0.1, "device": "cpu"}
    heads = []
    for number, encoder in enumerate((run, file)):
        head = tmp_path / f"{number}.safetensors"
        given = {} if encoder == run or name.endswith(("safetensors", "tar")) else {"backbone": "resnet18"}
        caco.linear(encoder, **options, **given, size=32, head=head)
        heads.append(safetensors.torch.load_file(head))
    assert all(torch.equal(heads[0][part], heads[1][part]) for part in ("weight", "bias"))
    assert heads[0]["weight"].abs().sum() > 0


def test_timm_and_torchvision_give_the_same_features(run, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    ours = caco.load_backbone(run)
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict(torch.load(caco.export(run, format="timm", out=tmp_path / "a.pth"), weights_only=True))
    other = models.resnet18()
    tensors = safetensors.torch.load_file(caco.export(run, format="torchvision", out=tmp_path / "b.safetensors"))
    assert set(other.load_state_dict(tensors, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    other.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = ours(images)
        torch.testing.assert_close(theirs.eval()(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(other.eval()(images), expected)


def test_a_checkpoint_of_the_run_is_a_start_too(run, photos, tmp_path, capsys):
    """--weights with our own checkpoint takes over as much as with a published one."""
    file = caco.export(run, format="reference", out=tmp_path / "checkpoint.pth.tar")
    last = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    outs = []
    for number, weights in enumerate((last, file)):
        out = tmp_path / f"run{number}"
        caco.pretrain(
            photos,
            out,
            backbone="resnet18",
            weights=weights,
            epochs=1,
            batch_size=8,
            bank_size=K,
            views={"size": 32, "evaluation_resize": 32},
            encoder={"embedding": D, "projector": HIDDEN, "stem": "standard"},
            optimizer={"name": "lars", "warmup_epochs": 0},
        )
        outs.append((out / "export" / "backbone.safetensors").read_bytes())
    assert outs[0] == outs[1]
    assert capsys.readouterr().err.count("took over backbone, projector, key encoder, bank, momenta") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "tim", "--out", "a.pth"], "'tim' is not one of timm, torchvision, reference. Did you mean timm"),
        (["--format", "timm"], "--out is missing"),
        (["--format", "timm", "--out", "a.onnx"], "is written as .safetensors"),
        (["--format", "reference", "--out", "a.safetensors"], "is a torch file"),
    ],
)
def test_wrong_usage_is_one_line(run, options, said, capsys):
    assert main(["export", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_a_file_cannot_give_is_said(run, tmp_path, capsys):
    backbone = run / "export" / "backbone.safetensors"
    with pytest.raises(UsageError, match="holds an encoder only"):
        caco.export(backbone, format="reference", out=tmp_path / "a.pth.tar")
    with pytest.raises(UsageError, match="there is no run folder or file"):
        caco.export(tmp_path / "nothing", format="reference", out=tmp_path / "a.pth.tar")
    caco.export(run, format="reference", out=tmp_path / "a.pth.tar")
    assert f"python linear.py -a resnet18 --pretrained {tmp_path / 'a.pth.tar'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["timm", "torchvision"])
def test_a_file_that_does_not_say_its_model_is_exported_by_its_name(tmp_path, capsys, format):
    module, file, out = create_backbone("resnet18", 224).eval(), tmp_path / "r18.pth", tmp_path / "a.safetensors"
    torch.save(module.state_dict(), file)
    line = ["export", str(file), "--out", str(out), "--format", format]
    assert main(line) == 2
    assert "does not say which model it holds; name it with --backbone" in capsys.readouterr().err
    assert main([*line, "--backbone", "resnet18"]) == 0
    again, images = loaded_as_told(capsys.readouterr().out), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images).flatten(1), module(images))


@pytest.mark.parametrize(("format", "name"), [("timm", "a.pth"), ("reference", "a.pth.tar")])
def test_a_name_that_is_not_the_runs_is_refused(run, tmp_path, format, name):
    with pytest.raises(UsageError, match="holds a resnet18, not a resnet50"):
        caco.export(run, format=format, out=tmp_path / name, backbone="resnet50")
    assert not (tmp_path / name).exists()


def test_a_small_stem_is_not_torchvisions(tmp_path):
    module = create_backbone("resnet18", 32, "small")
    save_backbone(tmp_path / "b.safetensors", module, BackboneCard("resnet18", stem="small", size=32, resize=32))
    with pytest.raises(UsageError, match=r"is not torchvision's \(not the same: conv1.weight\)"):
        caco.export(tmp_path / "b.safetensors", format="torchvision", out=tmp_path / "a.pth")
    file = caco.export(tmp_path / "b.safetensors", format="timm", out=tmp_path / "a.pth")
    assert torch.load(file, weights_only=True)["conv1.weight"].shape == (64, 3, 3, 3)


def test_models_that_only_torchvision_has():
    """`-a` of the published programs is a torchvision name; those that timm lacks are built by torchvision."""
    for name, features in (("mobilenet_v2", 1280), ("shufflenet_v2_x0_5", 1024), ("squeezenet1_1", 512)):
        module = create_backbone(name, 64)
        assert module(torch.zeros(2, 3, 64, 64)).shape == (2, features) and module.num_features == features


def loaded_as_told(said: str) -> torch.nn.Module:
    """Run the lines that the command prints, with nothing but what they import."""
    names = {}
    exec(textwrap.dedent(said.partition("load it with\n")[2]), names)
    return names["model"].eval()


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("format", "name", "size", "stem"),
    [
        ("timm", "resnet18", 64, "standard"),
        ("timm", "resnet18", 32, "small"),
        ("timm", "test_vit", 160, "standard"),
        ("timm", "test_vit", 64, "standard"),
        ("torchvision", "resnet18", 64, "standard"),
        ("torchvision", "mobilenet_v3_small", 64, "standard"),
        ("torchvision", "squeezenet1_1", 64, "standard"),
    ],
)
def test_the_line_that_is_printed_loads_the_file(tmp_path, capsys, format, name, size, stem, ending):
    """With the library alone, all of it, and to the same features."""
    torch.manual_seed(0)
    module = create_backbone(name, size, stem).eval()
    save_backbone(tmp_path / "run.safetensors", module, BackboneCard(name, stem, size=size, resize=size))
    out = tmp_path / f"it's one.{ending}"
    assert main(["export", str(tmp_path / "run.safetensors"), "--format", format, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out} is written; load it with\n  import ") and f"\n  model = {format}." in said
    again, images = loaded_as_told(said), torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(again(images).flatten(1), module(images))


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("resnet10_narrow", "timm", "timm has no model called 'resnet10_narrow'; it is caco's own"),
        ("resnet10_narrow", "torchvision", "torchvision has no model called 'resnet10_narrow'; it is caco's own"),
        ("mobilenet_v2", "timm", "timm has no model called 'mobilenet_v2'; use --format torchvision"),
        ("test_resnet", "torchvision", "torchvision has no model called 'test_resnet'; use --format timm"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_what_the_library_does_not_know_is_refused(tmp_path, capsys, name, format, words, ending):
    file, out = tmp_path / "a.safetensors", tmp_path / f"b.{ending}"
    module = create_backbone(name, 32)
    save_backbone(file, module, BackboneCard(name, size=32, resize=32))
    assert main(["export", str(file), "--format", format, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said and not out.exists()
    if "caco's own" in said:  # what it advises works
        again = eval(said.partition("own: ")[2].partition(" loads it")[0], {"caco": caco})
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in module.state_dict().items())


def test_an_own_module_is_not_an_arch(tmp_path, capsys):
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    views, encoder = {"size": 8, "evaluation_resize": 8}, {"projector": 8, "embedding": 4}
    small = {"epochs": 1, "batch_size": 8, "bank_size": 8, "views": views, "encoder": encoder, "device": "cpu"}
    caco.pretrain("textures:16", tmp_path / "run", backbone=own, bank={"warm_start_steps": 0}, **small)
    assert "caco.load_weights(module, " in capsys.readouterr().out
    caco.export(tmp_path / "run", format="reference", out=tmp_path / "a.pth.tar")
    said = capsys.readouterr().out
    assert "-a own" not in said and "the module is your own" in said
