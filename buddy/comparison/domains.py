"""The texts of a comparison: the recipe's own test windows, and others cut alike."""

from __future__ import annotations

import re
from dataclasses import dataclass

from buddy.build import build_windows
from buddy.config import Recipe
from buddy.data.module import TextData
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.errors import DataError
from buddy.inspection.routing import sources_of


@dataclass(frozen=True)
class Domain:
    """A text by its label; `own` is the recipe's, of which the test windows are taken."""

    label: str
    source: str
    own: bool = False


def domains_of(text: str | None, recipe: Recipe) -> list[Domain]:
    """The recipe's own text and those in "SOURCE,label=SOURCE,…"; its own may be named too, to give it a label.

    Raises:
        DataError: nothing is named, two have one label, or a label cannot be a file's name.
    """
    source = recipe.data.source
    (own,) = sources_of(None, source)
    others = {} if text is None else sources_of(text, source)
    for label in [label for label, other in others.items() if same_source(other, source)]:
        own = label
        del others[label]
    if own in others:
        raise DataError(
            f"Two domains are called {own!r}, one of them the recipe's own text; give the other a name, as in "
            f"--domains other={others[own]}."
        )
    found = [Domain(own, source, own=True), *(Domain(label, other) for label, other in others.items())]
    for each in found:
        for key in ("train_sources", "calibration_sources"):
            if any(same_source(each.source, seen) for seen in getattr(recipe.data, key)):
                raise DataError(
                    f"The domain {each.label} is learned from (data.{key}) and would tell nothing; leave it out of "
                    "--domains or of the recipe."
                )
        if not re.fullmatch(r"[\w.-]+", each.label):
            raise DataError(
                f"The domain {each.label!r} would be a file's name; give it one of letters, digits, dots and hyphens, "
                f"as in --domains other={each.source}."
            )
    return found


def read_domain(domain: Domain, recipe: Recipe, data: TextData) -> Windows:
    """The windows of a text: `data.test_windows` of `data.window` tokens, drawn with the data's seed.

    Raises:
        DataError: the text cannot be read, or another text than the recipe's is too short.
    """
    if domain.own:
        return data.test
    section = recipe.data
    windows = build_windows(recipe, data.tokenizer, domain.source, count=section.test_windows)
    if len(windows) < section.test_windows:
        raise DataError(
            f"The text in {domain.source} gives {len(windows)} windows of {section.window} tokens, and "
            f"data.test_windows asks for {section.test_windows}; give more text, or set data.test_windows="
            f"{len(windows)}."
        )
    return windows
