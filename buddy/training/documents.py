"""Text → tokenised documents, each at least one window long.

What counts as a document:
- a row of the source (a speech, a .txt file, a row of JSON, CSV or Parquet), an article of WikiText, except that
- a row with more than a sixteenth of the whole text (a book in one file, say) is cut into consecutive parts of
  about eight windows, fewer where the text is short, at the end of a paragraph where there is one near. Every part
  counts as a document, so that such a text can be split too; neighbouring parts may end up in different splits;
- rows shorter than a window (lines of JSON, often) are packed with their neighbours, with the tokenizer's
  end-of-sequence token between them, until a window is full. Every pack counts as a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from buddy.training.sources import keeping, load_texts, quiet
from buddy.training.wikitext import undone

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
