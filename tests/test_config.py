"""Every option has a help text, and the views follow the published table."""

import dataclasses
import typing

import pytest

from caco.after_training import Embed, Evaluation, Knn, Linear, Report
from caco.config import Demo, Pretrain, Views
from caco.options import _field_help
from caco.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation

COMMANDS = (Pretrain, Knn, Linear, Embed, Report, Demo)


def with_groups(kind):
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from with_groups(hint)


@pytest.mark.parametrize(
    "kind", dict.fromkeys(kind for command in COMMANDS for kind in with_groups(command)), ids=lambda k: k.__name__
)
def test_every_option_has_a_help_text_of_one_line(kind):
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # what dataclass puts where there is none
    helps = _field_help(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(typing.get_type_hints(kind)[field.name]):
            continue
        text = helps.get(field.name, "")
        assert len(text) > 5, f"{kind.__name__}.{field.name} has no help"
        assert text.endswith("."), text
        assert "\n" not in text, text


def test_everyday_options_are_the_same_everywhere():
    """A name means one thing: same type in every command, and the evaluations share theirs."""
    everyday = {
        "data",
        "val",
        "out",
        "backbone",
        "epochs",
        "batch_size",
        "lr",
        "device",
        "precision",
        "workers",
        "seed",
    }
    hints = {kind: typing.get_type_hints(kind) for kind in (Pretrain, Knn, Linear, Embed)}
    assert everyday <= set(hints[Pretrain])
    for kind in (Knn, Linear, Embed):
        assert issubclass(kind, Evaluation)
        for name in ("data", "out", "backbone", "device", "precision", "batch_size", "workers", "seed", "download"):
            assert hints[kind][name] == hints[Pretrain][name], (kind.__name__, name)


def test_configurations_cannot_be_changed_in_place():
    for kind in COMMANDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().out = "elsewhere"


COMMON = {"brightness": 0.4, "contrast": 0.4, "hue": 0.1, "jitter_probability": 0.8, "gray_probability": 0.2}
COMMON |= {"blur_sigma": (0.1, 2.0), "flip_probability": 0.5, "ratio": (3 / 4, 4 / 3)}


def test_single_crop_views_are_the_published_pair():
    both = {**COMMON, "size": 224, "area": (0.2, 1.0), "saturation": 0.2}
    first = Augmentation(**both, blur_probability=1.0, solarize_probability=0.0)
    second = Augmentation(**both, blur_probability=0.1, solarize_probability=0.2)
    assert Views().augmentations() == (first, second)
    assert (
        (Views().mean, Views().std) == (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )


def test_augmentations_come_large_first_and_only_the_first_differs():
    views = Views(size=40, large=3, small=2, small_size=16, blur=(0.9, 0.3), solarize=(0.0, 0.7)).augmentations()
    assert [view.size for view in views] == [40, 40, 40, 16, 16]
    assert [view.blur_probability for view in views] == [0.9, 0.3, 0.3, 0.3, 0.3]
    assert [view.solarize_probability for view in views] == [0.0, 0.7, 0.7, 0.7, 0.7]
    assert [view.area for view in views] == [(0.2, 1.0)] * 3 + [(0.05, 0.14)] * 2
