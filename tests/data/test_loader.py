"""Batches of views: the same whatever the threads, the processes, the start, and the way images are held."""

import threading

import numpy as np
import pytest
import torch

from caco.config import Views
from caco.data import resident
from caco.data.broken import BrokenImages
from caco.data.decode import BrokenImage
from caco.data.load import load_or_next
from caco.data.loader import TrainingViews
from caco.data.makers import FromDevice, FromMemory, FromSource
from caco.data.order import epoch_order
from caco.errors import CacoError, UsageError

SIDE, COUNT, BATCH = 12, 40, 8
VIEWS = Views(size=8, small=1, small_size=6, blur=(0.5, 0.5), evaluation_resize=8)


class Pictures:
    """Random pictures, all of one size or of many; some broken."""

    name, classes, labels = "pictures", (), None

    def __init__(self, count=COUNT, equal=True, broken=()):
        generator = np.random.default_rng(0)
        sides = [(SIDE, SIDE) if equal else (SIDE + number % 5, SIDE + number % 3) for number in range(count)]
        self.images = [generator.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
        self.broken = set(broken)

    def __len__(self):
        return len(self.images)

    def key(self, index):
        return f"picture {index}"

    def load(self, index):
        if index in self.broken:
            raise BrokenImage(self.key(index), "made so")
        return self.images[index]


def views_of(source, *, batch_size=BATCH, seed=3, workers=2, broken=None, device="cpu", **share):
    return TrainingViews.create(
        source,
        VIEWS.augmentations(),
        VIEWS.mean,
        VIEWS.std,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        device=torch.device(device),
        broken=BrokenImages(len(source), 1.0) if broken is None else broken,
        **share,
    )


def assert_equal_batches(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert np.array_equal(one.indices, other.indices)
        for a, b in zip(one.views, other.views, strict=True):
            assert torch.equal(a, b)


def no_thread_of_ours() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith(("prefetch", "views"))]


def test_order_is_a_permutation_keyed_by_seed_and_epoch():
    order = epoch_order(1000, 5, 2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, epoch_order(1000, 5, 2))
    others = [epoch_order(1000, 5, 3), epoch_order(1000, 6, 2), epoch_order(1000, 2, 5), np.arange(1000)]
    assert all((order != other).mean() > 0.9 for other in others)


def test_order_is_the_same_on_every_machine():
    """Pinned: a resume on another machine must visit the same images."""
    assert epoch_order(10, 0, 0).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert epoch_order(10, 7, 1_000_000).tolist() == [7, 1, 9, 2, 6, 8, 4, 3, 5, 0]


def test_batches_cover_the_epoch_once():
    source = Pictures(43)
    batches = list(views_of(source).batches(0))
    assert len(batches) == views_of(source).steps_per_epoch == 43 // BATCH
    seen = np.concatenate([batch.indices for batch in batches])
    assert np.array_equal(seen, epoch_order(43, 3, 0)[: 5 * BATCH])
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(8, 3, 8, 8), (8, 3, 8, 8), (8, 3, 6, 6)]
        assert all(view.dtype == torch.float32 and view.isfinite().all() for view in batch.views)


def test_views_are_those_of_the_image_the_indices_name():
    """Pictures of one colour each: normalisation undone, a view without jitter shows which picture it came from."""
    source = Pictures(20)
    source.images = [np.full((SIDE, SIDE, 3), 10 * number, np.uint8) for number in range(20)]
    plain = Views(size=8, jitter=0.0, gray=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0), evaluation_resize=8)
    batches = TrainingViews.create(
        source,
        plain.augmentations(),
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        batch_size=5,
        seed=0,
        workers=2,
        device=torch.device("cpu"),
        broken=BrokenImages(20, 1.0),
    )
    for batch in batches.batches(4):
        for view in batch.views:
            shown = (view * 255).mean(dim=(1, 2, 3)) / 10
            np.testing.assert_allclose(shown.numpy(), batch.indices, atol=0.01)


@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
def test_workers_do_not_matter(equal):
    one = views_of(Pictures(equal=equal), workers=1, batch_size=20).batches(1)
    four = views_of(Pictures(equal=equal), workers=4, batch_size=20).batches(1)
    assert_equal_batches(one, four)


