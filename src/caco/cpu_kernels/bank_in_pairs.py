"""`bank.py` with products of factors rounded to bfloat16, two at a time: for CPUs that have an instruction for them."""

from __future__ import annotations

from functools import partial

from caco.cpu_kernels import bank
from caco.cpu_kernels.bank import cooperate

__all__ = ["cooperate", "logits", "pulls_on_slots", "softmax"]

logits, softmax, pulls_on_slots = (
    partial(function, in_pairs=True) for function in (bank.logits, bank.softmax, bank.pulls_on_slots)
)
