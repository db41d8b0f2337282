"""Processes side by side for a test, forked so that none of them imports anything anew."""

import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from buddy import distributed
from buddy.schema import Recipe

PATIENCE = 60.0  # seconds
CPU = {**Recipe().trainer, "accelerator": "cpu"}


def side_by_side(work: Callable[..., Any], *given: Any, count: int = 2) -> list[Any]:
    """What `work(*given)` gives in each of `count` processes, which think that torchrun began them."""
    context, port = get_context("fork"), free_port()
    pipes, begun = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads; from Python 3.12 on
        for rank in range(count):
            ours, theirs = context.Pipe()
            begun.append(context.Process(target=_work, args=(theirs, rank, count, port, work, given), daemon=True))
            begun[-1].start()
            theirs.close()
            pipes.append(ours)
    found = []
    try:
        for pipe in pipes:
            assert pipe.poll(PATIENCE), "a process did not end"
            found.append(pickle.loads(pipe.recv_bytes()))
    finally:
        for process in begun:
            process.kill()
            process.join()
    failed = [text for good, text in found if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in found]


def launcher(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives one of `count` processes on one node."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in (numbers | place).items()}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _work(pipe: Connection, rank: int, count: int, port: int, work: Callable[..., Any], given: tuple) -> None:
    os.environ.update(launcher(rank, count, port))
    try:
        distributed.launch(CPU)
        answer = (True, work(*given))
    except BaseException:
        answer = (False, f"process {rank}: {traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(answer))  # not `send`, which leaves tensors here for the other side to fetch
    with suppress(BaseException):
        distributed.broadcast()  # the others may still need this process; not a barrier, which waits for one that left