@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_start_inside_an_epoch(equal, first):
    source = Pictures(equal=equal)
    whole = list(views_of(source).batches(2))
    assert_equal_batches(whole[first:], views_of(source).batches(2, first))
    assert_equal_batches(whole[first : first + 1], views_of(source).batches(2, first, min(first + 1, 5)))


def test_steps_run_on_into_the_next_epochs():
    source = Pictures()
    whole = [batch for epoch in (3, 4, 5) for batch in views_of(source).batches(epoch)]
    views = views_of(source)
    assert_equal_batches(whole[2:], views.batches(3, 2, 3 * views.steps_per_epoch))


def test_epochs_and_seeds_differ():
    source = Pictures()
    first, again = (next(views_of(source).batches(0)) for _ in range(2))
    assert_equal_batches([first], [again])
    for other in (views_of(source).batches(1), views_of(source, seed=4).batches(0)):
        assert not torch.equal(next(other).views[0], first.views[0])


def test_the_two_views_of_an_image_differ():
    batch = next(views_of(Pictures()).batches(0))
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("size", [2, 4])
def test_union_of_the_processes_is_the_batch_of_one(equal, size):
    source = Pictures(equal=equal)
    whole = list(views_of(source).batches(1))
    parts = [list(views_of(source, rank=rank, world_size=size).batches(1)) for rank in range(size)]
    for step, batch in enumerate(whole):
        pieces = [part[step] for part in parts]
        assert np.array_equal(np.concatenate([piece.indices for piece in pieces]), batch.indices)
        for number, view in enumerate(batch.views):
            assert torch.equal(torch.cat([piece.views[number] for piece in pieces]), view)


def test_resident_and_streamed_views_are_the_same(monkeypatch):
    source = Pictures(broken=[4, 5])
    held = views_of(source)
    assert isinstance(held.maker, FromMemory)
    monkeypatch.setattr(resident, "RESIDENT_SHARE", 0.0)  # nothing may be held
    streamed = views_of(source)
    assert isinstance(streamed.maker, FromSource)
    assert_equal_batches(held.batches(0), streamed.batches(0))


def test_the_maker_of_a_gpu_makes_the_views_of_the_others():
    """Here on the CPU, in plain torch; on a GPU: below."""
    held = views_of(Pictures())
    on_device = FromDevice(held.maker.images, held.maker.views)
    for epoch, step in ((0, 1), (1, 0)):
        batch = next(held.batches(epoch, step))
        ours = on_device.make(batch.indices, epoch)
        assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(ours, batch.views, strict=True))


def test_sizes_that_differ_where_the_probes_do_not_look():
    source = Pictures(400)
    source.images[1] = np.zeros((SIDE + 1, SIDE, 3), np.uint8)
    assert 1 not in np.linspace(0, 399, 32).astype(int)
    assert isinstance(views_of(source).maker, FromSource)
    assert len(list(views_of(source).batches(0, 48))) == 2


@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
def test_a_broken_image_is_replaced_by_the_next_good_one(equal, tmp_path):
    healthy, source = Pictures(equal=equal), Pictures(equal=equal, broken=[7, 8, COUNT - 1])
    if not equal:
        for index in (7, 8, COUNT - 1):  # the parameters are drawn for the size of the image that is shown
            healthy.images[index] = source.images[{7: 9, 8: 9, COUNT - 1: 0}[index]]
    else:
        healthy.images[7] = healthy.images[8] = healthy.images[9]
        healthy.images[-1] = healthy.images[0]
    broken = BrokenImages(COUNT, 1.0)
    broken.list_in(tmp_path / "skipped.txt")
    assert_equal_batches(views_of(source, broken=broken).batches(0), views_of(healthy).batches(0))
    broken.write()
    expected = [f"picture {index}\tmade so" for index in (COUNT - 1, 7, 8)]
    assert sorted((tmp_path / "skipped.txt").read_text().splitlines()) == sorted(expected)


def test_load_or_next():
    source, broken = Pictures(5, broken=[3, 4]), BrokenImages(5, 1.0)
    assert load_or_next(source, 3, broken, source.load) is source.images[0]
    assert len(broken) == 2
    none = Pictures(3, broken=[0, 1, 2])
    with pytest.raises(CacoError, match="no image that can be read"):
        load_or_next(none, 1, BrokenImages(3, 1.0), none.load)


