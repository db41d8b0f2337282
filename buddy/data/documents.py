"""Texts → tokenised documents, each at least one window long.

`datasets` stores the tokens in its own cache (HF_HOME or HF_DATASETS_CACHE).

A document is
- a row of the source (a speech, a .txt file, a row of JSON, CSV or Parquet) or an article of WikiText;
- a part of a row that has more than a sixteenth of the whole text, such as a book in one file: the row is cut into
  parts of about eight windows, fewer if the text is short, at the ends of paragraphs if possible. Neighbouring parts
  may belong to different splits;
- a pack of neighbouring rows that are shorter than a window, such as lines of JSON, with the tokenizer's
  end-of-sequence token (an empty line if it has none) between them, until a window is full.

A row of as many characters as a window has tokens, or more, is left out if it repeats an earlier one, so that no text
is both trained on and held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from buddy.console import counted
from buddy.data.text import load_texts, reading, step_fingerprint, without_marks
from buddy.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LARGEST_SHARE = 16  # a row with more than 1 / LARGEST_SHARE of all characters is cut
PART = 8  # windows in a part of a long text
PARTS = 32  # parts of a short text, if it has as many windows


class Documents:
    """Tokenised documents, read from the cache of `datasets` on demand.

    Attributes:
        lengths: (D,) int64, tokens of each document, at least a window each.
        tokens: tokens in the whole text, including those outside all documents.
        hashes: (rows,) int64, of the texts of all rows, the same within a process.
    """

    def __init__(
        self, tokens: Dataset, window: int, separator: Sequence[int], begin: Sequence[int], hashes: np.ndarray
    ) -> None:
        """Pack rows of `tokens`, each with a list of token ids in the column "input_ids", into D documents."""
        import pyarrow.compute as pc

        rows = pc.list_value_length(tokens.data.column("input_ids")).to_numpy().astype(np.int64)
        gap = len(separator)
        self._rows = tokens.with_format("numpy")
        self._packs = packs = pack(rows, window, gap)
        self._separator = np.array(separator, dtype=np.int64)
        self._begin = np.array(begin, dtype=np.int64)
        self.tokens, self.hashes = int(rows.sum()), hashes
        self.lengths = np.array([rows[list(each)].sum() + gap * (len(each) - 1) for each in packs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._packs)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of all tokens."""
        digest = hashlib.sha256()
        for part in self._rows.with_format("arrow").iter(batch_size=1024):
            for chunk in part["input_ids"].chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()[:16]

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
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    text_field: str = "text",
    *,
    fewest: int = 1,
    other: Documents | None = None,
) -> Documents:
    """The documents of a source that hold at least `window` tokens; see the module's description.

    The tokenizer adds its special tokens. The cache of `datasets` stores the tokens, so the same text with the same
    tokenizer is tokenised once.

    Args:
        fewest: documents that are needed.
        other: a text whose rows are left out.

    Raises:
        DataError: the source cannot be read (`load_texts`), the cache cannot be used, or there are fewer than `fewest`
            documents.
    """
    texts = load_texts(source, text_field)
    with reading(source, texts.data.nbytes):
        texts, hashes = _distinct(without_marks(texts), window, () if other is None else other.hashes)
    if other is not None and not len(texts):
        raise DataError(f"Every row of {source} is in data.source, too, whose test windows it holds; leave it out.")
    with reading(source, texts.data.nbytes):
        tokens = _tokenise(_cut_long(texts, tokenizer, window), tokenizer)
    begin, separator = _begin_and_separator(tokenizer)
    documents = Documents(tokens, window, separator, begin, hashes)
    if len(documents) < fewest:
        shorter = documents.tokens // (2 * fewest)
        advice = f" or set data.window={shorter} or smaller" if fewest > 1 and shorter >= 16 else ""
        missing = len(hashes) - len(texts)
        known = f", without {counted(missing, 'row')} that others repeat or data.source has," if missing else ""
        raise DataError(
            f"The text in {source}{known} gives {counted(len(documents), 'document')} of {window} tokens or more, and "
            f"{fewest} are needed; give more text{advice}."
        )
    return documents


def _begin_and_separator(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The beginning token that the tokenizer puts before every text, and what stands between two rows of a pack."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    bare, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    begin = [first] if whole[:1] == [first] != bare[:1] else []
    if last is None:
        return begin, list(tokenizer("\n\n", add_special_tokens=False).input_ids)
    return begin, [] if whole[-1:] == [last] != bare[-1:] else [last]


def _distinct(texts: Dataset, least: int, known: Sequence[int] | np.ndarray) -> tuple[Dataset, np.ndarray]:
    """The rows without those of at least `least` characters that repeat an earlier one or whose hash is known.

    Returns:
        The rows that are left, and the hashes (rows,) int64 of all.
    """
    chunks = texts.data.column("text").chunks
    found = ((hash((text or "").strip()), len(text or "")) for chunk in chunks for text in chunk.to_pylist())
    table: np.ndarray = np.fromiter(found, np.dtype((np.int64, 2)), len(texts))
    hashes, first = table[:, 0], np.zeros(len(table), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    kept = (table[:, 1] < least) | (first & ~np.isin(hashes, known))
    if kept.all():
        return texts, hashes
    mark = step_fingerprint(texts, "distinct", hashlib.sha256(kept.tobytes()).hexdigest())
    options = {"new_fingerprint": mark, "batched": True, "with_indices": True, "fn_kwargs": {"kept": kept}}
    return texts.map(_kept_rows, **options), hashes


def _cut_long(texts: Dataset, tokenizer: PreTrainedTokenizerBase, window: int) -> Dataset:
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
    fingerprint = step_fingerprint(texts, "cut", sizes)
    return texts.map(_cut_rows, new_fingerprint=fingerprint, batched=True, batch_size=64, fn_kwargs=sizes)


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


def _tokenise(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The column "input_ids" for every row that is not blank."""
    from datasets import Features, List, Value

    rules: Any = tokenizer
    if tokenizer.is_fast:  # `datasets` would pickle it for each text, which takes seconds with a large vocabulary
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # what another use left behind; a call below would remove it, too
        backend.no_padding()
        rules = backend.to_str()
    return texts.map(
        _tokenise_rows,
        new_fingerprint=step_fingerprint(texts, "input_ids", rules),
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


def _characters_per_token(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> float:
    """Measured on the beginnings of all texts, at most some hundred thousand characters together."""
    sample = [text[: 200_000 // len(texts)] for text in texts if text]
    tokens = sum(len(ids) for ids in _tokenise_rows({"text": sample}, tokenizer)["input_ids"])
    return sum(map(len, sample)) / max(1, tokens)


def _cut_rows(rows: dict[str, list[str | None]], limit: int, size: int) -> dict[str, list[str]]:
    return {
        "text": [part for text in rows["text"] if text for part in (cut(text, size) if len(text) > limit else [text])]
    }


def _kept_rows(rows: dict[str, list[str | None]], numbers: list[int], kept: np.ndarray) -> dict[str, list[str | None]]:
    return {"text": [text for text, number in zip(rows["text"], numbers, strict=True) if kept[number]]}


def _tokenise_rows(rows: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    texts = [text for text in rows["text"] if text and not text.isspace()]
    # verbose=False: a document may be longer than the model's context, since only windows of it are run.
    return {"input_ids": tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []}
