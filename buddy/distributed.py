"""Several processes for one command: launch, ranks and collectives.

torchrun or another launcher starts the processes, or the first process launches the others with the same command. Only
the process of global rank zero writes files and messages. In a single process every function here returns at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from buddy.console import quiet
from buddy.errors import TrainingError, reason

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

# Variables in which launchers give a process its rank.
RANKS = ("RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")
VISIBLE = "CUDA_VISIBLE_DEVICES"
TIMEOUT = timedelta(days=7)  # the others may wait hours for calibration
BACKENDS = ("gloo", "NCCL", "ProcessGroup")  # in the messages of torch about a lost peer
_group: ProcessGroup | None = None  # on the CPU; None for a single process


# Ranks


def is_global_zero() -> bool:
    """Whether this process writes files and messages; known before `launch`."""
    return not any(_variable(name) for name in RANKS)


def is_distributed() -> bool:
    """Whether `launch` connected several processes."""
    return _group is not None


def torchrun_world_size() -> int:
    """How many processes torchrun launched on all nodes; 1 without torchrun."""
    return _variable("WORLD_SIZE", 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def device_counts(trainer: Mapping[str, Any]) -> tuple[int, int]:
    """(devices on each node, nodes), from torchrun if it launched this process, else from the recipe's `trainer`.

    Raises:
        TrainingError: more processes than cores would be launched on the CPU, each with a backbone of its own.
    """
    if torchrun_world_size() > 1:
        return _variable("LOCAL_WORLD_SIZE", 1), torchrun_world_size() // _variable("LOCAL_WORLD_SIZE", 1)
    devices, cores = trainer["devices"], os.cpu_count() or 1
    if devices > cores and device(trainer["accelerator"]).type == "cpu":
        raise TrainingError(f"This machine has {cores} cores, too few for {devices} processes; set devices to {cores}.")
    return devices, trainer["num_nodes"]


def error_prefix() -> str | None:
    """ "Error" or "Error in process 3"; None before `launch` in other processes, which repeat the first one's error."""
    if is_global_zero():
        return "Error"
    rank = _variable("RANK", _variable("LOCAL_RANK"))
    return f"Error in process {rank}" if is_distributed() or torchrun_world_size() == 1 else None


# Devices


def device(accelerator: str) -> torch.device:
    """The device of this process: one of the machine's accelerators, else the CPU."""
    import torch

    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return torch.device(kind.type, _variable("LOCAL_RANK") % count) if count > 1 else kind


def gpu_of_worker(worker: int) -> dict[str, str]:
    """The environment variable that leaves a process one GPU of this machine: `worker` modulo their count.

    Empty where there are not several.
    """
    import torch

    visible = os.environ.get(VISIBLE)
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {VISIBLE: gpus[worker % len(gpus)]} if len(gpus) > 1 else {}


# Launching and exchanging


def launch(trainer: Mapping[str, Any]) -> None:
    """Launch the other processes unless a launcher did, and connect all; a second call does nothing.

    Args:
        trainer: of the recipe; `accelerator`, `devices` and `num_nodes` are read.

    Raises:
        TrainingError: the accelerator or devices are missing, or a launcher started too many processes.
    """
    global _group
    devices, nodes = device_counts(trainer)
    if is_distributed() or devices * nodes == 1:
        if not is_distributed() and not is_global_zero():
            raise TrainingError(
                "A launcher started several processes, but the recipe sets one device; set trainer.devices (on each "
                "node) and trainer.num_nodes to the launched processes."
            )
        return
    from lightning.fabric import Fabric
    from torch import distributed

    accelerator = trainer["accelerator"]
    with quiet():
        try:
            fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy="ddp")
        except Exception as error:  # Fabric checks its arguments, with many types of error
            raise TrainingError(
                f"accelerator={accelerator} and devices={devices} do not work here ({reason(error)}); change them."
            ) from error
        fabric.launch()
    _group = distributed.new_group(backend="gloo", timeout=TIMEOUT)


def broadcast(value: Any = None) -> Any:
    """The first process's value, in every process."""
    box = [value]
    if _group is not None:
        from torch import distributed

        with lost_peers_reported():
            distributed.broadcast_object_list(box, group=_group)
    return box[0]


def least(value: int) -> int:
    """The smallest value of all processes, in every process."""
    values = [value]
    if _group is not None:
        from torch import distributed

        with lost_peers_reported():
            values *= distributed.get_world_size(_group)
            distributed.all_gather_object(values, value, group=_group)
    return min(values)


def barrier() -> None:
    """Wait until all processes are here."""
    least(0)  # unlike a broadcast, it needs all of them


def broadcast_state(module: nn.Module) -> None:
    """Copy the first process's parameters and buffers into a module, in every process."""
    if is_distributed():
        module.load_state_dict(broadcast({name: tensor.cpu() for name, tensor in module.state_dict().items()}))


def rank_zero_first() -> AbstractContextManager[None]:
    """The other processes enter this block after the first one left it, and find its files on disk."""
    return _in_turn(0 if is_global_zero() else 1, 1)


def one_by_one(trainer: Mapping[str, Any]) -> AbstractContextManager[None]:
    """The processes of a node pass this block one after the other; `launch` may be called within it."""
    return _in_turn(_variable("LOCAL_RANK"), device_counts(trainer)[0] - 1)


@contextmanager
def _in_turn(turn: int, last: int) -> Iterator[None]:
    for _ in range(turn):
        barrier()
    yield
    for _ in range(last - turn):
        barrier()


@contextmanager
def lost_peers_reported() -> Iterator[None]:
    """End this process if another one ended: the first with an error, the others with exit code 2.

    Raises:
        TrainingError: another process ended, in the first process.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(backend in str(error) for backend in BACKENDS):
            raise
        if not is_global_zero():
            raise SystemExit(2) from error
        raise TrainingError(
            "Another process of this run ended; see its error, correct the cause, and repeat the command to resume."
        ) from error


def _variable(name: str, default: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
