"""Files that are written whole or not at all, and read with plain words for what is wrong with them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename over it, so that a kill leaves the old text or the new one.

    Raises:
        RunError: the place cannot be written.
    """
    _write(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_place(path: Path) -> None:
    """Raises RunError when no file can be written to `path`, before the work whose result it is to hold."""
    path = path.absolute()
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise RunError(f"There is no folder {path.parent} for {path.name}; make it first.")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        RunError: missing, not JSON, or not a mapping.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, getattr(error, "strerror", None) or str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "it is not a mapping")
    return value


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write safetensors as `write_text` does; tensors are copied to the CPU, so views are fine."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _write(path, save(plain, dict(metadata)))


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


def damaged(path: Path, reason: str) -> RunError:
    """The error for a file of a run that cannot be used."""
    return RunError(f"{path} is damaged ({reason}); make the run again with `buddy fit`.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says against writing to `path` into a RunError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{path} cannot be written ({reason}); free that place or choose another.") from error


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too leaves nothing behind
            beside.unlink(missing_ok=True)
            raise
