"""CaCo's step against the reference, and the towers."""

import pytest
import torch
from conftest import relative_error
from dense_bank import dense_loss, dense_nearest
from torch import nn
from torch.nn import functional as F

from caco.backbone import Encoder, create_backbone, projector
from caco.bank import Bank
from caco.loss import cooperative_adversarial_loss
from caco.model import CaCo, Positives, ViewPair, WarmStart, step_output, view_pairs
from caco.train.step import compute_gradients

TOLERANCE = 1e-9  # relative, float64: what "implements CaCo" means here; reached: 1e-15


@pytest.mark.parametrize(
    "name",
    ["single_crop_step", "single_crop_step_two_temperatures", "multi_crop_step", "multi_crop_step_two_temperatures"],
)
def test_step_reproduces_the_reference(golden, name):
    given = golden(name)
    if "queries" in given:
        queries, keys, grad_queries = given["queries"], given["keys"], given["grad_queries"]
    else:
        queries = torch.stack([given["query1"], given["query2"]])
        keys = torch.stack([given["key1"], given["key2"]])
        grad_queries = torch.stack([given["grad_query1"], given["grad_query2"]])
    bank = Bank(*given["bank"].shape, float(given["temperature"]), float(given["bank_temperature"])).double()
    bank.weight.data.copy_(given["bank"])
    optimizer = torch.optim.SGD([bank.weight], lr=float(given["bank_lr"]), momentum=float(given["bank_momentum"]))
    optimizer.state[bank.weight]["momentum_buffer"] = given["bank_velocity"].clone()
    model = CaCo(nn.Identity(), bank, view_pairs(2, len(queries) - 2))

    queries.requires_grad_()
    slots = bank.slots()
    positives = bank.nearest(F.normalize(keys.flatten(0, 1), dim=1), slots).view(2, -1)
    outputs = []
    for view_index, query in enumerate(queries):
        earlier = [output.pull for output in outputs] if view_index == len(queries) - 1 else None
        outputs.append(model(query, view_index, Positives(slots, positives), earlier_pulls=earlier))
        outputs[-1].loss.backward()
    output = step_output(outputs, [positives])
    optimizer.step()

    assert relative_error(queries.grad, grad_queries) < TOLERANCE
    assert relative_error(bank.weight, given["new_bank"]) < TOLERANCE
    assert relative_error(optimizer.state[bank.weight]["momentum_buffer"], given["new_bank_velocity"]) < TOLERANCE
    if "loss" in given:
        assert output.loss.item() == pytest.approx(float(given["loss"]), rel=TOLERANCE)
    # The reference logs the probability of one pair: view 1 with key 2 at the bank's temperature; in its multi crop with
    # key 1 (a pair its loss leaves out) at the encoder's.
    key, at = (1, "bank_temperature") if "query1" in given else (0, "temperature")
    start, query = F.normalize(given["bank"], dim=1), F.normalize(queries[0].detach(), dim=1)
    weights = torch.ones(len(query), 1, dtype=torch.float64)
    chosen = positives[key][:, None]
    logged = cooperative_adversarial_loss(query, start, chosen, weights, float(given[at]), float(given[at]))
    assert logged.positive_probability.mean().item() == pytest.approx(
        float(given["positive_probability"]), rel=TOLERANCE
    )


def test_view_pairs_weigh_as_published():
    assert view_pairs(2, 0) == (ViewPair(0, 1, 1.0), ViewPair(1, 0, 1.0))
    multi = view_pairs(2, 6)
    assert len(multi) == 14 and {(p.query, p.key) for p in multi} == {
        (i, j) for i in range(8) for j in range(2) if i != j
    }
    assert [p.weight for p in multi] == [1 / 2] * 2 + [1 / 12] * 12
    assert view_pairs(3, 1) == view_pairs(2, 2)
    with pytest.raises(ValueError, match="2 large views"):
        view_pairs(1, 4)


def small_model(pairs=None, slots=12):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    return CaCo(Encoder(backbone, projector(10, 16, 6)), Bank(slots, 6), pairs or view_pairs(2, 0)).double()


def gradients_of(model, views):
    return compute_gradients(model, model, views, torch.float32)


def views_of(count, batch=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(count)]


