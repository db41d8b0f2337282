"""The tables of keys in docs/recipes.md: key, type and default come from the schema, meanings from the page."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from buddy.schema import COMPLETE, leaves
from buddy.values import shown, type_words

ROW = re.compile(r"^\| `([\w.]+)` \|.*\| (.*) \|$")


class Key(NamedTuple):
    """One key of a recipe as the page shows it."""

    name: str
    kind: str
    default: str


def keys() -> Iterator[Key]:
    """All keys of a recipe, in the order of the schema."""
    for name, value, item in leaves(COMPLETE):
        yield Key(name, _kind(item.type, item.metadata), shown(value))


def written(page: str) -> str:
    """The page with its tables of keys regenerated, in the order of the schema, without keys that sections lost.

    Raises:
        ValueError: a key has no row, and so no meaning, yet.
    """
    known = {key.name: key for key in keys()}
    sections = {name.partition(".")[0] for name in known}
    lines: list[str] = []
    there: set[str] = set()
    for ours, group in groupby(page.split("\n"), lambda line: _named(line).partition(".")[0] in sections):
        rows = list(group)
        if ours:
            meanings = {match[1]: match[2] for row in rows if (match := ROW.match(row))}
            there |= meanings.keys()
            rows = [
                f"| `{k.name}` | {k.kind} | `{k.default}` | {meanings[n]} |" for n, k in known.items() if n in meanings
            ]
        lines += rows
    if missing := [name for name in known if name not in there]:
        raise ValueError(f"docs/recipes.md has no row for {', '.join(missing)}; add | `KEY` | | | meaning | there.")
    return "\n".join(lines)


def _named(line: str) -> str:
    match = ROW.match(line)
    return match[1] if match else ""


def _kind(hint: Any, bounds: Any) -> str:
    choices = ", ".join(f"`{name}`" for name in bounds.get("choices", ()))
    signs = (f"{sign} {bounds[bound]}" for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤")) if bound in bounds)
    return " ".join([choices or type_words(hint).removeprefix("a "), *signs])
