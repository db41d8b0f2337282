"""WikiText in its word-level form, with ` @-@ ` inside words and `<unk>` for rare ones, back to text and articles.

A tokenizer of sub-words never saw these marks. The raw form, which has ` @-@ ` too but no `<unk>`, is left as it is,
since results on it are published.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

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
