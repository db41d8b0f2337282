"""Several runs at once, each in a process of its own; the death of one stops no other.

`concurrent.futures` gives up all work when one process dies, and hands out work ahead that an interrupt then cannot
take back; so this is a small pool that gives each process one run at a time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

from buddy import console, distributed
from buddy.signals import handled

Done = Callable[[Any, str | None], None]
Heard = Callable[[Any, str, bool], None]

PATIENCE = 60.0  # seconds for a training step to end after an interrupt
NOT_BEGUN = "Its process could not begin"
LOADING = "Loading the model and the texts …"


def side_by_side(start: Any, runs: Sequence[Any], jobs: int, on_done: Done, on_line: Heard) -> None:
    """Do all runs, `jobs` at once.

    Args:
        start: how a process begins.
        runs: what there is to do, first things first.
        jobs: processes at most.
        on_done: called in this process with a run and why it failed, or None, as each ends.
        on_line: called with a run, a line that it says, and whether it is of a bar, to be replaced by the next.

    Raises:
        KeyboardInterrupt: all processes were told to stop in good order, and did.
    """
    waiting = list(runs)
    helpers = [_Helper(start, place) for place in range(min(jobs, len(waiting)))]
    try:
        with handled(signal.SIGTERM, signal.default_int_handler):  # which ends a comparison as Ctrl-C does
            for helper in helpers:
                _give(helper, waiting.pop(0), on_line)
            _see_to(helpers, waiting, on_done, on_line)
    except BaseException:
        for helper in helpers:
            helper.interrupt()
        raise
    finally:
        try:
            for helper in helpers:
                helper.close()
        except KeyboardInterrupt:  # a second one
            for helper in helpers:
                helper.close(patience=0)
            raise


def _see_to(helpers: Sequence[_Helper], waiting: list[Any], on_done: Done, on_line: Heard) -> None:
    """Pass on what helpers say, and give one that is done the next run, until all are done."""
    while busy := {helper.pipe: helper for helper in helpers if helper.run}:
        for pipe in wait([*busy]):
            helper = busy[pipe]  # type: ignore[index]  # wait gives back what it was given
            run, said = helper.run, helper.said()
            if isinstance(said, _Line):
                on_line(run, said.text, said.passing)
                continue
            on_done(run, said)
            if waiting:
                _give(helper, waiting.pop(0), on_line)


def _give(helper: _Helper, run: Any, on_line: Heard) -> None:
    """Have it do a run; a new process has half a minute of loading before it can say anything itself."""
    if helper.begin(run):
        on_line(run, LOADING, True)


@dataclass(frozen=True)
class _Line:
    """What a helper says about its work; `passing` where it is of a bar, to be replaced by the next."""

    text: str
    passing: bool


class _Helper:
    """One process that works, on a GPU of its own where there are several; another takes its place where it dies."""

    def __init__(self, start: Any, place: int) -> None:
        self._start, self._place, self._context = start, place, get_context("spawn")
        self._stopped = self._context.Event()
        self.run: Any = None
        self.pipe: Connection | None = None
        self.process: BaseProcess | None = None

    def begin(self, run: Any) -> bool:
        """Give it a run; whether a new process had to begin for that."""
        self.run = run
        began = self.process is None or not self.process.is_alive()
        if began:
            self._spawn()
        try:
            self.pipe.send(run)
        except ConnectionError:  # it was about to end
            began = True
            self._spawn()
            self.pipe.send(run)
        return began

    def said(self) -> _Line | str | None:
        """A line, or how its run ended, once the pipe has something to say; None where all is well."""
        run, self.run = self.run, None
        try:
            said = self.pipe.recv()
            if isinstance(said, _Line):
                self.run = run
            elif said and said.startswith(NOT_BEGUN):
                self.process.join()  # it is about to end, and is to get no other run
            return said
        except (EOFError, ConnectionError):
            self.process.join()
            return (
                f"Its process ended by itself (exit code {self.process.exitcode}), perhaps for want of memory; free "
                "some or give fewer --jobs."
            )

    def interrupt(self) -> None:
        """Stop in good order: a training saves a checkpoint after its step."""
        self._stopped.set()
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def close(self, patience: float = PATIENCE) -> None:
        """No more work comes; it has so many seconds to end by itself."""
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None:
            self.process.join(patience)
            self.process.kill()
            self.process.join()

    def _spawn(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
        self.pipe, theirs = self._context.Pipe()
        every = console.TOLD_EVERY if console.errors.is_terminal else console.PLAIN_EVERY
        self.process = self._context.Process(
            target=_work, args=(theirs, self._stopped, self._start, every), daemon=True
        )
        # Deaf to interrupts until it can take them without a traceback.
        with handled(signal.SIGINT, signal.SIG_IGN), distributed.one_gpu(self._place):
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does


def _work(pipe: Connection, stopped: Event, start: Any, every: float) -> None:
    """What a process does until its pipe ends; it tells its bars every so many seconds."""

    def tell(text: str, passing: bool) -> None:
        with suppress(OSError):  # nobody listens any more: a checkpoint is to be saved all the same
            pipe.send(_Line(text, passing))

    os.setpgrp()  # the terminal's Ctrl-C goes to the parent alone, which passes it on
    console.relay(tell, every)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run, worker = pipe.recv(), None
        while not stopped.is_set():
            worker = worker or start.worker()
            pipe.send(worker.run(run))
            run = pipe.recv()
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except Exception as error:  # from `start.worker`, which went well in the parent
        pipe.send(f"{NOT_BEGUN} ({type(error).__name__}: {error}); give fewer --jobs.")


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
