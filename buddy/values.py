"""Checks of plain values against type hints and bounds, and how messages show values and types."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from buddy.errors import did_you_mean

TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    int | None: "a whole number or null",
    float | None: "a number or null",
    list[float]: "a list of numbers",
    list[str]: "a list of names",
    dict[str, Any]: "a mapping of names to values",
    tuple[str, ...]: "a list of key=value texts",
}
BOUNDS = (("ge", operator.ge, "at least"), ("gt", operator.gt, "above"), ("le", operator.le, "at most"))


def problem(key: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> str | None:
    """What is wrong with a value, as one sentence; None if nothing is.

    Args:
        key: the subject of the sentence.
        value: plain data, or lists of dataclasses of plain data.
        hint: the type.
        bounds: `ge`, `gt`, `le`, `choices`, or `pattern` with an `example`, which apply to each item of a list;
            `unique` and `least_items`, which apply to the list.
    """
    inside = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {}
    for name, each in (inside | {key: value}).items():
        if sentence := flaw(each):
            return f"{name} {sentence}"
    if not fits(value, hint):
        quotes = "; put it in quotes" if isinstance(value, bool | int | float) and fits("", hint) else ""
        return f"{key} must be {type_words(hint)}, not {shown(value)}{quotes}."
    if not isinstance(value, list | tuple):
        return _out_of_bounds(key, value, bounds)
    if len(value) < bounds.get("least_items", 0):
        return f"{key} is empty; list at least one."
    if bounds.get("unique") and (twice := [each for each in value if value.count(each) > 1]):
        return f"{key} contains {getattr(twice[0], 'label', twice[0])} more than once; name it once."
    inner: list[str | None] = []
    for number, each in enumerate(value):
        name = f"{key}[{number}]"
        parts = fields(each) if is_dataclass(each) else ()
        inner += [problem(f"{name}.{part.name}", getattr(each, part.name), part.type, part.metadata) for part in parts]
        inner += [] if parts else [_out_of_bounds(name, each, bounds)]
    return next(filter(None, inner), None)


def _out_of_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    choices, pattern = bounds.get("choices"), bounds.get("pattern")
    if choices and value not in choices:
        return f"{key} cannot be {value!r} (accepted: {', '.join(choices)}){did_you_mean(value, choices) or '.'}"
    if isinstance(value, str) and not value.strip():
        return f"{key} is empty; give it a value or leave it out."
    if pattern and not re.fullmatch(pattern, value):
        return f"{key} is {shown(value)}, but must be of the form {bounds['example']}."
    for bound, holds, words in BOUNDS if isinstance(value, int | float) else ():
        if bound in bounds and not holds(value, bounds[bound]):
            return f"{key} is {value}, but must be {words} {bounds[bound]}."
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; true and false are no numbers, and a number is no text."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind in (list, tuple):
        return isinstance(value, kind) and all(fits(each, parts[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(each, parts[1]) for k, each in value.items())
    if hint in (bool, int, float, str):
        return type(value) is hint
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def converted(value: Any, hint: Any) -> Any:
    """A float for a whole number where the type is a float, an int for 1e3 where it is an int; all else as it is."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (list, tuple) and isinstance(value, list):
        return kind(converted(each, parts[0]) for each in value)
    kinds = parts or (hint,)
    if float in kinds and type(value) is int and value.bit_length() < 1000:
        return float(value)
    return int(value) if int in kinds and isinstance(value, float) and value.is_integer() else value


def flaw(value: Any) -> str | None:
    """Why a recipe cannot contain a value, as the end of a sentence; None for plain data."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if is_dataclass(value):
        value = [getattr(value, part.name) for part in fields(value)]
    if isinstance(value, list | tuple):
        return next((sentence for each in value if (sentence := flaw(each))), None)
    if isinstance(value, str):
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
            return f"is {shown(value)}, which has a character that no file can contain; remove it."
        return "contains ${…}; write the value itself." if "${" in value else None
    if isinstance(value, int) and value.bit_length() > 3000:
        return "has a thousand digits or more; give a smaller number."
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, but must be a finite number."
    return None if isinstance(value, bool | int | float | None) else f"is a {type(value).__name__}, not plain data."


def type_words(hint: Any) -> str:
    """A type as messages name it."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if parts and all(get_origin(part) is Literal for part in parts):
        return f"one of {', '.join(dict.fromkeys(str(each) for part in parts for each in get_args(part)))}"
    plain = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return TYPES.get(hint) or re.sub(r"<class '(\w+)'>|typing\.|(?:\w+\.)+(?=[A-Z])", r"\1", plain)


def shown(value: Any) -> str:
    """A value as a recipe spells it, on one line and cut to 60 characters."""
    text = spelled(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def spelled(value: Any) -> str:
    """A value as a recipe spells it, on one line."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    except (yaml.YAMLError, ValueError):  # not plain data, or a number too long to print
        text = f"a {type(value).__name__}"
    return " ".join(text.removesuffix("\n...\n").split())
