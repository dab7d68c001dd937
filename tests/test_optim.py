"""The layer-wise optimizers against the reference, and what is decayed."""

import pytest
import torch
from conftest import relative_error
from torch import nn

from caco.optim import LARS, LayerWiseSGD, encoder_optimizer, set_lr


def test_lars_reproduces_the_reference(golden):
    given = golden("lars")
    parameters = [nn.Parameter(given[f"param{i}"].clone()) for i in range(4)]
    options = {name: float(given[name]) for name in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LARS(parameters, **options)
    for step in range(4):
        for i, parameter in enumerate(parameters):
            parameter.grad = given[f"grad{i}_step{step}"].clone()
        optimizer.step()
        for i, parameter in enumerate(parameters):
            assert relative_error(parameter, given[f"param{i}_after{step}"]) < 1e-9


def test_lars_leaves_parameters_without_gradient_alone():
    parameter = nn.Parameter(torch.ones(2, 2))
    LARS([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(2, 2))


def test_layer_wise_sgd_reproduces_the_reference(golden):
    values = golden("linear_probe_lars")
    weight, bias = nn.Parameter(values["weight"].clone()), nn.Parameter(values["bias"].clone())
    settings = {name: values[name].item() for name in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LayerWiseSGD([weight, bias], **settings)
    for step in range(4):
        weight.grad, bias.grad = values[f"grad_weight_step{step}"].clone(), values[f"grad_bias_step{step}"].clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), values[f"weight_after{step}"], rtol=1e-12, atol=0)
        torch.testing.assert_close(bias.detach(), values[f"bias_after{step}"], rtol=1e-12, atol=0)


def test_layer_wise_sgd_moves_a_bias_of_zero():
    zero, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zero.grad, still.grad = torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3)
    LayerWiseSGD([zero, still], lr=0.5, weight_decay=0.1).step()
    assert zero.tolist() == [-0.5, 1.0, 0.0]
    assert still.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_are_not_decayed(name):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = encoder_optimizer(name, module, lr=0.1, momentum=0.9, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in module.parameters()] == [0.05, 0, 0, 0]
    set_lr(optimizer, 0.3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="lars, sgd or adamw"):
        encoder_optimizer("adam", nn.Linear(1, 1), 0.1, 0.9, 0.0)
