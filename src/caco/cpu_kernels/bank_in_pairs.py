"""`bank.py` with products of factors rounded to bfloat16, two at a time: for CPUs that have an instruction for them."""

from __future__ import annotations

from functools import partial

from caco.cpu_kernels import bank
from caco.cpu_kernels.bank import cooperate, rounded_rows

__all__ = ["cooperate", "pulls_on_slots", "rounded_rows", "softmax"]

softmax, pulls_on_slots = partial(bank.softmax, in_pairs=True), partial(bank.pulls_on_slots, in_pairs=True)
