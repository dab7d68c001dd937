"""The verdict says what is known: no learning without labels that show it, and none where they do not."""

import dataclasses
import json
from pathlib import Path

import pytest
from colour_photos import make_photos

from caco.config import Pretrain, Views
from caco.deliver import records
from caco.deliver.insight import Agreement
from caco.deliver.judgements import Comparison, Judged
from caco.deliver.verdict import verdict_of
from caco.options import override

RECORDED = Path(__file__).parents[2] / "results"
CONFIG = Pretrain(data="textures", val="textures", epochs=2, batch_size=64, bank_size=512)
SPREAD, USED = 0.7, 300


def train(step, loss, spread=SPREAD):
    return {"kind": "train", "step": step, "loss": loss, "positive_probability": 0.1, "feature_spread": spread}


def epochs(count, used=USED):
    steps = range(30, 30 * count + 1, 30)
    return [
        {"kind": "epoch", "step": step, "epoch": step // 30 - 1, "slots_used": used, "slot_perplexity": used / 2}
        for step in steps
    ]


def falling(spread=SPREAD):
    return [train(step, 11 - step / 60, spread) for step in range(5, 61, 5)]


def agreement(above_untrained=True, above_pixels=True):
    shares = {"encoder": 0.5, "untrained": 0.2, "pixels": 0.3, "chance": 0.1}
    return Agreement(**shares, above_untrained=above_untrained, above_pixels=above_pixels, neighbours=7, images=200)


def comparison(own, step=60, judge="knn", images=1000, seen=False, **baselines):
    """A judgement of the run and of baselines, by their accuracies in percent; seen: whether trained on its images."""
    accuracies = [("this run", "", step, own), *((name, name, 0, top1) for name, top1 in baselines.items())]
    judged = tuple(
        Judged(name, not baseline, baseline, at, top1, (top1, top1), 90.0) for name, baseline, at, top1 in accuracies
    )
    return Comparison(judge, "how", "train", "val", 100, images, 32, 10, seen, judged, ())


def said(lines, config=CONFIG, **known):
    """Return mood, headline and all reasons of a run with these records."""
    verdict = verdict_of(records.summarise(lines, config), config, **known)
    assert all(reason.endswith(".") and not reason.endswith("..") for reason in verdict.reasons)
    return verdict.mood, verdict.headline, " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("spread", "used", "mood", "headline"),
    [
        (0.7, 300, "unknown", "Better than without training, on the images it was trained on."),
        (0.1, 300, "warning", "This run could do better."),
        (0.01, 300, "bad", "This run has failed."),
        (0.7, 9, "warning", "This run could do better."),
    ],
)
def test_what_is_wrong_comes_first(spread, used, mood, headline):
    lines = [*falling(spread), *epochs(4, used)]
    assert said(lines, agreement=agreement())[:2] == (mood, headline)


def test_nothing_is_wrong_in_the_first_steps():
    """An encoder begins with embeddings that hardly differ."""
    assert said([*falling(0.01), *epochs(2, used=2)])[0] == "unknown"


def test_nothing_recorded_is_nothing_known():
    assert said([])[:2] == ("unknown", "No training step has been recorded yet.")


def test_no_sign_of_collapse_is_not_learning():
    """Without labels a loss that falls and a bank in use say no more than that."""
    mood, headline, reasons = said([*falling(), *epochs(2)])
    assert (mood, headline) == ("unknown", "No sign of collapse.")
    assert "only labelled images tell" in reasons
    assert "The loss fell: 10.79 in the first third of the records, 10.12 in the last (by guessing 12.48)" in reasons


@pytest.mark.parametrize(
    ("losses", "mood", "headline"),
    [
        ([11.9, 11.8], "unknown", "Too short to tell."),
        ([11.9, 11.7, 11.8, 11.9, 11.8, 11.7], "warning", "No sign that it has learnt."),
        ([10.0, 10.1, 10.2, 10.9, 11.0, 11.1], "warning", "No sign that it has learnt."),
        ([12.7, 12.6, 12.6, 12.55, 12.5, 12.49], "warning", "No sign that it has learnt."),  # guessing is 12.48
        ([11.9, 11.8, 11.5, 11.4, 11.1, 11.0], "unknown", "No sign of collapse."),
    ],
)
def test_a_loss_that_hardly_falls_is_told(losses, mood, headline):
    lines = [train(10 * place, loss) for place, loss in enumerate(losses, start=1)]
    assert said([*lines, *epochs(2)])[:2] == (mood, headline)


