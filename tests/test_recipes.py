"""The published recipes hold the published numbers, and every recipe can be listed, printed and used."""

import shlex

import pytest

from caco.checks import check
from caco.cli import pretrain_start
from caco.config import Pretrain
from caco.errors import UsageError
from caco.options import flatten, override, parse
from caco.recipes import RECIPES, find_recipe, listing, whole
from caco.train.run_folder import write_config
from caco.views import Augmentation

# From the published README's command lines (and its table for the third row), by our names.
ALL_ROWS = {
    "backbone": "resnet50",
    "lr": 0.3,
    "optimizer.final_lr": 0.003,
    "bank.lr": 3.0,
    "bank.final_lr": 3.0,
    "bank_size": 65536,
    "bank.temperature": 0.08,
    "bank.slot_temperature": 0.08,
    "optimizer.weight_decay": 1.5e-6,
    "optimizer.name": "lars",
    "optimizer.momentum": 0.9,
    "encoder.embedding": 256,
    "encoder.projector": 2048,
    "encoder.key_momentum": 0.99,
    "encoder.key_momentum_schedule": "cosine",
    "encoder.stem": "standard",
    "optimizer.warmup_epochs": 10,
    "bank.momentum": 0.9,
    "bank.warm_start_steps": "auto",
    "monitor.knn_first_epochs": 20,
    "monitor.knn_share": 0.2,
    "monitor.knn_neighbours": 20,
    "views.size": 224,
    "views.large": 2,
    "views.evaluation_resize": "auto",
    "views.mean": (0.485, 0.456, 0.406),
    "views.std": (0.229, 0.224, 0.225),
}
ROWS = {
    "imagenet-200-b1024": {"epochs": 200, "batch_size": 1024, "monitor.knn_epochs": 10, "views.small": 0},
    "imagenet-200-b4096": {"epochs": 200, "batch_size": 4096, "monitor.knn_epochs": 20, "views.small": 0},
    "imagenet-800-b4096": {"epochs": 800, "batch_size": 4096, "views.small": 0},
    "imagenet-800-multicrop-b2048": {"epochs": 800, "batch_size": 2048, "monitor.knn_epochs": 50, "views.small": 6},
}
ACCURACY = {
    "imagenet-200-b1024": "71.3",
    "imagenet-200-b4096": "72.0",
    "imagenet-800-b4096": "75.3",
    "imagenet-800-multicrop-b2048": "75.7",
}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(name):
    values = flatten(find_recipe(name))
    assert values["recipe"] == name
    for option, expected in {**ALL_ROWS, **ROWS[name]}.items():
        assert values[option] == expected, option
    assert ACCURACY[name] in whole(name)


def published_view(size, area, saturation, blur, solarize):
    return Augmentation(
        size=size,
        area=area,
        brightness=0.4,
        contrast=0.4,
        saturation=saturation,
        hue=0.1,
        jitter_probability=0.8,
        gray_probability=0.2,
        blur_probability=blur,
        blur_sigma=(0.1, 2.0),
        solarize_probability=solarize,
        flip_probability=0.5,
    )


def test_published_views():
    pair = (published_view(224, (0.2, 1.0), 0.2, 1.0, 0.0), published_view(224, (0.2, 1.0), 0.2, 0.1, 0.2))
    for name in ("imagenet-200-b1024", "imagenet-200-b4096", "imagenet-800-b4096"):
        assert find_recipe(name).views.augmentations() == pair
    large, small = published_view(224, (0.14, 1.0), 0.4, 0.5, 0.0), published_view(96, (0.05, 0.14), 0.4, 0.5, 0.0)
    assert find_recipe("imagenet-800-multicrop-b2048").views.augmentations() == (large,) * 2 + (small,) * 6


def test_small_images_are_not_blurred():
    cifar = find_recipe("cifar")
    assert all(view.blur_probability == 0 and view.size == 32 for view in cifar.views.augmentations())
    assert cifar.encoder.stem == "small"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_printed_whole(name):
    recipe = find_recipe(name)
    assert recipe.recipe == name
    check(override(recipe, {"data": "photos", "out": "run"}))
    text = whole(name)
    pasted = shlex.split(text[text.index("\n--") :].replace("\\\n", " "))
    left_out = {"data", "val", "out", "weights", "recipe", "device", "resume", "overwrite", "download"}
    options = {option for option, value in flatten(recipe).items() if option not in left_out and value != ""}
    flags = {word.removeprefix("--no-").removeprefix("--") for word in pasted if word.startswith("--")}
    assert flags == {option.replace("_", "-") for option in options}
    start = override(Pretrain(recipe=name), {"engine.keep_heap": False, "encoder.centred": True})
    assert parse(Pretrain, pasted, "caco pretrain", lambda given: start) == recipe


def test_listing_has_a_line_for_each():
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in lines)
    assert {"cifar", "small-photos", "demo"} <= set(RECIPES)


def test_a_run_is_a_recipe(tmp_path):
    """All that it computes, not what it computed it on, where, and on what machine."""
    begun = override(
        find_recipe("cifar"),
        {
            **{"data": "photos", "val": "labelled", "out": str(tmp_path), "workers": 3, "device": "cpu"},
            **{"weights": "old.pt", "start_epoch": 5, "lr": 0.1, "precision": "bf16", "views.size": 64},
            "distributed.processes": 2,
        },
    )
    write_config(tmp_path, begun)
    own = {"data": "", "val": "", "out": "", "workers": "auto", "device": "auto", "distributed.processes": "auto"}
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        assert find_recipe(name) == override(begun, own)
    given = {"recipe": str(tmp_path), "out": "next"}
    assert override(pretrain_start(given), given) == override(begun, {**own, "out": "next"})  # recipe: cifar
    assert "began as cifar" in whole(str(tmp_path)) and "--views.size 64" in whole(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--recipe: there is no run in .*empty"):
        find_recipe(str(tmp_path / "empty"))


def test_unknown_recipe_names_the_nearest_or_all():
    with pytest.raises(UsageError, match=r"'cifarr'.* Did you mean cifar\?"):
        find_recipe("cifarr")
    for name in ("zzzzzz", ""):
        with pytest.raises(UsageError, match="There are: .*small-photos"):
            whole(name)
