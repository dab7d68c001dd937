"""How the encoder is computed: measured choices, and that they do not change the mathematics."""

import copy
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from caco.backbone import create_backbone
from caco.config import EngineOptions, Pretrain, Views
from caco.errors import UsageError
from caco.train import engine, trials
from caco.train.engine import can_compile, candidates, choose_engine, fastest
from caco.train.trials import Trial, compile_module, seconds, try_compiling
from caco.winograd.network import can_use_winograd

CPU = torch.device("cpu")
CONFIG = Pretrain(data="textures", views=Views(size=32))
DIRECT = replace(CONFIG, engine=EngineOptions(convolution="direct"))
WINOGRAD = Trial("fp32", "channels_last", "winograd")
needs_numba = pytest.mark.skipif(not can_use_winograd(), reason="numba is not installed")


class Wide(nn.Sequential):
    """A convolution that suits Winograd's filtering, on views of 32 px."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 3, stride=4), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


def test_a_short_run_takes_the_defaults_and_touches_nothing():
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", 32)
    before, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    config, why = choose_engine(CONFIG, backbone, CPU, passes=4, batch=8)
    assert (config.precision, config.engine.layout, config.engine.compile) == ("fp32", "channels_last", "off")
    assert "fp32" in why
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@needs_numba
def test_a_long_run_takes_what_was_fastest_here(monkeypatch):
    measured = []

    def measure(*arguments):
        measured.extend(engine_measure(*arguments))
        return measured

    engine_measure = trials.measure
    monkeypatch.setattr(engine, "measure", measure)
    config = replace(CONFIG, engine=EngineOptions(compile="off"))
    said: list[str] = []
    backbone = Wide()
    chosen, why = choose_engine(config, backbone, CPU, passes=10**9, batch=8, say=said.append)
    assert len(said) == 1 and re.match(r"a long run, about [\d,]+ hours on this machine: 6 ways", said[0])
    choices = candidates(config, CPU)
    assert Trial(chosen.precision, chosen.engine.layout, chosen.engine.convolution) == fastest(choices, measured)
    for trial, taken in zip(choices, measured, strict=True):
        assert f"{trial} {8 / taken:,.0f}" in why
    assert f"; taken: {fastest(choices, measured)}" in why
    again, why = choose_engine(chosen, nn.Identity(), CPU, passes=10**9, batch=8)
    assert again == chosen and why == ""  # a resumed run measures nothing


def test_a_choice_that_is_hopeless_is_not_tried_to_the_end(monkeypatch):
    tried = []

    def seconds(backbone, trial, *rest, **options):
        tried.append(trial.precision)
        return {"fp32": 1.0, "bf16": 9.0}[trial.precision]

    monkeypatch.setattr(trials, "seconds", seconds)
    times = trials.measure(nn.Identity(), candidates(DIRECT, CPU), CPU, 32, 8)
    assert times == [1.0, 1.0, 9.0, 9.0]
    assert tried.count("fp32") == 2 * (1 + trials.ROUNDS) and tried.count("bf16") == 2


def test_a_slow_first_pass_does_not_make_a_run_long():
    """The first pass of a process makes kernels: twenty times a usual one, and more on a busy machine."""

    class SlowAtFirst(nn.Module):
        passes = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, 4)

        def forward(self, view):
            SlowAtFirst.passes += 1
            if SlowAtFirst.passes == 1:
                time.sleep(1.0)
            return self.layer(view.flatten(1))

    config = replace(CONFIG, views=Views(size=8))
    _, why = choose_engine(config, SlowAtFirst(), CPU, passes=1000, batch=8)  # 1,000 s at the speed of the first
    assert SlowAtFirst.passes == 2 and why == "fp32 channels_last"


def test_what_the_user_says_is_not_measured():
    asked = replace(CONFIG, precision="bf16", engine=EngineOptions(layout="contiguous", convolution="direct"))
    assert candidates(asked, CPU) == [Trial("bf16", "contiguous")]
    chosen, _ = choose_engine(asked, create_backbone("test_resnet", 32), CPU, passes=4, batch=8)
    assert (chosen.precision, chosen.engine.layout) == ("bf16", "contiguous")


def test_the_less_usual_choice_must_be_worth_it():
    choices = candidates(DIRECT, CPU)
    assert choices[0] == Trial("fp32", "channels_last")
    assert fastest(choices, [1.0, 0.99, 0.9, 0.9]) == Trial("fp32", "channels_last")
    assert fastest(choices, [1.0, 0.8, 0.9, 0.9]) == Trial("fp32", "contiguous")
    assert fastest(choices, [1.0, 1.0, 0.4, 0.45]) == Trial("bf16", "channels_last")
    choices = candidates(CONFIG, CPU)
    assert fastest(choices, [1.0, 1.0, 1.0, 1.0, 0.95, 0.65]) == Trial("fp32", "channels_last")
    assert fastest(choices, [1.0, 1.0, 0.6, 1.0, 0.7, 0.5]) == WINOGRAD
    assert fastest(choices, [1.0, 1.0, 0.6, 1.0, 0.7, 0.4]) == replace(WINOGRAD, precision="bf16")
    either = [WINOGRAD, replace(WINOGRAD, precision="bf16")]
    assert candidates(replace(CONFIG, engine=EngineOptions(convolution="winograd")), CPU) == either
    assert fastest(either, [1.0, 0.7]) == WINOGRAD and fastest(either, [1.0, 0.6]) == either[1]
    choices = candidates(replace(CONFIG, precision="bf16", engine=EngineOptions(layout="channels_last")), CPU)
    assert fastest(choices, [1.0, 0.95]) == Trial("bf16", "channels_last")
    assert fastest(choices, [1.0, 0.85]) == replace(WINOGRAD, precision="bf16")


@needs_numba
def test_winograd_is_tried_only_where_it_can_be_had(monkeypatch):
    tried: list[list[Trial]] = []

    def measure(backbone, choices, *rest):
        tried.append(list(choices))
        return [float(number + 1) for number in range(len(choices))]

    monkeypatch.setattr(engine, "measure", measure)
    monkeypatch.setattr(engine, "can_compile", lambda device: True)
    monkeypatch.setattr(engine, "try_compiling", lambda *rest: (False, ""))

    def is_tried(config: Pretrain, backbone: nn.Module, **options) -> bool:
        tried.clear()
        choose_engine(config, backbone, CPU, passes=10**9, batch=8, **options)
        return any(trial.convolution == "winograd" for choices in tried for trial in choices)

    assert is_tried(CONFIG, Wide())
    assert not is_tried(CONFIG, Wide(), numba=False)
    assert not is_tried(CONFIG, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
    for options in ({"convolution": "direct"}, {"layout": "contiguous"}, {"compile": "on"}):
        assert not is_tried(replace(CONFIG, engine=EngineOptions(**options)), Wide())
    assert is_tried(replace(CONFIG, precision="bf16"), Wide())


@pytest.mark.parametrize(
    ("options", "device", "numba", "told"),
    [
        ({"layout": "contiguous"}, "cpu", True, "it is for --engine.layout channels_last"),
        ({"compile": "on"}, "cpu", True, "it cannot be compiled (--engine.compile on)"),
        ({}, "cuda", True, "it is for CPUs"),
        ({}, "cpu", False, "it needs numba (pip install numba)"),
    ],
)
def test_what_cannot_be_had_is_told_and_computed_directly(options, device, numba, told):
    """A run that has chosen it may be resumed on another machine, or with other options."""
    chosen = EngineOptions(**{"layout": "channels_last", "compile": "off", "convolution": "winograd", **options})
    asked, said = replace(CONFIG, precision="fp32", engine=chosen), []
    given = choose_engine(asked, Wide(), torch.device(device), passes=4, batch=8, say=said.append, numba=numba)
    assert given == (replace(asked, engine=replace(chosen, convolution="direct")), "")
    assert said == [f"--engine.convolution winograd cannot be had: {told}; torch's own convolutions are taken"]


def test_a_backbone_that_does_not_suit_is_told():
    asked, said = replace(CONFIG, engine=EngineOptions(convolution="winograd")), []
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    chosen, _ = choose_engine(asked, backbone, CPU, passes=4, batch=8, say=said.append)
    assert chosen.engine.convolution == "direct" and "3 x 3 and 64 channels" in said[0]


@needs_numba
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_winograd_as_asked_is_not_measured(precision):
    asked = replace(CONFIG, precision=precision, engine=EngineOptions(convolution="winograd"))
    chosen, why = choose_engine(asked, Wide(), CPU, passes=4, batch=8)
    engine_options = replace(asked.engine, layout="channels_last", convolution="winograd", compile="off")
    assert chosen == replace(asked, engine=engine_options) and why == f"{precision} channels_last winograd"


@needs_numba
def test_a_module_in_which_only_winograd_fails_is_computed_directly():
    """Two derivatives in one pass: torch's own convolution has them, ours has one."""

    class Smooth(Wide):
        def forward(self, view):
            maps = self[0](view)
            (slope,) = torch.autograd.grad(self[1](maps).square().sum(), maps, create_graph=True)
            return slope.mean((2, 3))

    assert seconds(Smooth(), WINOGRAD, CPU, 32, 4, rounds=1) == float("inf")
    assert seconds(Smooth(), Trial("fp32", "channels_last"), CPU, 32, 4, rounds=1) < 60


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_is_eager():
    torch.manual_seed(0)
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    compiled = copy.deepcopy(eager)
    compile_module(compiled)
    view = torch.randn(4, 3, 16, 16)
    outputs = []
    for backbone in (eager, compiled):
        output = backbone(view)
        output.square().mean().backward()
        outputs.append(output.detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert list(eager.state_dict()) == list(compiled.state_dict())
    for (key, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)
    for (key, one), other in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=key)


