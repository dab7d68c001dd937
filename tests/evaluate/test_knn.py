"""kNN voting: the reference's rankings, a plain loop, chunk borders, ties, and what can be wrong with the input."""

import math

import numpy as np
import pytest
import torch

from caco.errors import CacoError, UsageError
from caco.evaluate import knn
from caco.evaluate.knn import Voting, first_share_of_each_class, held_out_split, knn_accuracy, knn_guesses


def plain_votes(reference, labels, queries, classes, neighbours, temperature, forbidden=None):
    """One query, one neighbour at a time, in plain Python floats; of equal neighbours the earlier."""
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    for row, query in enumerate(queries.tolist()):
        found = []
        for index, other in enumerate(reference.tolist()):
            if forbidden is not None and index == forbidden[row]:
                continue
            product = sum(a * b for a, b in zip(query, other, strict=True))
            found.append((-product / (math.hypot(*query) * math.hypot(*other)), index))
        for negative, index in sorted(found)[:neighbours]:
            votes[row, labels[index]] += math.exp(-negative / temperature)
    return votes


def votes_of(reference, labels, queries, classes, neighbours, temperature=0.2):
    """All votes [M, C], as they are counted chunk by chunk."""
    counts = [min(neighbours, len(reference))]
    chunks = knn.votes_by_chunk(reference, labels, queries, classes, Voting(counts, temperature))
    return torch.cat([votes for (votes,) in chunks])


@pytest.mark.parametrize("neighbours", [20, 200])
def test_rankings_of_the_reference(golden, neighbours):
    values = golden("knn")
    (guesses,) = knn_guesses(values["reference"], values["labels"], values["queries"], 7, Voting([neighbours]))
    assert torch.equal(guesses, values[f"ranking_k{neighbours}"][:, :5])