@pytest.mark.parametrize(
    ("known", "mood", "headline"),
    [
        (agreement(), "unknown", "Better than without training, on the images it was trained on."),
        (agreement(above_pixels=False), "warning", "Better than an untrained encoder, but no better than pixels."),
        (agreement(False, True), "warning", "No better than an untrained encoder, as far as these images tell."),
    ],
)
def test_neighbours_in_class_against_both_baselines(known, mood, headline):
    told = said([*falling(), *epochs(2)], agreement=known)
    assert told[:2] == (mood, headline)
    assert "in 50 % of cases, with an untrained encoder in 20 %, by pixels in 30 % (200 images)" in told[2]
    assert "on the images it was trained on" in " ".join(told[1:])


def test_judgements_come_before_what_the_report_itself_has_looked_at():
    lines = [*falling(), *epochs(2)]
    judged = [comparison(40.0, random=30.0, pixels=32.0), comparison(50.0, judge="linear", random=35.0)]
    mood, headline, reasons = said(lines, agreement=agreement(False, False), comparisons=judged)
    assert (mood, headline) == ("good", "It has learnt.")
    assert "Nearest neighbours: 40.0 % of 1,000 images right; random 30.0 %, pixels 32.0 %; linear classif" in reasons
    fewer = comparison(40.0, images=20, random=30.0, pixels=32.0)  # of so few, that difference is chance
    assert said(lines, comparisons=[fewer])[1].startswith("No better than an untrained encoder")
    assert said(lines, comparisons=[comparison(40.0, random=30.0, pixels=45.0)])[1].endswith("than pixels.")
    both = [*judged, comparison(35.0, judge="linear", random=35.0)]  # the worst of several decides
    assert said(lines, comparisons=both)[1].startswith("No better than an untrained encoder")


@pytest.mark.parametrize(
    "judged",
    [
        comparison(40.0, step=30, random=30.0, pixels=32.0),  # of the run as it was
        comparison(40.0, pixels=32.0),  # an untrained encoder may be better than pixels, too
        comparison(40.0),
    ],
)
def test_judgements_that_do_not_tell(judged):
    assert said([*falling(), *epochs(2)], comparisons=[judged])[1] == "No sign of collapse."


@pytest.mark.parametrize(
    ("accuracies", "queries", "headline"),
    [
        ((30.0, 50.0, 60.0), 200, "It has become better."),
        ((60.0, 50.0, 30.0), 200, "It has become worse."),
        ((30.0, 33.0), 200, "No sign of collapse."),  # 3 of 100 is chance
        ((30.0, 33.0), 20_000, "It has become better."),
        ((60.0,), 200, "No sign of collapse."),
    ],
)
def test_knn_checks_are_compared_with_the_first(accuracies, queries, headline):
    checks = [
        {"kind": "knn", "step": 30, "epoch": epoch, "top1": top1, "queries": queries}
        for epoch, top1 in enumerate(accuracies)
    ]
    told = said([*falling(), *epochs(2), *checks])
    assert told[1] == headline
    compared = (
        f"At the first check kNN was {accuracies[0]:.1f} %, at the last {accuracies[-1]:.1f} %, of {queries:,} images"
    )
    assert (compared in told[2]) == (len(accuracies) > 1)


