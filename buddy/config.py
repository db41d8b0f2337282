"""Recipes: how they are found, read, overridden, checked and saved; `buddy.schema` declares their keys.

OmegaConf reads files, parses overrides and resolves interpolations. `problems` finds all mistakes in values at once.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from buddy.errors import RecipeError, did_you_mean
from buddy.schema import KEYWORDS, Recipe, Rival, RouterSection, leaves, problems, section_of, unknown_key
from buddy.values import converted, shown, spelled

FOLDER = Path(__file__).parent / "recipes"
LARGEST = 2**20  # bytes of a recipe file
MOST_VALUES = 10_000  # in a file or an override, with all aliases expanded
Nested = dict[Any, Any]
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError)
# What a rival may override, but for keys that all routers share.
OWN_KEYS = ("router.options.", "routing.", "objective.", "optimizer.", "bridge", "adapter", "trainer.")
# The same for all routers.
MACHINE_KEYS = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
RENAMED = {  # keys of Buddy 0.1
    "trainer.nodes": "trainer.num_nodes",
    "trainer.log_every": "trainer.log_every_n_steps",
    "trainer.checkpoint_every": "checkpoint_every",
    "trainer.ckpt_path": "ckpt_path",
    "optimizer.clip": "trainer.gradient_clip_val",
}
REMOVED = ("optimizer.lr_by_router", "adapter.rates")  # keys of Buddy 0.1, ignored where they are empty


# Reading and overriding


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, saved: bool = False) -> Recipe:
    """The recipe of a name or file with `key=value` overrides.

    `router=NAME` means `router.name=NAME`. Another router than the file's starts from empty options, since options
    belong to one router. A file may refer to its own keys, as in `${data.window}`.

    Args:
        source: the name of an installed recipe, or a file.
        overrides: applied in order.
        saved: the file belongs to a run, perhaps a downloaded one: references are refused, and nobody here has
            accepted a licence by it.

    Raises:
        RecipeError: no such recipe, not YAML, or mistakes in it; the message lists all of them.
    """
    path, what = recipe_path(source), f"The recipe {source}"
    recipe = _composed(lambda: _read(path), overrides, what, references=not saved, to_fit=not saved)
    return replace(recipe, backbone=replace(recipe.backbone, accept_license=False)) if saved else recipe


def override(recipe: Recipe, overrides: Sequence[str], what: str) -> Recipe:
    """The recipe with `key=value` overrides, applied in order.

    Args:
        what: the subject of the error message.

    Raises:
        RecipeError: mistakes in the overrides; the message lists all of them.
    """
    return _composed(lambda: asdict(recipe), overrides, what)


def with_router(recipe: Recipe, rival: Rival) -> Recipe:
    """The recipe for one router with its overrides; another router than the recipe's starts from empty options.

    Raises:
        RecipeError: mistakes in the overrides, or one of a key that all routers share.
    """
    keys = {text: RENAMED.get(key := text.partition("=")[0], key) for text in rival.overrides}
    if shared := [text for text, key in keys.items() if not key.startswith(OWN_KEYS) or key.startswith(MACHINE_KEYS)]:
        raise RecipeError(
            f"{rival.label} overrides what all routers share ({', '.join(shared)}); it may override keys of "
            "router.options, routing, objective, optimizer, bridge, adapter and most of trainer."
        )
    router = recipe.router if rival.name == recipe.router.name else RouterSection(rival.name)
    alone = replace(recipe, router=router, rivals=[])
    if rival.overrides:
        alone = override(alone, rival.overrides, f"The router {rival.label}")
    return replace(alone, rivals=recipe.rivals)


def _composed(
    read: Callable[[], Nested], overrides: Sequence[str], what: str, *, references: bool = False, to_fit: bool = True
) -> Recipe:
    """A checked recipe from nested values, which may refer to one another, and overrides; `to_fit` as in `problems`."""
    try:
        mistakes: list[str] = []
        values = _overridden(_current(read()), list(_changes(overrides, mistakes)), references)
        recipe: Recipe = _build(Recipe, values, "", mistakes)
        mistakes += problems(recipe, to_fit=to_fit)
        mistakes += [] if mistakes else [text for rival in recipe.rivals for text in _rival_problems(recipe, rival)]
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply; write it with fewer brackets.") from error
    except UNREADABLE as error:
        raise RecipeError(f"{what} cannot be used: {_reason(error)}; correct it there.") from error
    if len(mistakes) > 1:
        raise RecipeError(f"{what} has {len(mistakes)} mistakes:" + "".join(f"\n  - {each}" for each in mistakes))
    if mistakes:
        raise RecipeError(f"{what} has a mistake: {mistakes[0]}")
    return recipe


def _rival_problems(recipe: Recipe, rival: Rival) -> Iterator[str]:
    try:
        with_router(recipe, rival)
    except RecipeError as error:
        yield f"rivals: {error}"


def _changes(overrides: Sequence[str], mistakes: list[str]) -> Iterator[Nested]:
    """Nested values of each `key=value`, read as YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if "[" in key:
            mistakes.append(f"{text!r} reaches into a list; give the whole list, as in budgets=[1.0,0.5].")
        elif not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or not equals:
            mistakes.append(f"{text!r} is not an override; write key=value, as in trainer.max_steps=50.")
        elif "${" in value:
            mistakes.append(f"{key} contains ${{…}}, which only a recipe file may; write the value itself.")
        else:
            try:
                _check_nodes(yaml.compose(value, yaml.SafeLoader))
                yield _current(_plain(OmegaConf.from_dotlist([text])))
            except UNREADABLE as error:
                mistakes.append(f"The value of {key} cannot be read ({_reason(error)}); check quotes and brackets.")


