"""Which process this is, what it takes on, and what the processes tell each other."""

import os

import pytest
import torch
from torch import nn

from buddy import distributed
from buddy.cli.app import require_one_process
from buddy.config import Recipe
from buddy.errors import BuddyError, TrainingError
from tests.scale.forked import launcher, side_by_side
from tests.test_cli import call


@pytest.fixture
def environment(monkeypatch):
    """Takes the numbers of a launcher, and leaves out all others."""

    def environment(**numbers: int | str) -> None:
        for name in (*distributed.PLACES, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in numbers.items():
            monkeypatch.setenv(name, str(value))

    environment()
    return environment


def test_one_process_require_one_process(environment):
    assert distributed.leads()
    assert distributed.speaks()
    assert not distributed.together()
    assert (distributed.count(), distributed.rank(), distributed.from_torchrun()) == (1, 0, 1)
    distributed.join(Recipe().trainer)
    assert distributed.tell(3) == 3
    assert distributed.gather("x") == ["x"]
    assert distributed.shared_out(3) == [0, 1, 2]
    assert distributed.shape({"devices": 2, "num_nodes": 3}) == (2, 3)
    assert not distributed.together()


@pytest.mark.parametrize(
    ("numbers", "leads", "speaks", "whose"),
    [
        ({"LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": 2}, True, True, ""),
        ({"LOCAL_RANK": 1, "NODE_RANK": 0, "WORLD_SIZE": 2}, False, True, " in process 1"),
        ({"NODE_RANK": 1}, False, True, " in process 0"),  # the first of the second node
        ({"SLURM_PROCID": 3}, False, True, " in process 0"),
        (launcher(0, 2, 1), True, True, ""),
        (launcher(1, 2, 1), False, False, " in process 1"),
        ({**launcher(2, 4, 1), "LOCAL_RANK": 0, "GROUP_RANK": 1}, False, False, " in process 2"),
    ],
)
def test_who_leads_and_who_speaks(environment, numbers, leads, speaks, whose):
    environment(**numbers)
    assert (distributed.leads(), distributed.speaks(), distributed.whose()) == (leads, speaks, whose)


def test_the_numbers_of_torchrun_hold(environment):
    environment(**{**launcher(0, 16, 1), "LOCAL_WORLD_SIZE": "8"})
    assert distributed.from_torchrun() == 16
    assert distributed.shape({"devices": 1, "num_nodes": 1}) == (8, 2)


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


def test_devices_that_are_not_there(environment):
    with pytest.raises(TrainingError, match=r"accelerator=cuda and devices=2 do not work here \(.*\); change them"):
        distributed.join({**Recipe().trainer, "accelerator": "cuda", "devices": 2})


def test_a_process_too_many(environment):
    environment(SLURM_PROCID=1)
    with pytest.raises(TrainingError, match=r"began several processes, .* set trainer\.devices \(on each node\) and"):
        distributed.join(Recipe().trainer)


def test_what_one_process_does_is_refused_under_torchrun(environment):
    require_one_process("Nothing is said")
    environment(**launcher(0, 2, 1))
    with pytest.raises(
        BuddyError, match="Tasks are scored by one process, not by 2; give the command without torchrun"
    ):
        require_one_process("Tasks are scored")
    for words in (
        ["bench", "--run", "x"],
        ["compare", "--recipe", "quickstart"],
        ["evaluate", "--run", "x", "--tasks", "piqa"],
    ):
        result = call(*words)
        assert result.exit_code == 2
        assert "by one process, not by 2" in result.stderr
    environment(**launcher(1, 2, 1))
    result = call("bench", "--run", "x")
    assert (result.exit_code, result.stderr) == (2, "")


def talk() -> dict:
    module = nn.BatchNorm1d(3)
    nn.init.constant_(module.weight, distributed.rank())
    module.running_mean += distributed.rank()
    module.register_buffer("chosen", torch.tensor([True, False]) ^ bool(distributed.rank()))
    module.register_buffer("narrow", torch.full((2, 1), 0.5 + distributed.rank(), dtype=torch.bfloat16))
    module.register_buffer("empty", torch.empty(0, 3))
    distributed.alike(module)
    with distributed.leader_first():
        pass
    return {
        "number": (distributed.rank(), distributed.count(), distributed.leads()),
        "told": distributed.tell({"by": distributed.rank()}),
        "gathered": distributed.gather(distributed.rank() * 10),
        "alike": [x.tolist() for x in (module.weight, module.running_mean, module.chosen, module.narrow)],
        "five": distributed.shared_out(5),
        "none": distributed.shared_out(0),
        "one": distributed.shared_out(1),
    }


def test_what_processes_tell_each_other():
    found = side_by_side(talk)
    assert [each.pop("number") for each in found] == [(0, 2, True), (1, 2, False)]
    assert [each.pop("five") for each in found] == [[0, 2, 4], [1, 3, 0]]
    assert found[0] == found[1]
    assert found[0] == {
        "told": {"by": 0},
        "gathered": [0, 10],
        "alike": [[0.0] * 3, [0.0] * 3, [True, False], [[0.5], [0.5]]],
        "none": [],
        "one": [0],
    }


def leave() -> str:
    """The second process ends without a word."""
    if distributed.rank():
        return "left"
    with pytest.raises(TrainingError, match="Another process of this run has ended; see what it said"):
        list(map(distributed.tell, range(100)))
    return "noticed"


def test_a_process_that_ends_is_noticed():
    assert side_by_side(leave) == ["noticed", "left"]


@pytest.mark.parametrize(
    ("seen", "count", "given"), [(None, 3, "012012"), ("4,7", 2, "474747"), (None, 1, None), ("5", 1, "5")]
)
def test_processes_take_gpus_in_turn(monkeypatch, seen, count, given):
    monkeypatch.delenv(distributed.SEEN, raising=False)
    if seen:
        monkeypatch.setenv(distributed.SEEN, seen)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    for place in range(6):
        with distributed.one_gpu(place):
            assert os.environ.get(distributed.SEEN) == (given and given[place % len(given)])
        assert os.environ.get(distributed.SEEN) == seen