def test_images_that_the_run_was_trained_on_come_last():
    lines = [*falling(), *epochs(2)]
    seen = comparison(40.0, seen=True, random=30.0, pixels=32.0)
    unseen = comparison(31.0, random=30.0, pixels=32.0)
    assert said(lines, comparisons=[seen])[:2] == (
        "unknown",
        "Better than without training, on the images it was trained on.",
    )
    assert said(lines, comparisons=[seen, unseen])[:2] == (
        "warning",
        "No better than an untrained encoder, as far as these images tell.",
    )
    checks = [
        {"kind": "knn", "step": 30, "epoch": epoch, "top1": top1, "queries": 500} for epoch, top1 in ((0, 30), (1, 50))
    ]
    assert said([*lines, *checks], comparisons=[seen])[1] == "It has become better."  # of --val, not trained on
    for val, of in (("", "the images it was trained on"), ("array", "images it may have been trained on")):
        config = dataclasses.replace(CONFIG, val=val)
        assert said([*lines, *checks], config)[:2] == ("unknown", f"It has become better, on {of}.")


def test_images_that_it_may_have_been_trained_on_show_no_learning():
    """Arrays, say, have a name and no place: nobody can tell afterwards whether two of them are the same."""
    perhaps = comparison(40.0, seen=None, random=30.0, pixels=32.0)
    told = ("unknown", "Better than without training, on images it may have been trained on.")
    for judged in ([perhaps], [comparison(40.0, seen=True, random=30.0, pixels=32.0), perhaps]):
        assert said([*falling(), *epochs(2)], comparisons=judged)[:2] == told


@pytest.mark.parametrize("val", ["photos", "photos/red", "photos/*/*0.jpg"])
def test_checks_by_a_part_of_the_training_images_show_no_learning(tmp_path, monkeypatch, val):
    make_photos(tmp_path / "photos", 4)
    monkeypatch.chdir(tmp_path)
    checks = [
        {"kind": "knn", "step": 30, "epoch": epoch, "top1": top1, "queries": 500} for epoch, top1 in ((0, 30), (1, 50))
    ]
    config = dataclasses.replace(CONFIG, data="photos", val=val)
    told = said([*falling(), *epochs(2), *checks], config)
    assert told[:2] == ("unknown", "It has become better, on the images it was trained on.")


def test_an_unfinished_run_says_how_far_it_is():
    config = dataclasses.replace(CONFIG, epochs=40)
    assert "2 of 40 epochs are done." in said([*falling(), *epochs(2)], config)[2]
    assert "epochs are done" not in said([*falling(), *epochs(2)])[2]


def test_a_run_of_few_steps_is_told_to_be_longer():
    few = "It took 60 steps only"
    assert few in said([*falling(), *epochs(2)])[2]
    assert few in said([*falling(), *epochs(2)], agreement=agreement(above_untrained=False))[2]
    assert few not in said([*falling(), *epochs(1)])[2], "it is not finished"
    assert few not in said([*falling(), *epochs(2)], comparisons=[comparison(60, random=20, pixels=30)])[2]


def test_odd_rates_are_part_of_a_bad_verdict():
    short = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, warmup_epochs=2))
    assert "warms up over 2 epochs" in said([*falling(), *epochs(2)], short, agreement=agreement(False, False))[2]


def test_what_a_run_began_from_has_its_part():
    started = dataclasses.replace(CONFIG, weights="runs/before")
    assert "It began from runs/before" in said([*falling(), *epochs(2)], started, agreement=agreement())[2]


@pytest.mark.parametrize(
    ("run", "options", "mood", "headline"),
    [
        ("caltech30", {"epochs": 60}, "good", "It has become better."),  # kNN 33.8 to 40.0 % of 600
        ("cifar", {"epochs": 4}, "unknown", "No sign of collapse."),  # 42.5 to 43.9 %, checked when it had long learnt
    ],
)
def test_real_runs_by_their_records_alone(run, options, mood, headline):
    """Good runs (docs/results.md) get no bad verdict; cut off after their first records, no good one."""
    config = override(Pretrain(data="textures", val="textures", bank_size=1024, views=Views()), options)
    lines = [json.loads(line) for line in (RECORDED / run / "metrics.jsonl").read_text().splitlines()]
    assert said(lines, config)[:2] == (mood, headline)
    begun = [line for line in lines if line["step"] <= 60 and line["kind"] == "train"]
    assert said(begun, config)[1] in ("No sign that it has learnt.", "Too short to tell.")
