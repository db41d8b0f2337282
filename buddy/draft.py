"""A recipe in the making: file and overrides laid over the schema, with everything wrong noted on the way."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from textwrap import shorten
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from buddy.errors import RecipeError, nearest
from buddy.schema import AdapterSection, Recipe, impossible_values, leaves, section_of, storable

NOT_PLAIN = "holds ${…}, but a recipe takes plain values only; write the value itself."
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError)
DIGITS = 1000  # of a whole number
MOST = 10_000  # values in a file or an override, those that an alias repeats counted as often as they stand there
_MISFITS = (OmegaConfBaseException, TypeError, ValueError, OverflowError)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    int | None: "a whole number or null",
    list[float]: "a list of numbers",
    list[str]: "a list of names",
    dict[str, Any]: "a mapping such as {hidden: 64}",
    dict[str, float]: "a mapping of routers to numbers",
}
_SUCH_AS = {  # for lists and mappings of one kind
    "budgets": "[1.0, 0.5]",
    "rivals": "[uniform, random]",
    "adapter.rates": "[1.0e-2, 3.0e-3]",
    "optimizer.lr_by_router": "{buddy: 0.003}",
    "adapter.targets": "[q_proj, v_proj]",
    "data.train_sources": "[more.jsonl, notes.txt]",
    "data.calibration_sources": "[more.jsonl, notes.txt]",
}


class Draft:
    """Holds a recipe's configuration so far and what is wrong with it."""

    def __init__(self) -> None:
        self.config: DictConfig = OmegaConf.structured(Recipe)
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()

    def merge(self, part: Mapping[Any, Any]) -> None:
        """Lay a nested mapping over the draft; what does not fit is noted and left out."""
        self._merge(_spelt_out(part), Recipe, self.config, "")

    def override(self, overrides: Sequence[str]) -> None:
        """Lay `key=value` texts over the draft, each after the one before it."""
        parts = list(self._parts(overrides))
        names = [name for part in parts if (name := _router_name(part)) is not None]
        before = None if OmegaConf.is_missing(self.config.router, "name") else self.config.router.name
        if names and names[-1] != before:
            with read_write(self.config.router):
                self.config.router.options = {}
        if any("lr" in _section(part, "optimizer") for part in parts):  # a rate that is asked for is for all
            with read_write(self.config.optimizer):
                self.config.optimizer.lr_by_router = {}
        for part in parts:
            self.merge(part)

    def finish(self, what: str) -> Recipe:
        """The finished recipe, or all mistakes of `what` in one RecipeError."""
        try:
            recipe: Recipe = OmegaConf.to_object(self.config)
        except MissingMandatoryValue as error:
            self.mistakes.append(f"{error.full_key} holds ???; write its value.")
        else:
            self.mistakes += [text for keys, text in impossible_values(recipe) if not keys & self.wrong]
        if len(self.mistakes) > 1:
            lines = "".join(f"\n  - {mistake}" for mistake in self.mistakes)
            raise RecipeError(f"{what} has {len(self.mistakes)} mistakes:{lines}")
        if self.mistakes:
            raise RecipeError(f"{what} has a mistake: {self.mistakes[0]}")
        return recipe

    def _merge(self, part: Mapping[Any, Any], schema: type, node: DictConfig, prefix: str) -> None:
        hints = {item.name: item.type for item in fields(schema)}
        for key, value in part.items():
            name, hint = f"{prefix}{key}", hints.get(key)
            section = section_of(hint)
            if hint is None:
                self.mistakes.append(_unknown_key(name, key, list(hints)))
            elif section is None or (value is None and hint is not section):
                self._set(node, key, name, value, hint)
            elif isinstance(value, Mapping):
                if node[key] is None:  # one that may be left out begins with its defaults
                    self._set_section(node, key, section)
                self._merge(value, section, node[key], f"{name}.")
            else:
                inner = ", ".join(item.name for item in fields(section))
                self._note(name, f"{name} is a section with the keys {inner}, not {shown(value)}.")

    @staticmethod
    def _set_section(node: DictConfig, key: str, section: type) -> None:
        with read_write(node):
            node[key] = OmegaConf.structured(section)

    def _set(self, node: DictConfig, key: str, name: str, value: Any, hint: Any) -> None:
        if "${" in str(value):
            return self._note(name, f"{name} {NOT_PLAIN}")
        if not storable(value):
            return self._note(name, f"{name} is {shown(value)}, which holds a sign that no file can; write it without.")
        if hint is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # YAML reads 1e3 as a float
        try:
            _refuse_objects(value)
            _refuse_lost_spelling(value, hint)
            with read_write(node):
                OmegaConf.update(node, key, value, merge=True)
        except _MISFITS:
            lost = hint in (str, str | None) and isinstance(value, bool | int | float)
            advice = "; put it in quotes" if lost else ""
            example = f" such as {_SUCH_AS[name]}" if name in _SUCH_AS else ""
            self._note(name, f"{name} must be {_WORDS[hint]}{example}, not {shown(value)}{advice}.")

    def _parts(self, overrides: Sequence[str]) -> Iterator[Mapping[Any, Any]]:
        for text in overrides:
            try:
                yield _parse(text)
            except RecipeError as error:
                self.mistakes.append(str(error))

    def _note(self, key: str, sentence: str) -> None:
        self.wrong.add(key)
        self.mistakes.append(sentence)


