"""Where a process stands, what processes exchange, and how an error or a loss of one ends all. Real gloo processes."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from caco.config import DistributedOptions
from caco.device import choose_device
from caco.distributed.launch import launch
from caco.distributed.membership import Membership, find_membership, first_host
from caco.distributed.network import interface_towards, own_address_towards
from caco.distributed.world import World
from caco.errors import CacoError, UsageError

TWO = DistributedOptions(processes=2)


def test_a_process_started_alone_has_no_place():
    assert find_membership({}) is None
    one_of_one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_membership(one_of_one) is None
    assert find_membership({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None  # a job's script


def test_place_from_torchrun():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert find_membership(environment) == Membership(rank=5, size=8, local_rank=1, address="a", port=7)


def test_place_from_slurm():
    environment = {
        **{"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"},
        **{"SLURM_JOB_ID": "4120007", "SLURM_JOB_NODELIST": "gpu[03-05,9]"},
    }
    assert find_membership(environment) == Membership(rank=6, size=8, local_rank=2, address="gpu03", port=20007)
    step = {**environment, "SLURM_STEP_NODELIST": "gpu[04-05]", "SLURM_STEP_ID": "2"}
    assert find_membership(step) == Membership(rank=6, size=8, local_rank=2, address="gpu04", port=35845)
    assert find_membership({**environment, "SLURM_PTY_PORT": "4711"}) is None  # a shell, of srun --pty
    chosen = {**environment, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_membership(chosen) == Membership(rank=6, size=8, local_rank=2, address="10.0.0.1", port=1234)


def test_torchrun_inside_slurm_comes_first():
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NODELIST": "n1"}
    assert find_membership({**slurm, **torchrun}) == Membership(rank=1, size=2, local_rank=1, address="a", port=7)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login1", "login1"),
        ("a,b", "a"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("gpu[1-2]-ib,x", "gpu1-ib"),
        ("head,gpu[1-2]", "head"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 10])
def test_parts_are_every_item_once_in_order(size, count):
    parts = [World(torch.device("cpu"), rank, size).part(range(count)) for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_single_process_exchanges_nothing():
    world, rows = World(torch.device("cpu")), torch.arange(3)
    assert world.is_main
    for same in (world.gather, world.sum, world.maximum, world.gather_parts):
        assert same(rows) is rows
    assert world.vote(True, False) == (True, False)
    assert world.gather_objects("a") == ["a"] and world.decide_in_main(lambda: "b") == "b"
    world.wait()


def test_interface_towards_this_machine():
    assert own_address_towards("127.0.0.1", 1) == "127.0.0.1"
    if os.path.isdir("/sys/class/net/lo"):
        assert interface_towards("127.0.0.1", 1) == "lo"


def exchange(world: World) -> list:
    """Every exchange once, the assertions about each in every process; return what the main one got."""
    rank = world.rank
    assert world.size == 2 and world.is_main == (rank == 0)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
    gathered = world.gather(rows)
    assert gathered.tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
    assert world.gather(rows.T).tolist() == [[1, 3], [2, 4], [11, 13], [12, 14]]  # rows that are not contiguous
    assert world.sum(rows).tolist() == [[12, 14], [16, 18]]
    assert world.maximum(rows).tolist() == [[11, 12], [13, 14]]
    assert rows.tolist() == [[1 + 10 * rank, 2 + 10 * rank], [3 + 10 * rank, 4 + 10 * rank]]  # left as it was
    assert world.vote(rank == 1, False, rank == 0) == (True, False, True)
    assert world.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    for dtype in (torch.float32, torch.int64):
        own = torch.arange(3 - 2 * rank, dtype=dtype)[:, None] + 5 * rank  # 3 rows, 1 row
        whole = world.gather_parts(own)
        assert whole.dtype == dtype and whole.tolist() == [[0], [1], [2], [5]]
    assert world.gather_parts(torch.ones(2 * rank, 2)).shape == (2, 2)  # one has nothing to give
    assert world.gather_parts(torch.ones(0, 2)).shape == (0, 2)  # nor has the other
    made = []
    assert world.decide_in_main(lambda: made.append(rank) or "from the main process") == "from the main process"
    assert made == ([0] if rank == 0 else [])
    items = world.part(np.arange(7))
    assert world.gather_parts(torch.from_numpy(items)).tolist() == list(range(7))
    world.wait()
    return gathered.tolist()


def test_two_processes_exchange():
    assert launch(exchange, TWO, "cpu") == [[1, 2], [3, 4], [11, 12], [13, 14]]
    assert multiprocessing.active_children() == []


def fail(world: World) -> None:
    """One process fails; the other waits for it in an exchange."""
    if world.rank == 1:
        raise UsageError("the disk is full")
    world.wait()


def test_an_error_of_one_process_is_the_error_of_the_run():
    began = time.monotonic()
    with pytest.raises(UsageError, match="^the disk is full$"):
        launch(fail, TWO, "cpu")
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def crash(world: World) -> None:
    if world.rank == 1:
        raise ZeroDivisionError("a fault of the program")
    world.wait()


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of the program"):
        launch(crash, TWO, "cpu")


def kill_itself(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:  # the other goes on and on
        world.wait()


def test_a_killed_process_is_named_and_nobody_hangs():
    began = time.monotonic()
    with pytest.raises(CacoError, match="^process 1 of 2 was killed.*--resume"):
        launch(kill_itself, TWO, "cpu", can_resume=True)
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_what_does_not_save_is_not_told_to_resume():
    with pytest.raises(CacoError, match=r"^process 1 of 2 was killed, so all others were stopped\.$"):
        launch(kill_itself, TWO, "cpu")


def test_wrong_numbers_are_told_before_anything_starts():
    with pytest.raises(UsageError, match="processes 0"):
        launch(exchange, DistributedOptions(processes=0), "cpu")
    with pytest.raises(UsageError, match="machine 2: must be from 0 to 1"):
        launch(exchange, DistributedOptions(processes=1, machines=2, machine=2, address="a:1"), "cpu")
    for address in ("", "10.0.0.1", "10.0.0.1:port"):
        with pytest.raises(UsageError, match="must be HOST:PORT"):
            launch(exchange, DistributedOptions(processes=1, machines=2, address=address), "cpu")


def test_more_processes_than_gpus_are_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda"):
        with pytest.raises(
            UsageError, match=r"processes 2: each needs a GPU of its own, and this machine has 1; .*cpu"
        ):
            launch(exchange, TWO, device)
    assert launch(exchange, TWO, "cpu") is not None


def test_an_apple_gpu_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cpu")


def test_products_on_a_gpu_are_exact_where_the_environment_asks_for_tf32():
    """As NVIDIA's containers do. torch keeps the setting whether there is a GPU or not."""
    program = """
import torch
from caco.device import exact_products
assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
exact_products(torch.device("cpu"))
assert torch.backends.cuda.matmul.allow_tf32
for ask in range(2):
    exact_products(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later; mixed with the older way it raises
        torch.backends.cuda.matmul.fp32_precision = "tf32"
"""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_a_machine_that_never_comes_is_told():
    """Process 0 waits for machine 1 until the timeout."""
    options = DistributedOptions(processes=1, machines=2, address="127.0.0.1:29817", timeout=2)
    with pytest.raises(UsageError, match="process 0 of 2 did not meet the others at 127.0.0.1:29817"):
        launch(exchange, options, "cpu")


