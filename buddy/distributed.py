"""Several processes for one command: which one this is, how the others come about, and what they tell each other.

They come from torchrun or another launcher, or are begun by the first one, by the same command. The first one leads: it
alone writes and speaks. A process that is alone takes part in nothing of this, at no cost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from buddy.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup


PLACES = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")  # what launchers call a process's number
WAYS = ("gloo", "NCCL", "ProcessGroup")  # in what torch says of a process that is not there any more
SEEN = "CUDA_VISIBLE_DEVICES"
PATIENCE = timedelta(days=7)  # one may calibrate for hours while the others wait for its word
_words: ProcessGroup | None = None  # the way by which processes talk, once they are together


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return not any(_number(name) for name in PLACES)


def from_torchrun() -> int:
    """How many processes torchrun began, over all nodes; 1 where it did not begin this one."""
    return _number("WORLD_SIZE", 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def shape(trainer: Mapping[str, Any]) -> tuple[int, int]:
    """(devices on each node, nodes): those of torchrun where it began this process, else the recipe's."""
    if from_torchrun() > 1:
        return _number("LOCAL_WORLD_SIZE", 1), from_torchrun() // _number("LOCAL_WORLD_SIZE", 1)
    return trainer["devices"], trainer["num_nodes"]


def speaks() -> bool:
    """Whether this process says what went wrong: what all find before they are together, the first one says for all."""
    return leads() or together() or from_torchrun() == 1


def whose() -> str:
    """Beside an error, which process found it, unless it is the one that leads."""
    return "" if leads() else f" in process {_number('RANK', _number('LOCAL_RANK'))}"


def together() -> bool:
    """Whether there are several processes, and `join` brought them together."""
    return _words is not None


def count() -> int:
    """How many processes are together."""
    return 1 if _words is None else _words.size()


def rank() -> int:
    """The number of this one among them, from 0."""
    return 0 if _words is None else _words.rank()


def device(accelerator: str) -> torch.device:
    """Where this process computes: its own one of the machine's accelerators if there are any, else the CPU."""
    import torch

    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind, there = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return torch.device(kind.type, _number("LOCAL_RANK") % there) if there > 1 else kind


@contextmanager
def one_gpu(place: int) -> Iterator[None]:
    """A process that begins within this block sees one of this machine's GPUs, the next one for each place in turn."""
    import torch

    seen = os.environ.get(SEEN)
    there = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    if len(there) < 2:
        yield
        return
    os.environ[SEEN] = there[place % len(there)]
    try:
        yield
    finally:
        os.environ.pop(SEEN)
        os.environ.update({SEEN: seen} if seen else {})


def join(trainer: Mapping[str, Any]) -> None:
    """Begin the other processes where no launcher did, and wait until all are there; a second call does nothing.

    What they tell each other goes over a connection of its own on the CPU, whatever the accelerators use.

    Raises:
        TrainingError: the accelerator or the number of devices is not there, or this is one process too many.
    """
    global _words
    devices, nodes = shape(trainer)
    if together() or devices * nodes == 1:
        if not together() and not leads():
            raise TrainingError(
                "A launcher began several processes, and the recipe asks for one device; set trainer.devices (on each "
                "node) and trainer.num_nodes to what it began."
            )
        return
    from lightning.fabric import Fabric
    from torch import distributed

    from buddy.training.callbacks import quiet

    with quiet():
        try:
            fabric = Fabric(accelerator=trainer["accelerator"], devices=devices, num_nodes=nodes, strategy="ddp")
        except Exception as error:  # only settings are looked at here, and they are refused with many kinds of error
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
            raise TrainingError(
                f"accelerator={trainer['accelerator']} and devices={devices} do not work here ({reason}); change them."
            ) from error
        fabric.launch()
    _words = distributed.new_group(backend="gloo", timeout=PATIENCE)


def tell(value: Any = None) -> Any:
    """The first process's value, in every process."""
    box = [value]
    if _words is not None:
        from torch import distributed

        with linked():
            distributed.broadcast_object_list(box, group=_words)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes in their order, in every process."""
    found = [value] * count()
    if _words is not None:
        from torch import distributed

        with linked():
            distributed.all_gather_object(found, value, group=_words)
    return found


def wait() -> None:
    """Until all processes are here."""
    tell()


@contextmanager
def leader_first() -> Iterator[None]:
    """The others begin this block once the first process is through, and find on disk what it left there."""
    with _turn(0 if leads() else 1, 1):
        yield


@contextmanager
def one_by_one(trainer: Mapping[str, Any]) -> Iterator[None]:
    """The processes of a node go through this block one after the other; it may be the first one that joins in it."""
    with _turn(_number("LOCAL_RANK"), shape(trainer)[0] - 1):
        yield


@contextmanager
def _turn(own: int, last: int) -> Iterator[None]:
    for _ in range(own):
        wait()
    yield
    for _ in range(last - own):
        wait()


def alike(module: nn.Module) -> None:
    """Give a module the first process's parameters and buffers, in every process."""
    if _words is None:
        return
    import torch
    from torch import distributed

    with linked():
        for tensor in module.state_dict().values():
            held = tensor.detach().cpu().flatten().view(torch.uint8)  # any type, as bytes; not all can be sent
            distributed.broadcast(held, src=0, group=_words)
            tensor.copy_(held.view(tensor.dtype).view(tensor.shape))


def shared_out(items: int) -> list[int]:
    """The numbers of the items that this process does: every n-th.

    All processes get equally many, since each waits for the others where weights are shared out: where the items do not
    suffice, some are done twice, with the same result.
    """
    rounds = -(-items // count())
    return [(rank() + count() * number) % items for number in range(rounds)] if items else []


@contextmanager
def linked() -> Iterator[None]:
    """Where another process has ended, this one ends too: the first says so, the others follow without a word."""
    try:
        yield
    except RuntimeError as error:
        if not any(way in str(error) for way in WAYS):
            raise
        if not leads():
            raise SystemExit(2) from error
        raise TrainingError(
            "Another process of this run has ended; see what it said, mend it, and repeat the command to go on."
        ) from error


def _number(name: str, otherwise: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
