"""Ranks, devices, and what processes exchange."""

import time

import pytest
import torch
from torch import nn

from buddy import distributed
from buddy.errors import TrainingError
from buddy.schema import Recipe
from tests.asking import call
from tests.scale.forked import launcher, side_by_side


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and removes all others."""

    def environment(**variables: int | str) -> None:
        for name in (*distributed.RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    environment()
    return environment


def test_a_single_process_exchanges_nothing(environment):
    distributed.launch(Recipe().trainer)
    assert distributed.is_global_zero()
    assert not distributed.is_distributed()
    assert distributed.torchrun_world_size() == 1
    assert distributed.broadcast(3) == 3
    assert distributed.device_counts({"devices": 2, "num_nodes": 3}) == (2, 3)


@pytest.mark.parametrize(
    ("variables", "zero", "prefix"),
    [
        ({"LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": 2}, True, "Error"),
        ({"LOCAL_RANK": 1, "NODE_RANK": 0, "WORLD_SIZE": 2}, False, "Error in process 1"),
        ({"NODE_RANK": 1}, False, "Error in process 0"),  # the first of the second node
        ({"SLURM_PROCID": 3}, False, "Error in process 0"),
        (launcher(0, 2, 1), True, "Error"),
        (launcher(1, 2, 1), False, None),
        ({**launcher(2, 4, 1), "LOCAL_RANK": 0, "GROUP_RANK": 1}, False, None),
    ],
)
def test_the_rank_is_known_from_the_launchers_variables(environment, variables, zero, prefix):
    environment(**variables)
    assert (distributed.is_global_zero(), distributed.error_prefix()) == (zero, prefix)


def test_each_process_has_an_accelerator_of_its_own(environment, monkeypatch):
    assert distributed.device("cpu") == torch.device("cpu")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert distributed.device("cpu") == torch.device("cpu")
    assert distributed.device("auto") == torch.device("cuda:0")
    environment(LOCAL_RANK=3)
    assert distributed.device("gpu") == torch.device("cuda:3")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    assert distributed.device("gpu") == torch.device("cuda")


@pytest.mark.parametrize(
    "words",
    [["bench", "--run", "x"], ["compare", "--recipe", "quickstart"], ["evaluate", "--run", "x", "--tasks", "x"]],
)
def test_what_one_process_does_is_refused_under_torchrun(environment, words):
    environment(**launcher(0, 2, 1))
    result = call(*words)
    assert result.exit_code == 2
    assert "torchrun" in result.stderr
    environment(**launcher(1, 2, 1))
    result = call(*words)
    assert (result.exit_code, result.stderr) == (2, "")


def exchange() -> dict:
    rank = torch.distributed.get_rank()
    module = nn.BatchNorm1d(3)
    nn.init.constant_(module.weight, rank)
    module.running_mean += rank
    module.register_buffer("chosen", torch.tensor([True, False]) ^ bool(rank))
    module.register_buffer("narrow", torch.full((2, 1), 0.5 + rank, dtype=torch.bfloat16))
    module.register_buffer("empty", torch.empty(0, 3))
    distributed.broadcast_state(module)
    with distributed.rank_zero_first():
        pass
    return {
        "rank": (rank, torch.distributed.get_world_size(), distributed.is_global_zero()),
        "broadcast": distributed.broadcast({"by": rank}),
        "state": [x.tolist() for x in (module.weight, module.running_mean, module.chosen, module.narrow)],
    }


def test_what_processes_exchange():
    found = side_by_side(exchange)
    assert [each.pop("rank") for each in found] == [(0, 2, True), (1, 2, False)]
    assert found[0] == found[1]
    assert found[0] == {
        "broadcast": {"by": 0},
        "state": [[0.0] * 3, [0.0] * 3, [True, False], [[0.5], [0.5]]],
    }


def meet() -> tuple[float, float]:
    """When this process comes to a barrier and leaves it; the others come later."""
    time.sleep(0.3 * torch.distributed.get_rank())
    came = time.monotonic()
    distributed.barrier()
    return came, time.monotonic()


def test_no_process_leaves_a_barrier_before_all_are_there():
    came, left = zip(*side_by_side(meet, count=4), strict=True)
    assert max(came) <= min(left)


def leave() -> str:
    """The second process ends without a word."""
    if torch.distributed.get_rank():
        return "left"
    with pytest.raises(TrainingError):
        list(map(distributed.broadcast, range(100)))
    return "noticed"


def test_a_process_that_ends_is_noticed():
    assert side_by_side(leave) == ["noticed", "left"]


@pytest.mark.parametrize(("visible", "count", "given"), [(None, 3, "012012"), ("4,7", 2, "474747"), (None, 1, None)])
def test_workers_take_gpus_in_turn(monkeypatch, visible, count, given):
    monkeypatch.delenv(distributed.VISIBLE, raising=False)
    if visible:
        monkeypatch.setenv(distributed.VISIBLE, visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    found = [distributed.gpu_of_worker(worker).get(distributed.VISIBLE) for worker in range(6)]
    assert found == (list(given) if given else [None] * 6)
