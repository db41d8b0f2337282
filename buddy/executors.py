"""Where units of work run: in several processes of this machine (loky), or on a Ray cluster.

A unit is one run that resumes by itself, so a unit whose worker died is submitted again. What a worker prints goes to
the unit's log file.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from buddy import distributed
from buddy.errors import BuddyError, RunError, described, reason

if TYPE_CHECKING:
    from buddy.run import RunSpec

ATTEMPTS = 3  # of a unit whose worker dies
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 60.0  # that a unit has to save a checkpoint after an interrupt


def _call(threads: int, folder: str, path: Sequence[str], function: Callable[[RunSpec], Any], unit: RunSpec) -> Any:
    """In a worker: one unit, its output and traceback in its log.

    With the parent's folder and `sys.path`, relative paths and plug-ins mean the same in both.
    """
    import torch

    os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]
    torch.set_num_threads(threads)
    unit.log.parent.mkdir(parents=True, exist_ok=True)
    with unit.log.open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return function(unit)
        except BaseException as error:
            traceback.print_exc()
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # otherwise the parent would see a process that died
                raise BuddyError(described(error)) from None
            raise


def run_in_processes(
    function: Callable[[RunSpec], Any],
    units: Sequence[RunSpec],
    on_done: Callable[[RunSpec, Any], None],
    *,
    jobs: int,
    threads: int = 1,
) -> None:
    """Call `function` with several units at once, each in a process, on a GPU of its own where there are several.

    Each process is a pool of its own, so that its death ends no other unit.

    Args:
        function: picklable. It may keep expensive state in a global of its module, once for each process.
        units: in the order in which they begin.
        on_done: called in this process as each ends, with the unit and its result, or the exception that it raised.
        jobs: processes.
        threads: of torch in each process.

    Raises:
        KeyboardInterrupt: units were stopped, each with time for a checkpoint; no worker is left.
    """
    from joblib.externals.loky.process_executor import BrokenProcessPool

    path, waiting = _search_path(), deque((unit, 1) for unit in units)
    free, pools = list(range(min(jobs, len(waiting)))), dict[int, Any]()
    running: dict[Future[Any], tuple[int, RunSpec, int]] = {}
    ended: SimpleQueue[Future[Any]] = SimpleQueue()
    try:
        with _handled(signal.SIGTERM, signal.default_int_handler):  # it ends the work as Ctrl-C does
            while waiting or running:
                while waiting and free:
                    slot, (unit, attempt) = free.pop(0), waiting.popleft()
                    pools[slot] = pools.get(slot) or _pool(slot)
                    # Here until `running` has the unit, in a new process until `_begin`.
                    with _held_back(*INTERRUPTS):
                        try:
                            future = pools[slot].submit(_call, threads, os.getcwd(), path, function, unit)
                        except BrokenProcessPool as death:  # between two units
                            future = Future()
                            future.set_exception(death)
                        running[future] = slot, unit, attempt
                        future.add_done_callback(ended.put)
                future = ended.get()  # `futures.wait` can leave a lock held when an interrupt comes
                slot, unit, attempt = running.pop(future)
                free.append(slot)
                error = future.exception()
                died = isinstance(error, BrokenProcessPool)
                if died or not waiting:  # a process without work holds a model, and may be killed for it
                    pools.pop(slot).shutdown(wait=died, kill_workers=died)
                if died:
                    if attempt < ATTEMPTS:
                        waiting.appendleft((unit, attempt + 1))
                        continue
                    error = RunError(
                        f"Its process died {ATTEMPTS} times, perhaps because memory ran out; free some or give "
                        "fewer --jobs."
                    )
                on_done(unit, future.result() if error is None else error)
    except BaseException:
        for slot, *_ in running.values():
            for pid in list(pools[slot]._processes):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
        last = time.monotonic() + GRACE_SECONDS
        with suppress(Empty):
            while not all(future.done() for future in running):
                ended.get(timeout=max(0.0, last - time.monotonic()))
        raise
    finally:
        busy = not all(future.done() for future in running)
        for pool in pools.values():
            pool.shutdown(kill_workers=busy)  # a killed worker leaves semaphores, which Python reports


def _search_path() -> list[str]:
    """`sys.path` as it is from any folder."""
    return [os.path.abspath(entry) for entry in sys.path]


def _pool(slot: int) -> Any:
    """A pool of one process."""
    from multiprocessing import resource_tracker

    from joblib.externals.loky import ProcessPoolExecutor

    resource_tracker.ensure_running()  # the first `submit` would begin it, and that unblocks SIGINT
    return ProcessPoolExecutor(1, initializer=_begin, initargs=(os.getpid(),), env=distributed.gpu_of_worker(slot))


def _begin(parent: int) -> None:
    """In a worker: interrupts come from the parent alone, and the worker does not outlive it."""
    from joblib.externals.loky import process_executor

    # loky would replace a worker that grew by 300 MB, as each does that loads a model, and the model with it.
    process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    os.setpgid(0, 0)  # the terminal's Ctrl-C goes to the parent, which passes it on

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # for an interrupt that was held back
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_on_ray(
    function: Callable[[RunSpec], Any],
    units: Sequence[RunSpec],
    on_done: Callable[[RunSpec, Any], None],
    *,
    threads: int = 1,
    gpus: bool = True,
) -> None:
    """Call `function` in tasks of a Ray cluster, on one GPU each if it has any.

    The cluster is that at RAY_ADDRESS, such as "10.0.0.1:6379", or a new one on this machine. All its nodes must see
    the same files and packages.

    Args:
        function, units, on_done: as for `run_in_processes`.
        threads: of torch in each task, which takes so many CPUs.
        gpus: whether tasks may use GPUs.
    """
    import ray

    address, folder, path = os.environ.get("RAY_ADDRESS"), os.getcwd(), _search_path()
    variables = {"PYTHONPATH": os.pathsep.join(path)}  # a worker imports this module before `_call` adds to its path
    options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": variables}}
    options |= {} if address else {"include_dashboard": False}
    running: dict[Any, RunSpec] = {}
    with _handled(signal.SIGTERM, signal.default_int_handler):  # ray.init takes this signal, and keeps it
        try:
            ray.init(address, **options)
            with _handled(signal.SIGTERM, signal.default_int_handler):
                each = 1 if gpus and ray.cluster_resources().get("GPU") else 0
                task: Any = ray.remote(num_cpus=threads, num_gpus=each, max_retries=ATTEMPTS - 1)(_call)
                shared = ray.put(function)
                running |= {task.remote(threads, folder, path, shared, unit): unit for unit in units}
                while running:
                    (ref,), _ = ray.wait(list(running))
                    outcome = _outcome(ref)
                    on_done(running.pop(ref), outcome)
        except BaseException:
            for force, seconds in ((False, GRACE_SECONDS), (True, 0.0)) if running else ():
                for ref in running:
                    ray.cancel(ref, force=force)
                ray.wait(list(running), num_returns=len(running), timeout=seconds)
            raise
        finally:
            ray.shutdown()


def require_ray() -> None:
    """Raises BuddyError where Ray is not installed, or no cluster listens: Ray itself would try for minutes."""
    if find_spec("ray") is None:
        raise BuddyError("Ray is not installed; install Buddy with its extra `ray`.")
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise BuddyError(f"There is no Ray cluster at {address} ({error}); begin one by ray start.") from error


def _outcome(ref: Any) -> Any:
    """The result of a Ray task, or the exception that it raised."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.RayError as error:
        return RunError(f"Its worker died {ATTEMPTS} times ({reason(error)}); free some memory.")


@contextmanager
def _held_back(*numbers: signal.Signals) -> Iterator[None]:
    """Signals that come within this block take effect after it; processes that begin in it have them blocked."""
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        with ExitStack() as stack:
            for number in numbers:  # another thread of this process may receive it
                stack.enter_context(_handled(number, lambda number, _: came.append(number)))
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for first in came[:1]:
            signal.raise_signal(first)


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal so within this block; Python allows that in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is None:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