def slow_decision(world: World) -> list:
    """The main process decides for longer than an exchange waits."""
    decided = world.decide_in_main(lambda: (time.sleep(7), "this")[1])
    if world.rank == 1:
        time.sleep(7)
    world.wait()
    return [decided, world.sum(torch.ones(1)).item()]


def test_what_one_process_does_alone_may_take_longer_than_an_exchange():
    assert launch(slow_decision, DistributedOptions(processes=2, timeout=3.0), "cpu") == ["this", 2.0]


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_waits_for_a_process_that_has_failed(rank, tmp_path):
    """On machines of their own, where nobody else sees it end; the other one is not to wait for ever."""
    program = f"""
import sys
from caco.config import DistributedOptions
from caco.distributed.launch import launch
from caco.errors import CacoError, UsageError

def work(world):
    if world.rank == {rank}:
        raise UsageError("no images here")
    world.wait()

if __name__ == "__main__":
    number, port = int(sys.argv[1]), sys.argv[2]
    options = DistributedOptions(processes=1, machines=2, machine=number, address=f"127.0.0.1:{{port}}", timeout=60.0)
    try:
        launch(work, options, "cpu")
    except CacoError as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""
    (tmp_path / "program.py").write_text(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(tmp_path / "program.py")]
    began = time.monotonic()
    processes = [
        subprocess.Popen([*command, str(number), port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(2)
    ]
    said = [process.communicate(timeout=50)[0] for process in processes]
    assert time.monotonic() - began < 40
    assert "UsageError: no images here" in said[rank], said
    # Why, it may learn from the one that failed, or from a connection that is gone.
    assert f"process {1 - rank} of 2 stops: " in said[1 - rank], said
