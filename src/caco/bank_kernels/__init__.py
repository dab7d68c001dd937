"""The bank on an NVIDIA GPU: kernels that read all slots and write no matrix of queries and slots; the rest of the loss.

Written in Triton, which torch brings along on Linux. A program takes a block of queries and a part of the slots (or the
other way round), and what it needs of their product stays on the chip. `slots.py`, `reading.py` and `loss.py` have the same
in plain torch, which is the oracle of the tests and what other devices compute: some sixty small kernels beside the products,
which took a GPU as long as these. All tensors are contiguous and on one device.
"""

from caco.bank_kernels.pulls import cooperate, pulls_on_slots
from caco.bank_kernels.queries import of_queries
from caco.bank_kernels.search import nearest
from caco.bank_kernels.softmaxes import logits, softmax

__all__ = ["cooperate", "logits", "nearest", "of_queries", "pulls_on_slots", "softmax"]
