"""The kernels of the bank on a GPU, by how they divide their work, against plain torch: where their sizes are from.

    python benchmarks/bank_kernels.py [--quick] [--only search] [--out FILE.json]

65,536 slots; of width 128 with 2 x 512 queries, of width 256 with 2 x 1,024. Times include what follows in plain torch, such as
joining the parts. A GPU that Python keeps waiting measures Python: all launches of a call are one CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from measure import arguments, describe, save, table, take_turns
from torch.nn import functional as F

from caco.device import choose_device
from caco.slots import compare, pulls_on_slots

BLOCKS: dict[int, dict[str, list[tuple[int, int, int, int]]]] = {
    128: {
        "search, rough": [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        "search, exact": [(64, 32, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2)],
        "search, all slots alike": [(64, 32, 4, 2), (64, 64, 4, 2)],
        "softmax": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
        "pulls": [(64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 64, 4, 3)],
    },
    256: {
        "search, rough": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
        "search, exact": [(64, 32, 4, 1), (64, 32, 4, 2), (16, 64, 4, 1)],
        "search, all slots alike": [(64, 32, 4, 1)],
        "softmax": [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 3)],
        "pulls": [(64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 3)],
    },
}
"""Queries and slots in a block, warps, loads ahead. All slots alike: then rough cosines leave none out."""


def graph(work: Callable[[], object]) -> Callable[[], None]:
    """Return ten calls as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(10):
            work()
    return captured.replay


def contestants(width: int, device: torch.device, slots: int, only: str) -> dict[str, dict[str, Callable[[], object]]]:
    """Return for each kernel what it does in plain torch, and each way to divide its work."""
    from caco.bank_kernels import pulls, search, softmaxes

    torch.manual_seed(0)
    batch = 4 * width
    weight = torch.randn(slots, width, device=device)
    inverse_length = weight.norm(dim=1, keepdim=True).reciprocal()
    keys = F.normalize(torch.randn(2 * batch, width, device=device), dim=1)
    queries, few = keys / 0.08, keys[:batch] / 0.08
    log_normaliser = (queries @ (weight * inverse_length).T).logsumexp(dim=1, keepdim=True)
    drawn, bf16 = torch.randn_like(keys), torch.bfloat16

    def plain_softmax() -> None:
        logits = compare(few, weight * inverse_length, bf16)
        exponentials = (logits - logits.amax(dim=1, keepdim=True)).exp_()
        torch.mm(exponentials.to(bf16), weight.to(bf16), out_dtype=torch.float32)

    narrow = keys[:1] + 1e-4 * weight
    narrow_inverse_length = narrow.norm(dim=1, keepdim=True).reciprocal()

    def plain_search() -> object:
        return (keys @ (weight * inverse_length).T).max(dim=1)

    def own_search() -> object:
        return search.nearest(keys, weight, inverse_length)

    def search_alike() -> object:
        return search.nearest(keys, narrow, narrow_inverse_length)

    works: dict[str, tuple[tuple[ModuleType, str], Callable[[], object], Callable[[], object]]] = {
        "search, rough": ((search, "ROUGH"), plain_search, own_search),
        "search, exact": ((search, "EXACT"), plain_search, own_search),
        "search, all slots alike": ((search, "EXACT"), plain_search, search_alike),
        "softmax": ((softmaxes, "BLOCKS"), plain_softmax, lambda: softmaxes.softmax(few, weight, inverse_length)),
        "pulls": (
            (pulls, "BLOCKS"),
            lambda: pulls_on_slots(queries, weight * inverse_length, log_normaliser, drawn, bf16),
            lambda: pulls.pulls_on_slots(queries, weight, inverse_length, log_normaliser, drawn),
        ),
    }
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for name, choices in BLOCKS[width].items():
        if not name.startswith(only):
            continue
        (module, blocks_of_kernel), plain, ours = works[name]
        found[name] = {"plain torch": graph(plain)}
        usual = getattr(module, blocks_of_kernel)
        for blocks in choices:
            setattr(module, blocks_of_kernel, {width: (blocks,)})
            try:
                found[name][str(blocks)] = graph(ours)
            except Exception as error:  # too large for this GPU
                print(f"{name} {blocks}: {type(error).__name__}")
        setattr(module, blocks_of_kernel, usual)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    options = parser.parse_args()
    if options.device == "cpu":
        sys.exit("bank_kernels.py: the kernels are for a GPU, and there is none here")
    device = choose_device(options.device)
    print(describe(device))
    results: dict[str, Any] = {}
    rows = []
    for width in BLOCKS:
        for name, works in contestants(width, device, 65_536, options.only).items():
            turns = take_turns(works, 3 if options.quick else 20, device=device)
            for blocks, seconds in turns.items():
                results[f"{name} {width} {blocks}"] = seconds.median / 10
                rows.append((f"{name}, width {width}: {blocks}", f"{100 * seconds.median:.3f}"))
            save(options, {"results": results})
    print(table(("kernel and blocks", "ms"), rows))


if __name__ == "__main__":
    main()
