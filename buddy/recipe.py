"""Find, load and save recipes. What a recipe may say stands in schema.py, how it is put together in draft.py."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from buddy.draft import NOT_PLAIN, UNREADABLE, Draft, plain, refuse_repeats, shown, yaml_reason
from buddy.errors import RecipeError, nearest
from buddy.schema import Recipe, RouterSection, leaves
from buddy.signals import deferred

FOLDER = Path(__file__).parent / "recipes"
LARGEST = 2**20  # bytes of a file that may be a recipe


@dataclass(frozen=True)
class Listed:
    """An installed recipe: its name, the first line of its comment, its file."""

    name: str
    summary: str
    path: Path


def list_recipes() -> list[Listed]:
    """The recipes that come with Buddy, by name."""
    return [Listed(path.stem, _first_comment(path), path) for path in sorted(FOLDER.glob("*.yaml"))]


def recipe_path(source: str | Path) -> Path:
    """The file of an installed recipe's name or of a path.

    Raises:
        RecipeError: neither exists.
    """
    text, installed = str(source), {recipe.name: recipe.path for recipe in list_recipes()}
    if text in installed:
        return installed[text]
    if os.path.isfile(text):
        return Path(text)
    if os.path.isdir(text):
        raise RecipeError(f"{text} is a folder; give the recipe's file in it.")
    hint = nearest(recipe_name(source), installed)
    known = f"installed are {', '.join(installed)}, or give the path of a YAML file"
    kind = "file" if re.search(r"\.ya?ml$", text) or os.sep in text else "named"
    raise RecipeError(f"There is no recipe {kind} {text!r} ({known}){hint or '.'}")


def copy_recipe(source: str | Path, destination: Path) -> Path:
    """Copy a recipe to a file, or under its own name into a folder; the path written.

    Raises:
        RecipeError: no such recipe, the file exists, or it cannot be written.
    """
    path = recipe_path(source)
    target = destination / path.name if os.path.isdir(destination) else destination
    text = path.read_text("utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                target.unlink(missing_ok=True)  # half of it would bar the way of a second try
                raise
    except FileExistsError as error:
        raise RecipeError(f"{target} exists and is not overwritten; name another file.") from error
    except OSError as error:
        raise RecipeError(f"{target} cannot be written ({error.strerror}); name another place.") from error
    return target


def recipe_name(source: str | Path) -> str:
    """The name under which runs of a recipe are kept: its file's name without .yaml."""
    return re.sub(r"\.ya?ml$", "", os.path.basename(str(source)))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a name or file with `key=value` overrides laid over it.

    `router=NAME` stands for `router.name=NAME`. A router other than the file's starts from empty options, since
    options belong to one router. An override of `optimizer.lr` is for all routers: those rates of the file that are
    for one alone go.

    Raises:
        RecipeError: no such recipe, not YAML, or mistakes in it; all mistakes are named, one a line.
    """
    path = recipe_path(source)
    return _finished(lambda: _read(path), overrides, f"The recipe {source}")


def override(recipe: Recipe, overrides: Sequence[str], what: str) -> Recipe:
    """A recipe with `key=value` overrides laid over it, as `load_recipe` lays them over a file.

    Args:
        what: named at the beginning of the error's sentence.

    Raises:
        RecipeError: mistakes in them; all are named, one a line.
    """
    return _finished(lambda: asdict(recipe), overrides, what)


@deferred()  # OmegaConf makes a KeyError of a Ctrl-C that comes while it fills a list
def to_yaml(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back to an equal recipe."""
    text: str = OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))
    return text


def flatten(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Dotted keys to scalars, for TensorBoard's table of hyperparameters; all else as a recipe spells it."""
    values = {key: value for key, value, _ in leaves(recipe)}
    options = {f"router.options.{name}": option for name, option in values.pop("router.options").items()}
    scalars = (bool, int, float, str)
    return {key: value if isinstance(value, scalars) else shown(value) for key, value in {**values, **options}.items()}


def with_router(recipe: Recipe, name: str) -> Recipe:
    """The recipe for one router, at that router's learning rate; another than its own has its default options."""
    router = recipe.router if name == recipe.router.name else RouterSection(name)
    lr = recipe.optimizer.lr_by_router.get(name, recipe.optimizer.lr)
    return replace(recipe, router=router, optimizer=replace(recipe.optimizer, lr=lr, lr_by_router={}))


@deferred()
def _finished(read: Callable[[], Mapping[Any, Any]], overrides: Sequence[str], what: str) -> Recipe:
    try:
        draft = Draft()
        draft.merge(read())
        draft.override(overrides)
        return draft.finish(what)
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply; write it with fewer brackets.") from error


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise RecipeError(f"The recipe {path} has {size} bytes, which no recipe has; give a YAML file.")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read as text ({error}); give a YAML file.") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise RecipeError(f"The recipe {path} is empty; start from `buddy recipes copy quickstart`.")
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"The recipe {path} is not a mapping; write one `key: value` a line.")
        refuse_repeats(root)
        values: Mapping[Any, Any] = plain(OmegaConf.create(text))
        return values
    except GrammarParseError as error:
        raise RecipeError(f"The recipe {path} {NOT_PLAIN}") from error
    except UNREADABLE as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {yaml_reason(error)}; mend it there.") from error


def _first_comment(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")
