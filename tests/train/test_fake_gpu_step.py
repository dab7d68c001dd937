"""The parts of a step on a made-up GPU: tensors without content that say they are CUDA's, and obey its rules.

A tensor of the CPU among them, or a value read by the host, is an error, as it is (or a wait) on a real one. Autograd's
engine has no made-up GPU, so the two gradients that are written out are called by hand.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import caco.loss
from caco import fused, optim
from caco.backbone import create_backbone
from caco.config import EncoderOptions, Pretrain, Views
from caco.data import parameters
from caco.data.render import Stages, make_views
from caco.distributed.world import World
from caco.evaluate.linear import train_heads
from caco.loss import _CooperativeAdversarial
from caco.model import CaCo, WarmStart, step_output
from caco.optim import encoder_optimizer
from caco.slots import LogSumExp, Unsharded
from caco.train.meters import Meters
from caco.train.prepare import create_state


def can_be_indexed() -> bool:
    """Return whether a made-up CUDA tensor can be indexed here: torch 2.8 asks the driver, which may not be there."""
    try:
        with FakeTensorMode():
            torch.zeros(2, 2, device="cuda")[:, 0]
    except Exception:
        return False
    return True


pytestmark = pytest.mark.skipif(not can_be_indexed(), reason="this torch wants a GPU to index made-up tensors")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = Pretrain(
    batch_size=16,
    bank_size=4096,
    views=Views(size=32, small=2, small_size=16),
    encoder=EncoderOptions(embedding=32, projector=64),
)


class Saved:
    """What autograd hands from forward to backward."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


@pytest.fixture
def gpu():
    """Within: every new tensor is made up, and belongs to the GPU if it is asked to."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield FakeTensorMode()
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def on_gpu(gpu: FakeTensorMode) -> CaCo:
    model = create_state(CONFIG, create_backbone("resnet10_narrow", 32), World(CPU)).model

    def move(tensor):
        made_up = gpu.from_tensor(tensor.detach())
        with gpu:
            return made_up.to(GPU)

    return model._apply(move).train()


def random_views():
    return [torch.randn(16, 3, size, size, device=GPU) for size in (32, 32, 16, 16)]


def test_made_up_tensors_obey_the_rules(gpu):
    with gpu:
        loss = torch.ones((), device=GPU)
        with pytest.raises(Exception, match=r"(?i)data.dependent|_local_scalar_dense|item"):
            loss.item()
        with pytest.raises(Exception, match="(?i)device"):
            torch.ones(2, device=GPU) + torch.ones(2)


def test_forward_passes_and_meters(gpu):
    model = on_gpu(gpu)
    with gpu, torch.no_grad():
        meters = Meters(CONFIG.bank_size, GPU)
        views = random_views()
        positives, outputs = model.find_positives(views), []
        for view_index, view in enumerate(views):
            earlier = [output.pull for output in outputs] if view_index == 3 else None
            outputs.append(model(view, view_index, positives, earlier_pulls=earlier))
        output = step_output(outputs, [positives.indices])
        loss, keys = WarmStart(model)(random_views()[:2])
        model.bank.fill(keys, batch=1)
        meters.add(output, 1)
        meters.note_loss(loss, 2)
        assert {output.loss.device, loss.device, meters.sums.device} == {GPU}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Triton's kernels have no made-up form, and are compared with plain torch before they are used."""
    monkeypatch.setattr(fused, "suits_kernels", lambda device: False)
    monkeypatch.setattr(optim, "_has_kernels", lambda device: False)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot_temperature", [0.08, 0.1])
def test_gradients_of_the_bank(gpu, products, slot_temperature, monkeypatch):
    monkeypatch.setattr(
        caco.loss, "_dtype_of_products", lambda slots: products
    )  # autocast refuses to be on without a GPU
    bank = on_gpu(gpu).bank
    bank.slot_temperature = slot_temperature
    with gpu, torch.no_grad():
        queries, slots, saved = torch.randn(64, 32, device=GPU), bank.slots(), Saved()
        positives, weights = torch.zeros(64, 2, device=GPU, dtype=torch.int64), torch.rand(64, 2, device=GPU)
        result = bank.loss(queries, slots, positives, weights)
        zero = _CooperativeAdversarial.forward(saved, *slots, result.pull, slot_temperature, products, Unsharded())
        of_slots, *_ = _CooperativeAdversarial.backward(saved, torch.ones_like(zero))
        assert result.loss.device == GPU and result.loss.dtype == torch.float32
        assert of_slots.shape == (4096, 32) and of_slots.dtype == torch.float32
        LogSumExp.forward(saved, queries, slots, 0.2, Unsharded())
        assert LogSumExp.backward(saved, torch.ones(64, device=GPU))[0].device == GPU


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_optimizers_and_key_encoder(gpu, name):
    model = on_gpu(gpu)
    with gpu:
        optimizer = encoder_optimizer(name, model.encoder, 0.1, 0.9, 1e-4)
        of_bank = torch.optim.SGD([model.bank.weight], lr=3.0, momentum=0.9)
        for parameter in (*model.encoder.parameters(), model.bank.weight):
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):  # the first step makes buffers
            optimizer.step()
            of_bank.step()
            model.update_key_encoder(0.99)


def test_linear_heads(gpu):
    """Nothing in the loop waits; the last batch is smaller."""
    with gpu:
        features, labels = torch.randn(50, 8, device=GPU), torch.zeros(50, dtype=torch.int64, device=GPU)
        weights, biases = train_heads(features, labels, 3, (0.1, 0.01), 2, 16, 0.9, 0)
        assert weights.shape == (2, 3, 8) and biases.device == GPU


def test_views(gpu):
    with gpu:
        images = torch.zeros(16, 40, 48, 3, dtype=torch.uint8, device=GPU)
        rows, statistics = torch.rand(16, parameters.COLUMNS, device=GPU), torch.rand(2, 3, 1, 1, device=GPU)
        for augmentation in CONFIG.views.augmentations():
            view = make_views(images, rows, statistics, augmentation.size, Stages.of_augmentation(augmentation))
            assert view.shape == (16, 3, augmentation.size, augmentation.size)
            assert view.device == GPU and view.is_contiguous(memory_format=torch.channels_last)


def test_sums_on_an_apple_gpu_which_has_no_float64():
    with FakeTensorMode():
        assert Meters(16, torch.device("mps")).sums.dtype == torch.float32
        assert Meters(16, GPU).sums.dtype == torch.float64