def _overridden(values: Nested, changes: Sequence[Nested], references: bool) -> Nested:
    """Defaults, the values and the changes, merged leaf by leaf."""
    values = _merged(asdict(Recipe()), values)
    names = [name for change in changes if (name := _at(change, "router").get("name")) is not None]
    if names and names[-1] != _at(values, "router").get("name"):
        _at(values, "router")["options"] = {}
    for change in changes:
        values = _merged(values, change)
    if references:
        config = OmegaConf.create(values)
        OmegaConf.resolve(config)
        values = _plain(config)
    return values


def _merged(base: Nested, part: Nested) -> Nested:
    """`part` merged over `base`, where OmegaConf.merge would stop at the first value of another type."""
    both = {k for k, value in part.items() if isinstance(value, dict) and isinstance(base.get(k), dict)}
    return {**base, **{k: _merged(base[k], value) if k in both else value for k, value in part.items()}}


def _build(kind: type, values: Mapping[Any, Any], prefix: str, mistakes: list[str]) -> Any:
    """A dataclass from nested values; unknown keys are added to `mistakes`."""
    hints = {item.name: item.type for item in fields(kind)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name, hint = f"{prefix}{key}", hints.get(key)
        section, items = section_of(hint), get_args(hint)[:1] if get_origin(hint) is list else ()
        if hint is None:
            mistakes.append(unknown_key(name, key, list(hints)))
        elif any(map(is_dataclass, items)) and isinstance(value, list):
            parts = [(f"{name}[{number}].", each) for number, each in enumerate(value)]
            given[key] = [_build(items[0], e, p, mistakes) if isinstance(e, Mapping) else e for p, e in parts]
        elif section is None or (value is None and hint is not section):
            given[key] = converted(value, hint)
        elif isinstance(value, Mapping):
            given[key] = _build(section, value, f"{name}.", mistakes)
        else:
            inner = ", ".join(item.name for item in fields(section))
            mistakes.append(f"{name} is a section with the keys {inner}, not {shown(value)}.")
    if isinstance(trainer := given.get("trainer"), Mapping):
        known = {key: KEYWORDS[key].type if key in KEYWORDS else None for key in trainer}
        given["trainer"] = {key: converted(value, known[key]) for key, value in trainer.items()}
    elif "trainer" in given:
        mistakes.append(f"trainer must be a mapping of keywords, not {shown(given.pop('trainer'))}.")
    return kind(**given)


def _current(part: Nested) -> Nested:
    """Part of a recipe with short forms expanded and keys of Buddy 0.1 translated."""
    if isinstance(part.get("router"), str):
        part["router"] = {"name": part["router"]}
    if isinstance(_at(part, "adapter").get("targets"), str):
        part["adapter"]["targets"] = [part["adapter"]["targets"]]
    if isinstance(part.get("rivals"), list):
        part["rivals"] = [{"name": each} if isinstance(each, str) else each for each in part["rivals"]]
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if key in _at(part, section):
            value = part[section].pop(key)
            *parents, name = new.split(".")
            where = part.setdefault(parents[0], {}) if parents else part
            if isinstance(where, dict):
                where[name] = (value or None) if key == "clip" else value
    for section, _, key in (name.partition(".") for name in REMOVED):
        if not _at(part, section).get(key, True):
            part[section].pop(key)
    return part


def _at(values: Mapping[Any, Any], section: str) -> Nested:
    """The mapping of a section; an empty one where there is none."""
    found = values.get(section)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> Nested:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise RecipeError(f"The recipe {path} has {size} bytes, too many for a recipe; give a YAML file.")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read as text ({error}); give a YAML file.") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise RecipeError(f"The recipe {path} is empty; start from `buddy recipes copy quickstart`.")
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"The recipe {path} is not a mapping; write one `key: value` a line.")
        _check_nodes(root)
        return _plain(OmegaConf.create(text))
    except UNREADABLE as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {_reason(error)}; correct it there.") from error