@pytest.mark.parametrize(("queries", "images", "classes", "neighbours"), [(1, 1, 1, 1), (7, 23, 4, 5), (9, 30, 2, 99)])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("chunks", [(1024, 16384), (2, 7), (3, 1)])
def test_votes_equal_a_plain_loop(monkeypatch, queries, images, classes, neighbours, temperature, chunks):
    monkeypatch.setattr(knn, "QUERY_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "REFERENCE_CHUNK", chunks[1])
    generator = torch.Generator().manual_seed(queries)
    reference = torch.randn(images, 6, generator=generator, dtype=torch.float64) * 3
    asked = torch.randn(queries, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    expected = plain_votes(reference, labels, asked, classes, neighbours, temperature)
    votes = votes_of(reference, labels, asked, classes, neighbours, temperature)
    torch.testing.assert_close(votes, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_compared_in_float32(dtype):
    reference = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(40) % 3
    votes = votes_of(reference, labels, reference[:5], 3, 10)
    expected = plain_votes(reference.double(), labels, reference[:5].double(), 3, 10, 0.2)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunks", [(1024, 16384), (2, 3)])
def test_leave_one_out(monkeypatch, chunks):
    monkeypatch.setattr(knn, "QUERY_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "REFERENCE_CHUNK", chunks[1])
    features = torch.randn(14, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = torch.arange(14) % 3
    results = knn_accuracy(features, labels, features, labels, Voting([1, 4, 500], leave_one_out=True))
    for asked, result in zip([1, 4, 13], results, strict=True):
        votes = plain_votes(features, labels, features, 3, asked, 0.2, forbidden=list(range(14)))
        assert result.neighbours == asked
        assert torch.equal(result.correct, votes.argmax(dim=1) == labels)
        assert result.top1 == pytest.approx((votes.argmax(dim=1) == labels).double().mean().item())
    assert "only 13 reference images" in results[2].note
    assert not results[0].note
    with_itself = knn_accuracy(features, labels, features, labels, Voting([1]))[0]
    assert with_itself.top1 == 1.0


@pytest.mark.parametrize("reference_chunk", [16384, 4, 1])
def test_ties_take_the_earlier_neighbour_and_the_lower_class(monkeypatch, reference_chunk):
    monkeypatch.setattr(knn, "REFERENCE_CHUNK", reference_chunk)
    same = torch.tensor([[1.0, 0.0]]).repeat(9, 1)
    labels = torch.tensor([2, 2, 1, 0, 0, 0, 0, 0, 0])
    votes = votes_of(same, labels, same[:1], 3, 3)
    torch.testing.assert_close(votes, torch.tensor([[0.0, 1.0, 2.0]]) * math.exp(5))
    (guesses,) = knn_guesses(same, torch.tensor([2, 2, 1, 1, 0, 3, 3, 0, 0]), same[:1], 4, Voting([5]))
    assert guesses.tolist() == [[1, 2, 0, -1]]


@pytest.mark.parametrize("levels", [1, 2, 4, 40])
@pytest.mark.parametrize("width", [33, 512, 700])
def test_largest_equals_a_stable_sort_with_many_ties(levels, width):
    values = torch.randint(0, levels, (50, width), generator=torch.Generator().manual_seed(0)).double()
    values[torch.arange(50), torch.arange(50) % width] = -torch.inf  # what leave-one-out forbids
    for count in (1, 5, 20, 33):
        top, columns = knn.largest(values, count)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
        assert torch.equal(columns, order)
        assert torch.equal(top, values.gather(1, order))


def test_top5_counts_only_classes_with_votes():
    # Two neighbours vote, for classes 6 and 7: the other classes are not guesses.
    reference = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    labels = torch.tensor([6, 7, 0])
    queries = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    (result,) = knn_accuracy(reference, labels, queries, torch.tensor([6, 7, 0]), Voting([2]))
    assert (result.top1, result.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert result.correct.tolist() == [True, False, False]


def test_one_class_is_always_right():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    (result,) = knn_accuracy(features, torch.zeros(4, dtype=torch.long), features, torch.zeros(4, dtype=torch.long))
    assert (result.top1, result.top5, result.neighbours) == (1.0, 1.0, 4)


def test_wrong_input_is_told():
    features, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
    with pytest.raises(CacoError, match="label 3 of the reference is outside 0-2"):
        knn_guesses(features, labels, features, 3)
    with pytest.raises(CacoError, match="label -1 of the queries"):
        knn_accuracy(features, labels, features, torch.tensor([0, -1, 1, 1]))
    with pytest.raises(CacoError, match="at least one labelled image"):
        knn_guesses(features[:0], labels[:0], features, 4)
    with pytest.raises(CacoError, match="at least one labelled image"):
        knn_accuracy(features[:1], labels[:1], features[:1], labels[:1], Voting(leave_one_out=True))
    with pytest.raises(CacoError, match="at least one image to judge"):
        knn_accuracy(features, labels, features[:0], labels[:0])
    with pytest.raises(CacoError, match="leave-one-out"):
        knn_accuracy(features, labels, features[:2], labels[:2], Voting(leave_one_out=True))
    with pytest.raises(UsageError, match="at least 1"):
        knn_guesses(features, labels, features, 4, Voting([0]))
    with pytest.raises(UsageError, match="temperature"):
        knn_guesses(features, labels, features, 4, Voting(temperature=0.0))


def test_first_share_of_each_class():
    labels = np.array([1, 0, 1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 1])  # 10 of class 1, 2 of class 0, 1 of class 2
    assert first_share_of_each_class(labels, 0.2).tolist() == [0, 1, 2, 7]
    assert len(first_share_of_each_class(np.zeros(100, np.int64), 0.29)) == 29  # 0.29 · 100 is 28.999… in binary
    assert first_share_of_each_class(torch.tensor([0, 0, 0]), 0.5).tolist() == [0]
    with pytest.raises(UsageError):
        first_share_of_each_class(labels, 1.5)


def test_held_out_split_is_stratified_and_repeatable():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [50, 20, 2, 1]))
    kept, held = held_out_split(labels, 0.1, seed=3)
    assert sorted([*kept, *held]) == list(range(73))
    assert np.bincount(labels[held], minlength=4).tolist() == [5, 2, 1, 0]
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    assert np.array_equal(held_out_split(torch.from_numpy(labels), 0.1, seed=3)[1], held)
    assert not np.array_equal(held_out_split(labels, 0.1, seed=4)[1], held)
    assert np.bincount(labels[held_out_split(labels, 0.99, seed=0)[0]]).tolist() == [1, 1, 1, 1]
    with pytest.raises(CacoError, match="no class has two images"):
        held_out_split(np.arange(5), 0.1, seed=0)
