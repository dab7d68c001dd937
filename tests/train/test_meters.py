"""Means over steps, slots in use, and the first step that went wrong."""

import io

import pytest
import torch

from caco.distributed.world import World
from caco.model import StepOutput
from caco.train.meters import Meters

WORLD = World(torch.device("cpu"))
SLOTS = 10


def output(loss=1.0, probability=0.5, hit=0.25, spread=0.75, positives=((0, 1), (1, 2))):
    numbers = (torch.tensor(value) for value in (probability, hit))
    return StepOutput(torch.tensor(loss, requires_grad=True), *numbers, torch.tensor(positives), torch.tensor(spread))


def meters_after(*outputs, meters=None):
    meters = meters or Meters(SLOTS, torch.device("cpu"))
    for step, one in enumerate(outputs, start=1):
        meters.add(one, step)
    return meters


def test_means_and_used_slots():
    meters = meters_after(output(1.0, 0.1, 0.0, 0.5), output(2.0, 0.3, 1.0, 0.7, ((9, 9), (1, 1))))
    measured = meters.take(WORLD)
    means = {"loss": 1.5, "positive_probability": 0.2, "hit_rate": 0.5, "feature_spread": 0.6}
    assert {name: getattr(measured, name) for name in means} == pytest.approx(means)
    assert (measured.slots_used, measured.first_bad_step) == (4, None)  # slots 0, 1, 2, 9


def test_taking_starts_anew_but_the_epoch_goes_on():
    meters = meters_after(output(positives=((0, 0), (0, 0))))
    assert meters.take(WORLD).slots_used == 1
    meters.add(output(4.0, positives=((5, 6), (5, 6))), 2)
    measured = meters.take(WORLD)
    assert (measured.loss, measured.slots_used) == (4.0, 2)
    usage = meters.take_epoch_usage(WORLD)
    assert (int(usage.used), int(usage.choices)) == (3, 8)
    assert int(meters.take_epoch_usage(WORLD).choices) == 0


def test_taking_without_a_step_is_harmless():
    measured = Meters(SLOTS, torch.device("cpu")).take(WORLD)
    assert (measured.loss, measured.slots_used, measured.first_bad_step) == (0.0, 0, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_remembered(bad):
    meters = meters_after(output(), output(), output(bad), output(), output(bad))
    assert meters.bad_step(WORLD) == 3
    assert meters.take(WORLD).first_bad_step == 3
    assert meters.bad_step(WORLD) == 3  # not forgotten by a record


def test_the_warm_start_is_watched_too():
    meters = Meters(SLOTS, torch.device("cpu"))
    meters.note_loss(torch.tensor(1.0), 1)
    assert meters.bad_step(WORLD) is None
    meters.note_loss(torch.tensor(float("nan"), requires_grad=True), 2)
    assert meters.bad_step(WORLD) == 2


def test_adding_keeps_no_graph():
    meters = meters_after(output())
    assert not meters.sums.requires_grad
    assert meters.sums.dtype == torch.float64


def test_half_precision_losses_are_summed_in_double():
    meters = Meters(SLOTS, torch.device("cpu"))
    for step in range(1, 1001):
        meters.add(output(0.1)._replace(loss=torch.tensor(0.1, dtype=torch.bfloat16)), step)
    assert meters.take(WORLD).loss == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)), rel=1e-12)


def test_saved_in_the_middle_and_restored():
    outputs = [output(float(step), positives=((step, step), (0, 1))) for step in range(6)]
    whole = meters_after(*outputs)
    first = meters_after(*outputs[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(WORLD), file)
    file.seek(0)
    second = Meters(SLOTS, torch.device("cpu"))
    second.load_state_dict(torch.load(file, weights_only=True), WORLD)
    for step in (5, 6):
        second.add(outputs[step - 1], step)
    assert second.take(WORLD) == whole.take(WORLD)
    ours, theirs = second.take_epoch_usage(WORLD), whole.take_epoch_usage(WORLD)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert first.steps == 4  # loading shares nothing with what was saved


class One(World):
    """A process of several, all in this one: what the others have summed is added at once."""

    def __init__(self, rank, processes):
        super().__init__(torch.device("cpu"), rank, len(processes))
        object.__setattr__(self, "others", [*processes[:rank], *processes[rank + 1 :]])

    def sum(self, values):
        return values + sum(other.sums for other in self.others) if values.shape == (4,) else values

    def maximum(self, values):
        return values


@pytest.mark.parametrize("size", [2, 3, 6])
def test_of_several_processes_nothing_is_rounded_by_saving(size):
    """Divided among 3 and multiplied again, a sum would be another in its last digit."""
    losses = torch.rand(40, size, generator=torch.Generator().manual_seed(0)).tolist()

    def after(steps, processes):
        for rank, meters in enumerate(processes):
            meters_after(*(output(losses[step][rank]) for step in steps), meters=meters)
        return processes

    def new():
        return [Meters(SLOTS, torch.device("cpu")) for _ in range(size)]

    for stopped in range(1, 40):
        first, second = after(range(stopped), new()), new()
        state = first[0].state_dict(One(0, first))
        for rank, meters in enumerate(second):
            meters.load_state_dict(state, One(rank, second))
        whole = after(range(40), new())
        after(range(stopped, 40), second)
        assert second[0].take(One(0, second)).loss == whole[0].take(One(0, whole)).loss


def test_a_bad_step_survives_saving():
    first = meters_after(output(), output(float("nan")))
    second = Meters(SLOTS, torch.device("cpu"))
    second.load_state_dict(first.state_dict(WORLD), WORLD)
    assert second.bad_step(WORLD) == 2
