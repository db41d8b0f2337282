"""The texts to look at: the recipe's own test text, others beside it, or one text as it was typed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from buddy.build import build_held_out, build_windows
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, check_text
from buddy.run import Run

TYPED = "text"  # label of a text given by itself


@dataclass(frozen=True)
class Domain:
    """Windows of one text.

    Attributes:
        label: what it is called in tables and pictures.
        source: where it was read from; None for a text given by itself.
        windows: (N, W) tokens of it.
        prompt: tokens at the start of each window that share a plan where prompts do.
    """

    label: str
    source: str | None
    windows: Windows
    prompt: int


def sources_of(domains: str | None, own: str) -> dict[str, str]:
    """Label → source of each domain in "SOURCE,label=SOURCE,…"; the recipe's own source where there is none.

    A source without a label is called by its file's name without the ending.

    Raises:
        DataError: nothing is named, a label or source is empty, or two domains have one label.
    """
    if domains is None:
        return {_label(own): own}
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in domains.split(","))):
        label, source = _labelled(part)
        if label in found:
            raise DataError(
                f"Two domains are called {label!r}; tell them apart, as in --domains one={found[label]},two={source}."
            )
        found[label] = source
    if not found:
        raise DataError("--domains is empty; name at least one text, or leave it out for the recipe's own.")
    return found


def read_domains(run: Run, routed: RoutedLM, sources: dict[str, str], count: int) -> list[Domain]:
    """Up to `count` windows of each source, as `buddy evaluate` cuts them; of the recipe's own text, its test windows.

    Raises:
        DataError: a text cannot be read, or is too short for one window.
    """
    return [_read(run, routed, label, source, count) for label, source in sources.items()]


def typed(routed: RoutedLM, text: str) -> Domain:
    """One window with exactly this text; all of it is the prompt, as in `buddy generate`.

    Raises:
        DataError: the text is empty, too short for one routed token, or longer than the backbone reads.
    """
    if not text.strip():
        raise DataError("The text to look at is empty; give some words.")
    check_text(text, "The text to look at")
    ids = routed.backbone.tokenizer(text, return_tensors="pt").input_ids
    tokens, most = ids.shape[1], routed.backbone.context_length
    if tokens <= routed.sink_tokens:
        raise DataError(
            f"The text has too few tokens, {tokens}: the first {routed.sink_tokens} run at full depth whatever the "
            "budget (routing.sink_tokens); give a longer one."
        )
    if tokens > most:
        raise DataError(f"The text has {tokens} tokens, but {routed.backbone.name} reads at most {most}; shorten it.")
    return Domain(TYPED, None, Windows(ids, torch.zeros(1, dtype=torch.long)), tokens)


def _read(run: Run, routed: RoutedLM, label: str, source: str, count: int) -> Domain:
    section = run.recipe.data
    if same_source(source, section.source):  # of the text that the run was trained on, test windows alone
        test = build_held_out(run.recipe, routed.backbone).test
        windows = Windows(test.input_ids[:count], test.documents[:count])
    else:
        windows = build_windows(run.recipe, routed.backbone.tokenizer, source, count=count)
    return Domain(label, source, windows, section.prompt)


def _labelled(part: str) -> tuple[str, str]:
    if "=" not in part or os.path.exists(os.path.expanduser(part)):
        return _label(part), part
    label, _, source = (word.strip() for word in part.partition("="))
    if not label or not source:
        raise DataError(f"The domain {part!r} lacks its label or its source; write label=SOURCE, or SOURCE alone.")
    return label, source


def _label(source: str) -> str:
    return Path(source).stem or source