@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
def test_too_many_broken_images_stop_and_name_the_list(equal, tmp_path):
    path = tmp_path / "skipped.txt"
    broken = BrokenImages(COUNT, 0.1)
    broken.list_in(path)
    with pytest.raises(CacoError, match=r"5 of 40 images are broken, more than the share of 0\.1 .*skipped\.txt"):
        list(views_of(Pictures(equal=equal, broken=range(3, 23)), broken=broken).batches(0))
    assert len(path.read_text().splitlines()) == 5
    assert no_thread_of_ours()


def test_errors_in_a_thread_reach_the_consumer():
    source = Pictures(equal=False)
    views = views_of(source)
    broken_at = int(epoch_order(COUNT, 3, 0)[BATCH])  # in the second batch
    good = source.load

    def load(index):
        if index == broken_at:
            raise ZeroDivisionError("in a thread")
        return good(index)

    source.load = load
    batches = views.batches(0)
    next(batches)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        list(batches)
    assert no_thread_of_ours()


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
def test_no_thread_outlives_a_closed_epoch(taken, equal):
    batches = views_of(Pictures(equal=equal)).batches(0)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert no_thread_of_ours()


def test_no_thread_outlives_an_epoch_or_an_error_of_the_consumer():
    def train():
        for number, _ in enumerate(views_of(Pictures()).batches(0)):
            if number == 2:
                raise KeyError("in the step")

    assert len(list(views_of(Pictures()).batches(0))) == 5
    assert no_thread_of_ours()
    with pytest.raises(KeyError):
        train()
    assert no_thread_of_ours()


def test_batches_are_made_ahead_but_not_all():
    source, loads = Pictures(80, equal=False), []
    views = views_of(source)
    good = source.load
    source.load = lambda index: (loads.append(index), good(index))[1]
    batches = views.batches(0)
    next(batches)
    threading.Event().wait(0.4)  # time enough to run far ahead
    assert BATCH < len(loads) <= 5 * BATCH  # one taken, two ready, one waiting to be put, one being made
    batches.close()


def test_impossible_batches_are_usage_errors():
    with pytest.raises(UsageError, match="40 images, fewer than one batch; use --batch-size 40 or less"):
        views_of(Pictures(), batch_size=41)
    with pytest.raises(UsageError, match="40 images, fewer than one batch; use --batch-size 39 or less"):
        views_of(Pictures(), batch_size=42, rank=0, world_size=3)
    with pytest.raises(UsageError, match="pictures has 1 image, too few to train on: a batch needs at least 2$"):
        views_of(Pictures(count=1))
    with pytest.raises(UsageError, match="pictures has 2 images, too few to train on: a batch needs at least 3$"):
        views_of(Pictures(count=2), batch_size=9, rank=0, world_size=3)
    with pytest.raises(UsageError, match="--batch-size 8 cannot be divided among 3 processes"):
        views_of(Pictures(), rank=0, world_size=3)


def test_one_batch_of_all():
    (batch,) = views_of(Pictures(), batch_size=COUNT).batches(0)
    assert sorted(batch.indices) == list(range(COUNT))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("equal", [True, False], ids=["resident", "streamed"])
def test_on_a_gpu_nothing_waits_for_it_and_the_views_are_those_of_the_cpu(equal):
    source, device = Pictures(200, equal), torch.device("cuda")
    on_cpu = list(views_of(source).batches(1))
    views = views_of(source, device=device)
    list(views.batches(0, 0, 2))  # the first batches allocate memory
    taken = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in views.batches(1):
            assert all(view.device.type == "cuda" for view in batch.views)
            assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
            taken.append([view.clone() for view in batch.views])  # on the caller's stream, as the training step
            busy = torch.randn(2048, 2048, device=device)
            for _ in range(20):
                busy = busy @ busy / 50
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(taken) == len(on_cpu)
    for ours, theirs in zip(taken, on_cpu, strict=True):
        for one, other in zip(ours, theirs.views, strict=True):
            assert torch.allclose(one.cpu(), other, atol=1e-3)