def test_view_after_view_equals_all_pairs_at_once():
    """The gradients of one view after another are those of the sum of one plain loss for each pair, in one backward."""
    model, views = small_model(view_pairs(2, 3)), views_of(5)
    output = gradients_of(model, views)
    fused = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model = small_model(view_pairs(2, 3))
    queries = [F.normalize(model.encoder(view), dim=1) for view in views]
    keys = [F.normalize(model.key_encoder(view), dim=1).detach() for view in views[:2]]
    total, slots = 0.0, model.bank.weight
    for query, key, weight in model.pairs:
        positives = dense_nearest(keys[key], slots)[:, None]
        weights = torch.full_like(positives, weight / 8, dtype=torch.float64)
        total = total + dense_loss(queries[query], slots, positives, weights, 0.08, 0.08)
    total.backward()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert set(fused) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in fused:
            torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_views_activations_at_a_time():
    """Ten views hold no more activations than two: each goes forward and backward before the next."""

    def most_kept(views: int) -> int:
        kept = most = 0

        class Kept:
            def __init__(self, tensor):
                nonlocal kept, most
                self.tensor = tensor
                kept += tensor.nbytes
                most = max(most, kept)

            def __del__(self):
                nonlocal kept
                kept -= self.tensor.nbytes

        encoder = Encoder(create_backbone("resnet10_narrow", 32), projector(128, 16, 6))
        model = CaCo(encoder, Bank(12, 6), view_pairs(2, views - 2)).train()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda held: held.tensor):
            gradients_of(model, [torch.randn(8, 3, 32, 32) for _ in range(views)])
        return most

    assert most_kept(10) < 1.01 * most_kept(2)


def test_measurements_are_of_the_large_pairs():
    model, views = small_model(view_pairs(2, 2)), views_of(4)
    output = gradients_of(model, views)
    fresh = small_model(view_pairs(2, 2))
    slots = F.normalize(fresh.bank.weight, dim=1)
    queries = [F.normalize(fresh.encoder(view), dim=1) for view in views]
    probabilities, hits = [], []
    for query, key in ((0, 1), (1, 0)):
        probability = torch.softmax(queries[query] @ slots.T / 0.08, dim=1)
        chosen = output.positives[key]
        probabilities.append(probability.gather(1, chosen[:, None]).mean())
        hits.append((probability.argmax(dim=1) == chosen).double().mean())
    assert output.positive_probability.item() == pytest.approx(torch.stack(probabilities).mean().item(), rel=1e-9)
    assert output.hit_rate.item() == pytest.approx(torch.stack(hits).mean().item())
    assert 0 < output.feature_spread.item() < 1


def test_feature_spread_is_zero_for_a_collapsed_encoder():
    model = CaCo(nn.Identity(), Bank(12, 6), view_pairs(2, 0)).double()
    output = gradients_of(model, [torch.ones(8, 6, dtype=torch.float64, requires_grad=True)] * 2)
    assert output.feature_spread.item() == pytest.approx(0, abs=1e-7)


def test_key_encoder_gets_no_gradient_and_keeps_its_own_statistics():
    model, views = small_model(), views_of(2)
    before = model.key_encoder.backbone[2].running_mean.clone()
    gradients_of(model, views)
    assert all(p.grad is None for p in model.key_encoder.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert not torch.equal(model.key_encoder.backbone[2].running_mean, before)
    statistics = model.key_encoder.backbone[2].running_mean.clone()
    model.update_key_encoder(0.5)
    assert torch.equal(model.key_encoder.backbone[2].running_mean, statistics)


def test_momentum_update_is_the_formula():
    model = small_model()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = [p.clone() for p in model.key_encoder.parameters()]
    model.update_key_encoder(0.99)
    for old, new, source in zip(before, model.key_encoder.parameters(), model.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.99 * old + 0.01 * source.detach())
    model.copy_to_key_encoder()
    assert all(
        torch.equal(a, b) for a, b in zip(model.key_encoder.parameters(), model.encoder.parameters(), strict=True)
    )


def test_warm_start_is_ordinary_contrast():
    model, views = small_model(), views_of(2)
    loss, keys = WarmStart(model)(views)
    loss.backward()
    fresh = small_model()
    query = F.normalize(fresh.encoder(views[0]), dim=1)
    key = F.normalize(fresh.key_encoder(views[1]), dim=1)
    rows = []
    for n in range(8):
        logits = torch.cat([(query[n] @ key[n]).view(1), F.normalize(fresh.bank.weight, dim=1) @ query[n]]) / 0.2
        rows.append(-torch.log_softmax(logits, dim=0)[0])
    assert loss.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-10)
    torch.testing.assert_close(keys, key)
    assert model.bank.weight.grad is None


def test_the_method_imports_no_other_part():
    """fused.py, the kernels, slots.py, loss.py, bank.py and model.py know nothing of files, processes or options."""
    import ast
    import pathlib

    import caco

    packages = {"bank_kernels", "cpu_kernels"}
    method = packages | {"own_kernels", "fused", "reading", "slots", "loss", "bank", "model"}
    source = pathlib.Path(caco.__file__).parent
    files = [source / f"{module}.py" for module in method - packages]
    for file in [*files, *(file for package in packages for file in (source / package).glob("*.py"))]:
        tree = ast.parse(file.read_text())
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{name.name}" for name in node.names}
        imported_of_caco = {name.split(".")[1] for name in imported if name.startswith("caco.")}
        assert imported_of_caco <= method | {"compiled_code"}  # which itself knows nothing of the package