def test_on_a_gpu_the_precision_is_no_question(monkeypatch):
    gpu = torch.device("cuda")
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(engine, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert candidates(DIRECT, gpu) == [
            Trial(precision, "channels_last"),
            Trial(precision, "contiguous"),
        ]


class TooLarge(nn.Module):
    num_features = 4

    def forward(self, view):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_a_trial_that_does_not_fit_is_left():
    """The run may well fit: with fewer images at a time, or checkpointing."""
    assert seconds(TooLarge(), Trial("fp32", "channels_last"), CPU, 8, 4, rounds=2) == float("inf")
    config = replace(CONFIG, engine=EngineOptions(checkpointing=True))
    said: list[str] = []
    chosen, why = choose_engine(config, TooLarge(), CPU, passes=10**9, batch=8, say=said.append)
    assert (chosen.precision, chosen.engine.layout, chosen.engine.compile) == ("fp32", "channels_last", "off")
    assert said == [
        "a long run, of unknown length on this machine: 4 ways to compute the encoder are timed first",
    ]
    keeps, words = try_compiling(TooLarge(), Trial("fp32", "channels_last"), CPU, 8, 4)
    assert not keeps and "does not fit into memory" in words


def test_a_compiler_that_is_asked_for_and_lacks_is_told_before_anything_starts():
    import torch._inductor.config as inductor

    config = replace(CONFIG, engine=EngineOptions(compile="on"))
    with inductor.patch({"cpp.cxx": ("/nowhere/compiler",)}), pytest.raises(UsageError, match="compile on needs a C"):
        choose_engine(config, nn.Identity(), CPU, passes=4, batch=8)


def test_a_compiler_that_fails_is_told_and_left():
    class Difficult(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, 4)

        def forward(self, view):
            return self.layer(view.flatten(1))

        def compile(self, *arguments, **options):
            raise RuntimeError("no compiler takes me")

    keeps, words = try_compiling(Difficult(), Trial("fp32", "channels_last"), CPU, 8, 4)
    assert not keeps and "torch.compile failed (RuntimeError)" in words


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="for CPUs")
@pytest.mark.parametrize(("command", "begins_anew"), [("pretrain", True), ("knn", False)])
def test_a_command_that_trains_begins_with_a_heap_of_few_gaps(command, begins_anew, tmp_path):
    """As the same process, with what it was told."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    told = tmp_path / "told"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nwith open({str(told)!r}, 'a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), *sys.orig_argv[1:], file=file)\n"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    line = [sys.executable, "-m", "caco", command, "--no-such-option"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "no-such-option" in done.stderr and "Traceback" not in done.stderr
    first, *more = [starts.split() for starts in told.read_text().splitlines()]
    assert first[1:] == ["None", "-m", "caco", command, "--no-such-option"]
    assert more == ([[first[0], "glibc.malloc.tcache_count=0", *first[2:]]] if begins_anew else [])


FAULTS = """
import resource, sys, torch
from caco.train.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
before = faults()
for _ in range(20):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_heap_is_kept():
    """20 tensors of 64 MiB one after the other: without, each is made of pages that the system has to clear."""
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("give back", "keep")
    }
    assert faults["keep"] < faults["give back"] / 10


def test_why_the_fastest_is_not_taken_is_said():
    usual, half, winograd = (
        Trial("fp32", "channels_last"),
        Trial("bf16", "channels_last"),
        Trial("fp32", "channels_last", "winograd"),
    )
    choices = [usual, half, winograd]
    assert engine._unless_fastest(winograd, choices, [2.0, 1.5, 1.0]) == ""
    words = engine._unless_fastest(winograd, choices, [2.0, 0.9, 1.0])
    assert words == " (bf16 must be 1.5 times as fast; --precision bf16 asks for it)"
    assert "faster by more than noise is" in engine._unless_fastest(usual, choices, [1.0, 2.0, 0.95])
