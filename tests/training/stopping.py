"""Ways to stop a training in the middle of a step, and what must be the same after it was resumed."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from buddy.run_files import load_router


class Killed(BaseException):
    """Stands in for a kill: nothing in Buddy handles it."""


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_step(monkeypatch, module: type, step: int, act, method: str = "training_step") -> None:
    """`act` is called in a training step of the modules of a class, or in a call of another method, once."""
    calls, inner = [], getattr(module, method)

    def counted(self, *args):
        calls.append(None)
        if len(calls) == step:
            act()
        return inner(self, *args)

    monkeypatch.setattr(module, method, counted)


def same(one: dict, other: dict) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last(run: Path) -> dict[str, Any]:
    """The last checkpoint in a run folder."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(one: Path, two: Path) -> None:
    """The router, and everything that the last checkpoint has of weights, optimizer and schedule."""
    assert same(*(load_router(folder) for folder in (one, two)))
    mine, other = last(one), last(two)
    assert mine["global_step"] == other["global_step"]
    assert mine["lr_schedulers"] == other["lr_schedulers"]
    torch.testing.assert_close(mine["state_dict"], other["state_dict"], atol=0, rtol=0)
    torch.testing.assert_close(mine["optimizer_states"], other["optimizer_states"], atol=0, rtol=0)
