"""Tokens as short words that can be read beside a picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 14  # signs
SPELT = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def labels_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """One short label for each token: its text without blanks around it, or the blanks spelt out where it is no more.

    Line ends and other invisible signs are spelt out; long tokens are cut.
    """
    return [_label(tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)) for token in ids]


def _label(text: str) -> str:
    label = "".join(map(_visible, text.strip(" ") or text))
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def _visible(sign: str) -> str:
    if sign in SPELT:
        return SPELT[sign]
    return sign if sign.isprintable() else f"\\{ord(sign):x}"
