"""Atomic writes, files read with plain errors, and sentences for a full disk or memory."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout

from buddy.errors import DamagedError, RunError

if TYPE_CHECKING:
    from torch import Tensor

PART = ".part"  # ends the name of a file that is being written
SUM = "checksum"  # the key that `write_with_checksum` adds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Errors of a full, read-only, protected or failing disk.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free, in place of giving it back to the system.

    glibc maps every block above 32 MB anew, such as the logits of a few windows, and the system clears its pages each
    time: a quarter of the time of an evaluation on a CPU. No limit on the size, since a training step on a vocabulary
    of 262,144 has logits of 2 GB. Without effect where the C library has no `mallopt`.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


# Writing


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a kill or a power cut leaves the old content or the new one, never a part.

    The content goes to a temporary file beside `path`, is synced to the disk, and is renamed over `path`. A link stays,
    and the file that it leads to is written.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{uuid4().hex}{PART}")  # any name that a file may have is short enough
    with writing(path):
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:  # Ctrl-C too leaves nothing behind
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_with_checksum(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with a checksum of the value, by which `read_json` notices any later change."""
    write_json(path, {**value, SUM: _checksum_of(value)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`write_bytes` of safetensors; tensors are copied to the CPU, so that views are allowed."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {"format": "pt"}))  # safetensors does not keep the order of several keys


def remove_parts(folder: Path, recursive: bool = True) -> None:
    """Remove the temporary files of killed processes, in a folder that no other process writes now.

    Args:
        folder: that is searched.
        recursive: whether the folders in it are searched, too.
    """
    for part in list((folder.rglob if recursive else folder.glob)(f".*{PART}")):
        part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file within this block; the operating system frees it when the process ends.

    Args:
        path: of the lock file.
        busy: the message if another process holds it.
        patience: seconds to wait for that process.

    Raises:
        RunError: another process holds it, or its folder cannot be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(path).acquire(timeout=patience)
        except Timeout:
            raise RunError(busy) from None
    with held:
        yield


def check_output_path(path: Path, *inputs: str | Path) -> None:
    """Check, before long work, that its result can be written to `path`; an existing file is replaced.

    Args:
        path: the file to write.
        inputs: files that the work reads, or folders of them, which must not be overwritten; other names are ignored.

    Raises:
        RunError: no file can be written there.
    """
    path = path.absolute()
    names = [Path(os.path.expanduser(each)) for each in (inputs if os.path.exists(path) else ())]
    files = chain.from_iterable(each.rglob("*") if os.path.isdir(each) else [each] for each in names)
    if any(os.path.exists(each) and os.path.samefile(each, path) for each in files):
        raise RunError(f"{path} is an input of this command, or in a folder that it reads; name another file.")
    if os.path.isdir(path):  # unlike Path, os.path accepts any text, such as a name of 300 letters
        raise RunError(f"{path} is a folder; name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):  # `write_bytes` would replace it, even /dev/null
        raise RunError(f"{path} is a device or a pipe; name a file.")
    check_parent(path)
    with writing(path), suppress(FileNotFoundError):
        path.lstat()  # fails where the name is too long
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written (the folder is read-only); choose another folder.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder atomically: the block fills a hidden sibling, which is renamed to `path` at the end.

    If the block fails, nothing is left; the next call removes what a killed process left.

    Raises:
        RunError: `path` exists, another process is making it, or its parent is missing or cannot be written.
    """
    path = path.absolute()
    _check_new(path)
    beside, lock = (path.with_name(f".{path.name}.{what}") for what in ("partial", "lock"))
    with locked(lock, f"Another process is making {path}; wait for it, or name another folder."):
        try:
            with writing(path):
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
            yield beside
            _check_new(path)  # another process may have created it
            with writing(path):
                beside.rename(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _check_new(path: Path) -> None:
    if os.path.lexists(path):  # unlike Path, os.path accepts any text
        raise RunError(f"{path} exists and is not overwritten; name a new folder.")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raises RunError where the folder that a file or folder is to be made in is missing."""
    path = path.absolute()
    if not os.path.isdir(path.parent):
        raise RunError(f"There is no folder {path.parent} for {path.name}; make it first.")


# Reading


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, without the checksum of `write_with_checksum`.

    Raises:
        DamagedError: it is missing, not JSON, not a mapping, or its checksum is wrong.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(value, dict):
        raise DamagedError(path, "it is not a mapping")
    written = value.pop(SUM, None)
    if written is not None and written != _checksum_of(value):
        raise DamagedError(path, "its checksum is wrong")
    return value


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        DamagedError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedError(path, str(error)) from error


def checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; DamagedError where it is no file or cannot be read."""
    if path.exists() and not path.is_file():  # a link to a device may have no end
        raise DamagedError(path, "it is not a file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(path, error.strerror or str(error)) from error


# Errors of disk and memory


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every OSError within this block into a RunError that says `path` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space there or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        other = "a shorter name" if error.errno == errno.ENAMETOOLONG else "another folder"
        raise RunError(f"{path} cannot be written ({reason}); {advice}choose {other}.") from error


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """`writing` around long work: only errors of the disk itself (see `REFUSALS`) become a RunError.

    TensorBoard writes in its own thread and raises that thread's error at its next call, so the thread's traceback is
    not printed.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: None if _is_refusal(args.exc_value) else before(args)
    try:
        yield
    except OSError as error:
        if not _is_refusal(error):
            raise
        with writing(path):
            raise
    finally:
        threading.excepthook = before


@contextmanager
def tensorboard_writer(folder: Path, suffix: str = "") -> Iterator[Any]:
    """A SummaryWriter; with a suffix its event file replaces those of earlier calls, once it is whole.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    with on_disk(folder):
        older = list(folder.glob(f"events.out.tfevents.*{suffix}")) if suffix else []
        with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
            yield writer
        for path in older:
            path.unlink(missing_ok=True)


@contextmanager
def within_memory(what: str, advice: str = "free some, or use a machine with more") -> Iterator[None]:
    """Turn a failed allocation, on the CPU or an accelerator, into a RunError.

    Args:
        what: the sizes that did not fit, as in "a batch of 8 × 512 tokens".
        advice: what to do next.

    Raises:
        RunError: not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(f"Not enough memory for {what}; {advice}.") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or an accelerator."""
    # torch.OutOfMemoryError is a RuntimeError; torch's allocator for the CPU has no exception of its own.
    accelerator, cpu = type(error).__name__ == "OutOfMemoryError", "allocate memory" in str(error)
    return accelerator or cpu or isinstance(error, MemoryError)


def _is_refusal(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in REFUSALS


def _checksum_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of the value after a round trip through JSON, which turns tuples into lists and keys into text."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


# The user's caches


def cache_root() -> Path:
    """The folder of all caches: the environment's BUDDY_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.path.expanduser(os.environ.get("BUDDY_CACHE") or user_cache_dir("buddy"))).absolute()


def cache_folder(name: str) -> Path | None:
    """The folder of one cache: the environment's BUDDY_<NAME>_CACHE, None where that is empty, else in `cache_root`."""
    folder = os.environ.get(f"BUDDY_{name.upper()}_CACHE")
    if folder is None:
        return cache_root() / name
    return Path(os.path.expanduser(folder)).absolute() if folder else None
