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
