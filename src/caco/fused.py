"""Whether the bank is read by kernels of its own: on an NVIDIA GPU (`bank_kernels/`) and, if it is large, on a CPU
(`cpu_kernels/bank.py`), where they do what is expected."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from caco.compiled_code import has_numba
from caco.own_kernels import suits_kernels, works
from caco.slots import Slots, along_sphere, inverse_lengths

WIDEST = 256
"""Width of the widest embedding that the kernels have room for."""
LEAST_SLOTS_ON_CPU = 2**14
"""Below, nothing is won on a CPU for what it takes to compile the kernels."""
LARGEST_GAP = 5e-6
"""By how much a cosine that was found may differ from the largest one, by rounding: tensor cores cut off what they add."""
LARGEST_DEVIATION, LARGEST_IN_FLOAT32 = 0.02, 1e-5
"""Largest relative deviation from plain products that rounding to bfloat16 explains, and to float32."""


def of_loss(weight: Tensor, products: torch.dtype) -> ModuleType | None:
    """Return `bank_kernels` if slots like these [K, D] are compared with queries by them, else None.

    products: what their factors may be rounded to.
    """
    return _of_bank(weight) if products == torch.bfloat16 else None


def of_parts(weight: Tensor, products: torch.dtype) -> ModuleType | None:
    """Return the kernels that give softmaxes over slots like these, and the slots' gradient, else None."""
    return _of_cpu(weight, products) if _is_on_cpu(weight) else of_loss(weight, products)


def of_search(weight: Tensor) -> ModuleType | None:
    """Return the kernels that find the nearest of slots like these, else None."""
    return _of_cpu(weight, torch.float32) if _is_on_cpu(weight) else _of_bank(weight)


def _is_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _of_cpu(weight: Tensor, products: torch.dtype) -> ModuleType | None:
    """Return the CPU's kernels: those that round factors only where the processor multiplies such the faster for it."""
    if len(weight) < LEAST_SLOTS_ON_CPU or not has_numba():
        return None
    rounded = _checked_on_cpu(is_rounded=True) if products == torch.bfloat16 else None
    return rounded or _checked_on_cpu(is_rounded=False)


@lru_cache
def _checked_on_cpu(is_rounded: bool) -> ModuleType | None:
    """Return these kernels if the processor is for them, they compile, and give here what plain products give."""

    def kernels() -> ModuleType | None:
        from caco.cpu_kernels import bank, bank_in_pairs, processor  # which need numba

        of_pairs = bank_in_pairs if processor.MULTIPLIES_PAIRS else None
        return of_pairs if is_rounded else bank

    def problem() -> str:
        chosen = kernels()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _problem_on_cpu(chosen, is_rounded) if chosen else ""

    products = " in bfloat16" if is_rounded else ""
    return kernels() if works(f"the bank's kernels for CPUs{products}", problem) else None


def _problem_on_cpu(
    kernels: ModuleType, is_rounded: bool, queries: int = 300, size: int = 1_010, width: int = 70
) -> str:
    """Return in what the CPU's kernels deviate from plain products, "" if in nothing."""
    generator = torch.Generator().manual_seed(0)
    query, weight, pull = (torch.randn(count, width, generator=generator) for count in (queries, size, queries))
    query, slots = F.normalize(query, dim=1), Slots(weight, inverse_lengths(weight))
    rows, scaled = slots.unit_rows(slice(None)), query / 0.1
    logits = scaled @ rows.T
    log_normaliser = logits.logsumexp(dim=1, keepdim=True)
    plain = logits.softmax(dim=1).T @ pull
    along_sphere(plain, rows, slots.inverse_length)
    largest, total, slot_sum = kernels.softmax(scaled, *slots)
    compared = [
        (largest + total.log(), log_normaliser),
        (slot_sum / total, logits.softmax(dim=1) @ rows),
        (kernels.pulls_on_slots(scaled, *slots, log_normaliser, pull), plain),
    ]
    if not is_rounded:  # as no search is
        largest, place = kernels.nearest(query, *slots)
        cosines = largest, (query @ rows.T).gather(1, place[:, None])[:, 0]
        compared += [(found / 0.1, logits.amax(dim=1)) for found in cosines]
    furthest = torch.stack([(ours - other).norm() / other.norm() for ours, other in compared]).amax().item()  # or NaN
    most = LARGEST_DEVIATION if is_rounded else LARGEST_IN_FLOAT32
    return "" if furthest < most else f"they deviate by {furthest:.2g} from plain products"


