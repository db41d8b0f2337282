"""Which routers take part: names, with options where one router stands in several rows."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from buddy.config import Recipe, override, with_router
from buddy.errors import RegistryError
from buddy.registry import describe

ALL = "all"
OPENING, CLOSING = "[{(", "]})"
KINDS = ("learned", "static", "random")  # the order of `all`


@dataclass(frozen=True)
class Contestant:
    """A router with options, one row of the tables.

    Attributes:
        name: an installed name or "my_module:MyRouter".
        options: "key=value" texts, laid over the options that the recipe has for this router.
    """

    name: str
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`name`, or `name[key=value;key=value]`."""
        return f"{self.name}[{';'.join(self.options)}]" if self.options else self.name

    @property
    def folder(self) -> str:
        """The label as a folder's name; where signs had to go, a digest of it keeps two labels apart."""
        spelt = self.label.replace("[", "_", 1).replace(";", ",").removesuffix("]")
        plain = re.sub(r"[^\w.=,-]+", "-", spelt).strip(".")
        return plain if plain == spelt else f"{plain}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe with this router, at its own learning rate where the recipe has one for it.

        Raises:
            RecipeError: an option that no recipe could hold.
        """
        options = [f"router.options.{option}" for option in self.options]
        own = override(base, [f"router.name={json.dumps(self.name)}", *options], f"The router {self.label}")
        return with_router(own, self.name)


def contestants(text: str | None, recipe: Recipe) -> list[Contestant]:
    """Those in "a,b[key=value;key=value],all"; without a text the recipe's router and its rivals.

    `all` stands for every installed router that can be used and is not named beside it.

    Raises:
        RegistryError: nothing is named, one is named twice, or brackets or options cannot be read.
    """
    named = [recipe.router.name, *recipe.rivals] if text is None else split_outside(text, ",")
    named = list(dict.fromkeys(named)) if text is None else named
    found = [_parse(part) for part in named if part != ALL]
    labels = [each.label for each in found]
    for label in labels:
        if labels.count(label) > 1:
            raise RegistryError(f"--routers names {label} twice; name it once.")
    if ALL in named:
        found += [Contestant(name) for name in _installed(recipe) if name not in labels]
    if not found:
        raise RegistryError("--routers is empty; name at least one, such as --routers buddy,shortgpt, or all.")
    return found


def split_outside(text: str, sign: str) -> list[str]:
    """The parts between signs that stand in no brackets, without the blanks around them; empty ones are left out.

    Raises:
        RegistryError: a bracket is not closed, or not opened.
    """
    parts, depth = [""], []
    for letter in text:
        if letter in OPENING:
            depth.append(CLOSING[OPENING.index(letter)])
        elif letter in CLOSING and (not depth or depth.pop() != letter):
            depth = [""]
            break
        if letter == sign and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise RegistryError(
            f"The brackets in {text!r} do not match; write name[key=value;key=value], as in random[per=input]."
        )
    return [part.strip() for part in parts if part.strip()]


def _parse(text: str) -> Contestant:
    match = re.fullmatch(r"(?P<name>[^\[\]]+?)\s*(\[(?P<options>.*)\])?", text, re.DOTALL)
    if not match:
        raise RegistryError(f"{text!r} is no router; write a name, or name[key=value;key=value].")
    options = split_outside(match["options"] or "", ";")
    return Contestant(match["name"], tuple(_option(option, text) for option in options))


def _option(option: str, text: str) -> str:
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals or not value or not re.fullmatch(r"[A-Za-z_]\w*", key):
        raise RegistryError(f"{option!r} in {text} is no option; write key=value, as in random[per=input].")
    return f"{key}={value}"


def _installed(recipe: Recipe) -> list[str]:
    """Usable names: the recipe's own first, then by kind."""
    kinds = {each.name: each.kind for each in describe() if not each.problem}
    return sorted(kinds, key=lambda name: (name != recipe.router.name, (*KINDS, kinds[name]).index(kinds[name]), name))
