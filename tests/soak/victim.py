"""Processes that are killed: forked from one that has imported everything, so that kills fall into the work."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Act = Callable[[], None]


class Died(Exception):
    """A process ended by itself, with an error; what it said is the message."""


def run(act: Act, log: Path, seconds: float | None = None) -> bool:
    """Run an act in a process of its own.

    Args:
        act: what it does.
        log: where its streams go; only the last act's are kept.
        seconds: when it is killed; None lets it end.

    Returns:
        Whether it ended by itself; False where SIGKILL ended it.

    Raises:
        Died: it ended with an error.
    """
    pid = _fork(act, log)
    handle = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([handle], [], [], seconds)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(handle)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise Died(log.read_text(errors="replace")[-4000:])
    return True


def preload(act: Act, log: Path) -> None:
    """Run an act to its end, and import here all that it imported, which takes longer than most of what is killed."""
    names = log.with_suffix(".modules")

    def noted() -> None:
        before = {*sys.modules}
        act()
        names.write_text("\n".join({*sys.modules} - before))

    run(noted, log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names.read_text().split():
            with suppress(Exception):  # some exist only while something else is imported
                importlib.import_module(name)


def _fork(act: Act, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