def shown(value: Any) -> str:
    """A value as a recipe spells it, on one line and not too long."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    except yaml.YAMLError:  # of a kind that no recipe can hold
        text = str(value)
    text = " ".join(text.removesuffix("\n...\n").split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def yaml_reason(error: Exception) -> str:
    """What YAML or OmegaConf found wrong, on one line, with the line where it is known."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {reason}" if mark else reason


def refuse_repeats(root: yaml.Node | None) -> None:
    """Raises ValueError where aliases (`&a`, `*a`) make a small text stand for very many values or endless ones."""
    if root is not None and _size(root, {}) > MOST:
        raise ValueError(f"its aliases stand for more than {MOST} values")


def plain(value: Any) -> Any:
    """A value as OmegaConf read it, in lists and mappings; ValueError for a number too long to be shown to anybody."""
    value = OmegaConf.to_container(value)
    if _longest(value) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return value


def _parse(text: str) -> Mapping[Any, Any]:
    """{"a": {"b": value}} of "a.b=value"; values are read as YAML."""
    key, equals, value = text.partition("=")
    if "[" in key:
        raise RecipeError(f"{text!r} reaches into a list; give the whole list, as in budgets=[1.0,0.5].")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"{text!r} is not an override; write key=value without blanks, as in trainer.max_steps=50.")
    if not equals:
        raise RecipeError(f"{text!r} has no value; write {text}=VALUE.")
    if "${" in value:
        raise RecipeError(f"{key} {NOT_PLAIN}")
    try:
        refuse_repeats(yaml.compose(value, yaml.SafeLoader))
        parsed: Mapping[Any, Any] = plain(OmegaConf.from_dotlist([text]))
        return parsed
    except UNREADABLE as error:
        reason = yaml_reason(error)
        raise RecipeError(f"The value of {key} cannot be read ({reason}); check its quotes and brackets.") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, with all aliases written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands in what it refers to")
        return known[id(node)]
    known[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _longest(value: Any) -> float:
    """Digits of the longest whole number in a value."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return max(map(_longest, value), default=0)
    return value.bit_length() * math.log10(2) if isinstance(value, int) else 0


def _refuse_objects(value: Any) -> None:
    """Tags such as `!!binary` make values that are neither text nor numbers."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _refuse_objects(item)
    elif not isinstance(value, bool | int | float | str | None):
        raise TypeError


def _refuse_lost_spelling(value: Any, hint: Any) -> None:
    """OmegaConf turns any scalar into text, but YAML has already read `1e5` as a number and `on` as true."""
    if hint == list[str] and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise TypeError
    if hint == list[float] and isinstance(value, list) and any(isinstance(item, list | Mapping) for item in value):
        raise TypeError  # which OmegaConf lets pass
    if hint in (str, str | None) and value is not None and not isinstance(value, str):
        raise TypeError


def _spelt_out(part: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The long form of what may be said in one word: a router by its name alone, one target of an adapter."""
    if isinstance(part.get("router"), str):
        part = {**part, "router": {"name": part["router"]}}
    adapter = part.get("adapter")
    if isinstance(adapter, Mapping) and isinstance(adapter.get("targets"), str):
        part = {**part, "adapter": {**adapter, "targets": [adapter["targets"]]}}
    return part


def _router_name(part: Mapping[Any, Any]) -> Any:
    router = part.get("router")
    return router.get("name") if isinstance(router, Mapping) else router


def _section(part: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    section = part.get(name)
    return section if isinstance(section, Mapping) else {}


def _unknown_key(name: str, key: Any, accepted: list[str]) -> str:
    paths = [path for path, *_ in leaves(Recipe(adapter=AdapterSection()))]
    elsewhere = " or ".join(repr(path) for path in paths if path.endswith(f".{key}"))
    if elsewhere:
        return f"The key '{name}' is unknown; did you mean {elsewhere}?"
    hint = nearest(str(key), accepted) or nearest(name, paths)
    name = shorten(name, 60, placeholder="…")
    return f"The key '{name}' is unknown{hint or '; accepted here are ' + ', '.join(accepted) + '.'}"
