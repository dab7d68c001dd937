"""Print how far the code deviates from the reference's inputs and outputs in tests/golden (float64).

    .venv/bin/python docs/measure_goldens.py

The deviation of an array is its largest absolute difference over the reference's largest absolute value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco.bank import Bank
from caco.evaluate.knn import Voting, knn_guesses
from caco.model import CaCo, Positives, ViewOutput, step_output, view_pairs
from caco.optim import LARS, LayerWiseSGD
from caco.schedule import bank_lr, encoder_lr, key_momentum

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
OPTIONS = ("lr", "weight_decay", "momentum", "trust_coefficient")


def deviations() -> dict[str, float]:
    """Return each file's largest relative deviation; of the kNN file: the share of places in the rankings that differ."""
    found = {path.stem: step(read(path.stem)) for path in sorted(GOLDEN.glob("*_step*.npz"))}
    return {**found, "lars": lars(), "linear_probe_lars": probe(), "schedules": schedules(), "knn": knn()}


def read(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def deviation(ours: Tensor | list[float], reference: Tensor) -> float:
    return float((torch.as_tensor(ours).detach() - reference).abs().max() / reference.abs().max())


def step(given: dict[str, Tensor]) -> float:
    """One step of the method: loss (single crop), gradients of the queries, new bank, new velocity."""
    single = "query1" in given
    queries = torch.stack([given["query1"], given["query2"]]) if single else given["queries"]
    keys = torch.stack([given["key1"], given["key2"]]) if single else given["keys"]
    gradients = torch.stack([given["grad_query1"], given["grad_query2"]]) if single else given["grad_queries"]
    size, width = given["bank"].shape
    bank = Bank(size, width, float(given["temperature"]), float(given["bank_temperature"])).double()
    bank.weight.data.copy_(given["bank"])
    optimizer = torch.optim.SGD([bank.weight], lr=float(given["bank_lr"]), momentum=float(given["bank_momentum"]))
    optimizer.state[bank.weight]["momentum_buffer"] = given["bank_velocity"].clone()
    model = CaCo(nn.Identity(), bank, view_pairs(2, len(queries) - 2))
    queries.requires_grad_()
    slots = bank.slots()
    positives = bank.nearest(F.normalize(keys.flatten(0, 1), dim=1), slots).view(2, -1)
    outputs: list[ViewOutput] = []
    for view_index, query in enumerate(queries):
        earlier = [output.pull for output in outputs] if view_index == len(queries) - 1 else None
        outputs.append(model(query, view_index, Positives(slots, positives), earlier_pulls=earlier))
        outputs[-1].loss.backward()  # type: ignore[no-untyped-call]
    loss = step_output(outputs, [positives]).loss
    optimizer.step()
    assert queries.grad is not None
    velocity = optimizer.state[bank.weight]["momentum_buffer"]
    return max(
        deviation(queries.grad, gradients),
        deviation(bank.weight, given["new_bank"]),
        deviation(velocity, given["new_bank_velocity"]),
        deviation(loss, given["loss"]) if single else 0.0,
    )


def lars() -> float:
    """Four steps of the encoder's optimizer on tensors of several shapes."""
    given = read("lars")
    parameters = [nn.Parameter(given[f"param{number}"].clone()) for number in range(4)]
    optimizer, worst = LARS(parameters, **{name: float(given[name]) for name in OPTIONS}), 0.0
    for count in range(4):
        for number, parameter in enumerate(parameters):
            parameter.grad = given[f"grad{number}_step{count}"].clone()
        optimizer.step()
        after = [given[f"param{number}_after{count}"] for number in range(4)]
        worst = max([worst, *map(deviation, parameters, after)])
    return worst


def probe() -> float:
    """Four steps of the linear probe's optimizer."""
    given = read("linear_probe_lars")
    head = {name: nn.Parameter(given[name].clone()) for name in ("weight", "bias")}
    optimizer, worst = LayerWiseSGD(head.values(), **{name: float(given[name]) for name in OPTIONS}), 0.0
    for count in range(4):
        for name, parameter in head.items():
            parameter.grad = given[f"grad_{name}_step{count}"].clone()
        optimizer.step()
        worst = max([worst, *(deviation(head[name], given[f"{name}_after{count}"]) for name in head)])
    return worst


def schedules() -> float:
    """All schedules, 200 epochs."""
    given, epochs = read("schedules"), range(200)
    ours = {
        "encoder_lr": [encoder_lr(epoch, 200, 10, 0.3, 0.003, 1024) for epoch in epochs],
        "key_momentum": [key_momentum(epoch, 200, 0.99, cosine=True) for epoch in epochs],
        "bank_lr_constant": [bank_lr(epoch, 200, 10, 3.0, 3.0, 65536) for epoch in epochs],
        "bank_lr_cosine": [bank_lr(epoch, 200, 10, 3.0, 0.03, 65536) for epoch in epochs],
    }
    return max(deviation(torch.tensor(ours[name], dtype=torch.float64), given[name]) for name in given)


def knn() -> float:
    """The five classes with the most votes, in their order, for 20 and 200 neighbours."""
    given, counts = read("knn"), (20, 200)
    guesses = knn_guesses(given["reference"], given["labels"], given["queries"], 7, Voting(counts))
    different = [ours != given[f"ranking_k{count}"][:, :5] for ours, count in zip(guesses, counts, strict=True)]
    return float(torch.stack(different).double().mean())


if __name__ == "__main__":
    for file, value in deviations().items():
        print(f"{file:36} {value:.1e}")
