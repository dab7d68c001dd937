"""Dataclasses to options and back: types, groups, help texts, and every way to get them wrong."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, Union

import pytest

from caco.after_training import Knn, Linear
from caco.config import Pretrain
from caco.errors import UsageError
from caco.options import checked, flatten, from_dictionary, override, parse, words


@dataclass(frozen=True)
class Inner:
    """A group of options."""

    size: int = 3
    """Side, in pixels."""
    area: tuple[float, float] = (0.2, 1.0)
    """Least and largest share; 100 % at most."""


@dataclass(frozen=True)
class Outer:
    """A command."""

    name: str = ""
    """A name."""
    kind: Literal["fast", "slow"] = "fast"
    """A kind."""
    steps: Union[int, Literal["auto"]] = "auto"
    """Steps."""
    rate: Union[float, Literal["auto"]] = "auto"
    """Rate."""
    neighbours: tuple[int, ...] = (20,)
    """Neighbours."""
    quick_look: bool = False
    """Whether to be quick."""
    inner: Inner = Inner()


def parsed(*arguments: str, start=lambda given: Outer()) -> Outer:
    return parse(Outer, arguments, "caco outer", start)


def test_every_kind_of_value():
    assert parsed() == Outer()
    line = (
        "--name a --kind slow --steps 5 --rate 1e-3 --neighbours 1 5 --quick-look --inner.size 7 --inner.area 0.1 0.5"
    )
    inner = Inner(size=7, area=(0.1, 0.5))
    expected = Outer(name="a", kind="slow", steps=5, rate=1e-3, neighbours=(1, 5), quick_look=True, inner=inner)
    assert parsed(*line.split()) == expected
    assert isinstance(parsed("--steps", "5").steps, int)
    assert parsed("--steps=auto", "--rate=auto", "--no-quick-look") == Outer()
    assert parsed("--rate", "-1").rate == -1.0  # a negative number is a value, not an option


def test_start_sees_what_is_given_and_loses_to_it():
    seen = []

    def start(given):
        seen.append(dict(given))
        return Outer(name="from the recipe", steps=9, inner=Inner(size=5))

    result = parsed("--steps", "2", "--inner.area", "0", "1", start=start)
    assert result == Outer(name="from the recipe", steps=2, inner=Inner(size=5, area=(0.0, 1.0)))
    assert seen[-1] == {"steps": 2, "inner.area": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--inner.sise", "3"], ["unknown option --inner.sise", "Did you mean --inner.size"]),
        (["--inner.sise=3"], ["unknown option --inner.sise.", "--inner.size"]),
        (
            ["--quick"],
            ["unknown option --quick", "--quick-look"],
        ),  # no abbreviations: they break when options are added
        (["--kind", "slwo"], ["'slwo' is not one of fast, slow", "Did you mean slow"]),
        (["--steps", "many"], ["--steps", "'many' is neither a number nor auto"]),
        (["--steps", "1.5"], ["--steps", "'1.5'"]),
        (["--inner.size", "big"], ["--inner.size", "'big'"]),
        (["--inner.area", "0.5"], ["--inner.area", "expected 2 arguments"]),
        (["--neighbours"], ["--neighbours", "at least one argument"]),
        (["--name"], ["--name", "expected one argument"]),
        (["stray"], ["what is 'stray' for?"]),
        ([""], ["what is '' for?"]),  # caco pretrain "$UNSET"
    ],
)
def test_errors_are_one_line_with_the_option_and_the_way_to_help(line, words):
    with pytest.raises(UsageError) as caught:
        parsed(*line)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "caco outer --help" in message
    for word in words:
        assert word in message


def test_help_shows_text_unit_and_default(capsys):
    with pytest.raises(SystemExit) as done:
        parsed("--help", start=lambda given: Outer(inner=Inner(size=11)))
    assert not done.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert "A command." in text
    assert "A group of options." in text
    assert "--inner.size int Side, in pixels. [11]" in text
    assert "--inner.area float float Least and largest share; 100 % at most. [0.2 1.0]" in text
    assert "--kind fast|slow A kind. [fast]" in text
    assert "--steps int|auto Steps. [auto]" in text
    assert "--name str A name. [none]" in text


def test_override_reaches_into_groups_without_touching_the_rest():
    values = Outer()
    changed = override(values, {"inner.size": 9, "name": "b", "inner.area": (0.0, 0.1)})
    assert changed == Outer(name="b", inner=Inner(size=9, area=(0.0, 0.1)))
    assert values == Outer()


def test_flatten_and_from_dictionary_are_inverse_through_json():
    config = override(Pretrain(), {"views.size": 32, "views.blur": (0.5, 0.25), "epochs": 3, "bank.lr": 1.5})
    again = from_dictionary(Pretrain, json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert flatten(again)["views.blur"] == (0.5, 0.25)
    assert len(flatten(config)) == len(set(flatten(config))) > 50


@pytest.mark.parametrize("content", [{"sise": 3}, {"inner": {"sise": 3}}])
def test_from_dictionary_refuses_unknown_settings(content):
    with pytest.raises(UsageError, match="unknown setting 'sise' in the configuration of (Outer|Inner)"):
        from_dictionary(Outer, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"rate": "8"}, "wrong setting in the configuration of Outer: rate='8': must be float."),
        ({"inner": {"size": None}}, "wrong setting in the configuration of Inner: size=None: must be int."),
        ({"inner": 5}, "5 is not a group of settings in the configuration of Inner"),
        ([1], "[1] is not a group of settings in the configuration of Outer"),
    ],
)
def test_from_dictionary_refuses_what_is_of_another_type(content, words):
    with pytest.raises(UsageError) as caught:
        from_dictionary(Outer, content)
    assert str(caught.value) == words


def test_values_from_python_are_fitted(tmp_path):
    given = {
        "name": tmp_path,
        "rate": 1,
        "steps": "auto",
        "neighbours": [3, 4],
        "inner.area": [0, 1],
        "quick_look": True,
    }
    fitted = checked(Outer, given)
    assert fitted == {**given, "name": str(tmp_path), "neighbours": (3, 4), "inner.area": (0.0, 1.0)}
    assert isinstance(fitted["rate"], float)
    assert checked(Outer, {"neighbours": 5}) == {"neighbours": (5,)}
    json.dumps(fitted)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("inner.size", "big", "inner.size='big': must be int"),
        ("inner.size", 1.5, "inner.size=1.5: must be int"),
        ("inner.size", True, "must be int"),
        ("inner.size", float("nan"), "inner.size=nan: must be int"),
        ("steps", float("inf"), "steps=inf: must be int"),
        ("neighbours", float("-inf"), "neighbours=-inf: must be int"),
        ("inner.area", 0.5, "must be 2 x float"),
        ("inner.area", (0.1, 0.2, 0.3), "must be 2 x float"),
        ("neighbours", (), "neighbours"),
        ("neighbours", "five", "neighbours='five': must be int"),
        ("kind", "slwo", "must be fast|slow. Did you mean slow"),
        ("steps", "many", "must be int"),
        ("quick_look", 1, "must be True or False"),
        ("name", 5, "must be text or a path"),
        ("rate", None, "must be float"),
    ],
)
def test_wrong_values_from_python_are_usage_errors(name, value, words):
    with pytest.raises(UsageError) as caught:
        checked(Outer, {name: value})
    assert words in str(caught.value)


def test_what_is_typed_for_options():
    """The words that differ from another's; what stands without a flag, and empty texts, are left out."""
    typed = list(words(Linear(run="runs/first", data="a b", lr=0.5, mean=(0.5, 0.4, 0.3), download=True), Linear()))
    assert typed == [("--data", "a b"), ("--mean", "0.5", "0.4", "0.3"), ("--download",), ("--lr", "0.5")]
    assert list(words(Linear(), Linear(run="runs/first", data="photos"))) == []


def test_the_real_commands_parse_their_own_defaults():
    """What --help shows as a default is accepted as a value."""
    for kind in (Pretrain, Knn):
        line = []
        for name, value in flatten(kind()).items():
            if name == "run" or value in ("", ()):
                continue
            flag = f"--{name}".replace("_", "-")
            if isinstance(value, bool):
                line.append(flag if value else f"--no-{flag[2:]}")
            else:
                line += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        assert parse(kind, line, "caco", lambda given, kind=kind: kind()) == kind()
