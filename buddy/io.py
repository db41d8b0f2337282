"""Atomic writes, reading with plain errors, and sentences for a full disk and for memory that runs out."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import DamagedError, RunError

if TYPE_CHECKING:
    from torch import Tensor

PART = ".part"  # ends the name of a file that is being written
SUM = "checksum"  # in a file of `write_sealed`
REFUSALS = {  # what a disk says: it is full, read-only, somebody else's, or failing
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")
    if hasattr(errno, name)
}


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename over it, so that a kill leaves the old text or the new one.

    Raises:
        RunError: the place cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a sum of its content, by which `read_json` knows whether it is still what was written."""
    write_json(path, {**value, SUM: _sum(value)})


def check_place(path: Path, *read: Path) -> None:
    """Raises RunError when no file can be written to `path`, before the work whose result it is to hold.

    Args:
        path: where the result goes; an older file there is replaced.
        read: what the work is done on, which stays.
    """
    path = path.absolute()
    if any(os.path.exists(each) and os.path.exists(path) and os.path.samefile(each, path) for each in read):
        raise RunError(f"{path} is what this command reads; name another file for what it writes.")
    if os.path.isdir(path):  # os.path, unlike Path, answers for any text: a name of 300 letters, say
        raise RunError(f"{path} is a folder; name a file in it.")
    if not os.path.isdir(path.parent):
        raise RunError(f"There is no folder {path.parent} for {path.name}; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written (the folder is read-only); choose another place.")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, without the sum of `write_sealed`.

    Raises:
        RunError: missing, not JSON, not a mapping, or not what the sum was made of.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "it is not a mapping")
    written = value.pop(SUM, None)
    if written is not None and written != _sum(value):
        raise damaged(path, "it is not what was written")
    return value


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write safetensors as `write_text` does; tensors are copied to the CPU, so views are fine."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, dict(metadata)))


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        RunError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; RunError when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error


def damaged(path: Path, reason: str) -> DamagedError:
    """The error for a file of a run that cannot be used."""
    return DamagedError(path, " ".join(reason.split()))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says against writing to `path` into a RunError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path} cannot be written ({reason}); free that place or choose another.") from error


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """As `writing`, around long work that writes now and then: only what a disk refuses becomes a RunError.

    TensorBoard writes in a thread of its own, and raises what stopped it where it is next asked to; so the thread's own
    traceback is not printed.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: None if _refused(args.exc_value) else before(args)
    try:
        yield
    except OSError as error:
        if not _refused(error):
            raise
        with writing(path):
            raise
    finally:
        threading.excepthook = before


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write as `write_text` does, through to the disk, so that a power cut too leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    with writing(path):
        _forget_killed(path)
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too leaves nothing behind
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def remove_parts(folder: Path) -> None:
    """Remove what killed processes were writing in a folder and below; call it with the folder's lock held."""
    for part in list(folder.rglob(f".*{PART}")):
        part.unlink(missing_ok=True)


def _refused(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in REFUSALS


def _sum(value: Mapping[str, Any]) -> str:
    """Of the values as JSON gives them back: tuples are lists, and keys are texts."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _forget_killed(path: Path) -> None:
    """Remove what a process that was killed left of this file."""
    for part in path.parent.glob(f".{escape(path.name)}.*{PART}"):
        number = part.name.removesuffix(PART).rpartition(".")[2]
        if number.isdigit() and not alive(int(number)):
            part.unlink(missing_ok=True)


@contextmanager
def within_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into a `RunError`; torch says it in three ways.

    Args:
        what: the sizes that did not fit, as in "a batch of 8 × 512 tokens".
        advice: what to do next.

    Raises:
        RunError: memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator has no exception of its own.
        cuda, cpu = type(error).__name__ == "OutOfMemoryError", "allocate memory" in str(error)
        if not (cuda or cpu or isinstance(error, MemoryError)):
            raise
        raise RunError(f"Memory does not suffice for {what}; {advice}.") from error
