"""Ways to stop a training in the middle of a step, and what must be the same after it was resumed."""

import os
import signal

import torch


class Killed(BaseException):
    """Stands in for a kill: nothing in Buddy handles it."""


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_step(monkeypatch, module: type, step: int, act) -> None:
    """`act` is called in a training step of the modules of a class, once."""
    calls, training_step = [], module.training_step

    def counted(self, *args):
        calls.append(None)
        if len(calls) == step:
            act()
        return training_step(self, *args)

    monkeypatch.setattr(module, "training_step", counted)


def same(one: dict, other: dict) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