def _of_bank(weight: Tensor) -> ModuleType | None:
    suits = weight.dtype == torch.float32 and weight.shape[1] <= WIDEST and suits_kernels(weight.device)
    return _checked(weight.device, weight.shape[1]) if suits else None


@lru_cache
def _checked(device: torch.device, width: int) -> ModuleType | None:
    """Return the bank's kernels if they give here what plain products give; waits for the device."""

    def problem() -> str:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return _problem(device, width)

    if not works("the bank's kernels", problem):
        return None
    from caco import bank_kernels

    return bank_kernels


def _problem(device: torch.device, width: int, queries: int = 500, size: int = 32_100) -> str:
    """Return in what the bank's kernels deviate from plain products, "" if in nothing.

    At a size that is divided as a bank's is, and with remainders.
    """
    generator = torch.Generator().manual_seed(0)
    query, weight, pull = (
        torch.randn(count, width, generator=generator).to(device) for count in (queries, size, queries)
    )
    positives = torch.randint(len(weight), (len(query), 2), generator=generator).to(device)
    weights = torch.rand(len(query), 2, generator=generator).to(device)
    query, slots = F.normalize(query, dim=1), Slots(weight, inverse_lengths(weight))
    deviation = torch.stack(
        [
            (ours - plain).norm() / plain.norm()
            for ours, plain in _ours_and_plain(query, slots, positives, weights, pull)
        ]
    ).amax()
    gap = _gap_of_search(query, slots).item()
    furthest = deviation.item()
    if gap < LARGEST_GAP and furthest < LARGEST_DEVIATION:  # not so for NaN
        return ""
    return f"they deviate by {furthest:.2g} from plain products, and by {gap:.2g} in the search"


def _ours_and_plain(
    query: Tensor, slots: Slots, positives: Tensor, weights: Tensor, pull: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the kernels of the loss give, each with the same by plain products."""
    from caco import bank_kernels  # which needs Triton

    scaled, rows = query / 0.1, slots.unit_rows(slice(None))
    logits = scaled @ rows.T
    probability, log_normaliser = logits.softmax(dim=1), logits.logsumexp(dim=1, keepdim=True)
    mean_slot = probability @ rows

    largest, total, slot_sum = bank_kernels.softmax(scaled, *slots)
    yield largest + total.log(), log_normaliser
    yield slot_sum / total, mean_slot

    positives = torch.stack([logits.argmax(dim=1), positives[:, 1]], dim=1)  # a hit, and one that hardly is
    log_probability = (logits - log_normaliser).gather(1, positives)
    positive_slots = (weights[:, :, None] * rows[positives]).sum(dim=1)
    nearness = logits.gather(1, positives) / logits.amax(dim=1, keepdim=True)
    is_clear = (nearness == 1) | (nearness < 0.9)
    for slot_temperature in (0.1, 0.2):  # two kernels
        of_slots = logits * (0.1 / slot_temperature)
        own = bank_kernels.of_queries(query, *slots, positives, weights, 0.1, slot_temperature, LARGEST_DEVIATION)
        yield own.loss, -(weights * log_probability).sum(dim=1)
        yield own.gradient, (weights.sum(dim=1, keepdim=True) * mean_slot - positive_slots) / 0.1
        yield own.probability, log_probability.exp()
        yield own.log_normaliser, of_slots.logsumexp(dim=1, keepdim=True)
        yield own.slot_probability, of_slots.softmax(dim=1).gather(1, positives)
        yield (own.hit & is_clear).float(), (nearness == 1).float()

    gradient = bank_kernels.pulls_on_slots(scaled, *slots, log_normaliser, pull)
    plain = probability.T @ pull
    along_sphere(plain, rows, slots.inverse_length)
    yield gradient.clone(), plain
    bank_kernels.cooperate(gradient, *slots, positives, weights, pull)
    changes = (weights[:, :, None] * pull[:, None]).flatten(0, 1)
    along_sphere(changes, rows[positives.flatten()], slots.inverse_length[positives.flatten()])
    yield gradient, plain.index_add(0, positives.flatten(), changes)


def _gap_of_search(query: Tensor, slots: Slots) -> Tensor:
    """Return by how much the largest cosine exceeds that of the slot that the kernel finds, or differs from what it says."""
    from caco import bank_kernels

    cosines = query.double() @ slots.unit_rows(slice(None)).double().T
    found, place = bank_kernels.nearest(query, *slots)
    gaps = cosines.amax(dim=1) - torch.stack([cosines.gather(1, place[:, None])[:, 0], found.double()])
    return gaps.abs().amax()