def _plain(config: Any) -> Nested:
    """The values of an OmegaConf container in dicts and lists; MissingMandatoryValue for `???`."""
    found: Nested = OmegaConf.to_container(config, throw_on_missing=True)
    return found


def _check_nodes(root: yaml.Node | None) -> None:
    """Raises ValueError for a `${…}` with a resolver, and for aliases (`&a`, `*a`) that expand to too many values."""
    nodes, count = [root] if root else [], 0
    while nodes:
        value, count = nodes.pop().value, count + 1
        if count > MOST_VALUES:
            raise ValueError(f"its aliases expand to more than {MOST_VALUES} values")
        if isinstance(value, str) and _has_resolver(value):
            raise ValueError("${…} may only name a key of the recipe")
        for child in () if isinstance(value, str) else value:
            nodes += child if isinstance(child, tuple) else (child,)


def _has_resolver(text: str) -> bool:
    """Whether a text has a `${name:…}`, also one whose name is a reference itself, as in `${oc.${key}:HOME}`."""
    while (rest := re.sub(r"\$\{[^{}:]*\}", "", text)) != text:
        text = rest
    return re.search(r"\$\{[^}]*:", text) is not None


def _reason(error: Exception) -> str:
    """The error of YAML or OmegaConf on one line, with its line number where known."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    return f"line {mark.line + 1}: {reason}" if mark else reason


# Finding and saving


def installed_recipes() -> dict[str, Path]:
    """The files of the recipes that come with Buddy, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_path(source: str | Path, *, files: bool = True) -> Path:
    """The file of an installed recipe's name or, with `files`, of a path.

    Raises:
        RecipeError: neither exists.
    """
    text, installed = str(source), installed_recipes()
    if text in installed:
        return installed[text]
    if files and os.path.isfile(text):
        return Path(text)
    if files and os.path.isdir(text):
        raise RecipeError(f"{text} is a folder; give the recipe's file in it.")
    beside = [path.name for path in Path().glob("*.y*ml")] if files else []
    hint = did_you_mean(recipe_name(source), [*installed, *beside])
    known, kind = f"installed are {', '.join(installed)}", "recipe" if files else "installed recipe"
    known += ", or give the path of a YAML file" * files
    raise RecipeError(f"There is no {kind} {text!r} ({known}){hint or '.'}")


def recipe_name(source: str | Path) -> str:
    """The name of a recipe in run folders: its file's name without .yaml."""
    return re.sub(r"\.ya?ml$", "", os.path.basename(str(source)))


def to_yaml(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back to an equal recipe."""
    rivals = [asdict(rival) if rival.overrides else rival.name for rival in recipe.rivals]
    text: str = OmegaConf.to_yaml(OmegaConf.create({**asdict(recipe), "rivals": rivals}))
    return text


def flatten(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Scalars by dotted key, as comparison.json keeps a recipe; other values as YAML text."""
    values = {key: value for key, value, _ in leaves(recipe)}
    values["rivals"] = [rival.label for rival in recipe.rivals]
    values["callbacks"] = [f"{spec.class_path}({spelled(spec.init_args)})" for spec in recipe.callbacks]
    options = {f"router.options.{name}": option for name, option in values.pop("router.options").items()}
    scalars = (bool, int, float, str)
    both = {**values, **options}.items()
    return {key: value if isinstance(value, scalars) else spelled(value) for key, value in both}
