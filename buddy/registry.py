"""Names → classes of routers and estimators, by the entry points of installed packages.

Reading the list imports nothing; loading a name imports one module. Built-in classes are entry points too.
"""

import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from buddy.errors import BuddyError, RegistryError, described, did_you_mean, raised
from buddy.values import type_words

if TYPE_CHECKING:
    from buddy.router import AnyRouter, Geometry

ROUTERS, ESTIMATORS = "buddy.routers", "buddy.estimators"  # groups of entry points
RESERVED = ("all", "false", "no", "null", "off", "on", "tensorboard", "true", "yes")  # YAML, command line and folders
_NOUNS = {ROUTERS: "router", ESTIMATORS: "estimator"}
_PLAIN = {int, float, bool, str, type(None)}  # types of options that are checked


@dataclass(frozen=True)
class Description:
    """One row of `buddy routers`; `problem` explains why the router cannot be used and is empty otherwise."""

    name: str
    distribution: str
    summary: str = ""
    kind: str = ""
    source: str = ""
    problem: str = ""


def installed() -> list[EntryPoint]:
    """Every announced router, by name and then distribution; nothing is imported."""
    return sorted(entry_points(group=ROUTERS), key=lambda entry: (entry.name, owner(entry)))


def owner(entry: EntryPoint) -> str:
    """The name of the distribution that announces a class; empty for "my_module:MyRouter"."""
    return entry.dist.name if entry.dist else ""


def load(name: str, group: str = ROUTERS) -> Any:
    """The class of an installed name or of "my_module:MyRouter", which may be in the current folder.

    Raises:
        RegistryError: unknown, announced twice, cannot be imported, or not a class of that group.
    """
    return _import(find(name, group))


def find(name: str, group: str = ROUTERS) -> EntryPoint:
    """The entry of an installed name or of "my_module:MyRouter"; nothing is imported.

    Raises:
        RegistryError: unknown, announced twice, or a reserved word.
    """
    entries, noun = entry_points(group=group), _NOUNS[group]
    matches = [entry for entry in entries if entry.name == name]
    if not matches and ":" not in name:
        names = sorted({entry.name for entry in entries})
        hint = did_you_mean(name, names) or "."
        known = f"Installed: {', '.join(names) or 'none'}; one of your own is module:Class."
        raise RegistryError(f"No {noun} is named {name!r}{hint} {known}")
    if not matches and not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise RegistryError(f"No {noun} can be named {name!r}; write module:Class, as in my_module:MyClass.")
    if len(matches) > 1:
        owners = " and ".join(sorted(repr(owner(entry)) for entry in matches))
        raise RegistryError(f"Two {noun}s are named {name!r}, from {owners}; uninstall one of these distributions.")
    if matches and name in RESERVED:
        raise RegistryError(f"No {noun} can be named {name!r}, which is reserved; rename it in {owner(matches[0])!r}.")
    return matches[0] if matches else EntryPoint(name, name, group)


def build(name: str, geometry: "Geometry", options: Mapping[str, Any]) -> "AnyRouter":
    """A router made with a recipe's options, which are the keyword arguments of its class.

    Raises:
        RegistryError: `load` fails, an option is unknown, missing or of the wrong type (all named at once), or the
            class refuses a value.
    """
    return make(load(name), name, geometry, options)


def make(cls: "type[AnyRouter]", name: str, geometry: "Geometry", options: Mapping[str, Any]) -> "AnyRouter":
    """`build` for a class that is loaded already; `name` is what it is called in errors."""
    _checked(cls, f"The router {name!r}")
    mistakes = _option_mistakes(cls, options)
    if mistakes:
        raise RegistryError(f"The options of router {name!r} do not fit: {' '.join(mistakes)}")
    try:
        return cls(geometry, **options)
    except BuddyError:
        raise
    except Exception as error:  # a router may raise anything
        why = described(error) if isinstance(error, (TypeError, ValueError, RuntimeError)) else raised(error, cls)
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        what = f"router.options ({given})" if given else "this backbone"
        raise RegistryError(f"The router {name!r} cannot be made with {what}: {why}.") from error


def describe() -> list[Description]:
    """Every announced router with the metadata of its class, or the reason why it is broken."""
    rows = []
    for entry in installed():
        try:
            cls = load(entry.name)
        except RegistryError as error:
            rows.append(Description(entry.name, owner(entry), problem=str(error)))
        else:
            summary = (cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
            rows.append(Description(entry.name, owner(entry), summary, str(cls.kind), str(cls.source)))
    return rows


def _import(entry: EntryPoint) -> Any:
    distribution = owner(entry)
    subject = f"The {_NOUNS[entry.group]} {entry.name!r}" + (
        f" of distribution {distribution!r}" if distribution else ""
    )
    if not distribution and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing in the folder hides an installed module
    try:
        cls = entry.load()
    except (Exception, SystemExit) as error:  # plug-ins may raise anything
        advice = "fix or uninstall it" if distribution else "check its spelling and fix the module"
        own, read = Path(f"{entry.module}.py"), getattr(sys.modules.get(entry.module), "__file__", None)
        if not distribution and read and own.exists() and not own.samefile(read):
            advice = f"{read} was read and not {own}, which needs another name"
        raise RegistryError(f"{subject} cannot be imported ({described(error)}); {advice}.") from error
    return _checked(cls, subject, entry.group)


def _checked(cls: Any, subject: str, group: str = ROUTERS) -> Any:
    from buddy.router import LayerwiseRouter, Router

    if group == ESTIMATORS:
        if not (isinstance(cls, type) and any("__call__" in vars(base) for base in cls.__mro__)):
            raise RegistryError(f"{subject} is not an estimator; make it a class with a method __call__.")
        return cls
    if not (isinstance(cls, type) and issubclass(cls, Router | LayerwiseRouter)):
        raise RegistryError(f"{subject} is not a router; make it a subclass of buddy.Router or buddy.LayerwiseRouter.")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise RegistryError(f"{subject} is unfinished; write its method {missing}.")
    return cls


def _option_mistakes(cls: type, options: Mapping[str, Any]) -> list[str]:
    parameters = dict(list(inspect.signature(cls).parameters.items())[1:])  # the first is the geometry
    named = {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(cls)
    accepted = f"accepted are {', '.join(named)}" if named else "it takes none"
    mistakes = []
    for key, value in options.items():
        if key not in named and not anything:
            mistakes.append(f"router.options.{key} is unknown{did_you_mean(key, named) or f'; {accepted}.'}")
        elif not _fits(value, hints.get(key)):
            mistakes.append(f"router.options.{key} must be {type_words(hints[key])}, not {value!r}.")
    needed = [key for key, p in named.items() if p.default is p.empty and key not in options]
    return mistakes + [f"router.options.{key} is missing; give it a value." for key in needed]


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)  # type: ignore[misc]  # of this very class
    except Exception:  # annotations may name what only a type checker imports
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """False only where a plain annotation (int, float, bool, str, None and unions of them) rules the value out."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return not _PLAIN.issuperset(members) or type(value) in members or (type(value) is int and float in members)
