"""Verbs that make runs: fit and compare."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from buddy.cli.app import FAILED, Overrides, RecipeOption, app, refuse_options, split_list
from buddy.errors import BuddyError, DataError, RegistryError

if TYPE_CHECKING:
    from buddy.schema import Recipe, Rival

ALL = "all"
KINDS = ("learned", "static", "random")  # the order of `all`
TASK_OPTIONS = ("task_limit", "task_data", "task_path")
# Options of compare that change results.
RESULT_OPTIONS = ("routers", "seeds", "domains", "tasks", *TASK_OPTIONS, "trained")
Backend = Literal["loky", "ray"]
RoutersOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B[KEY=VALUE;…],…",
        help="Names, with options in brackets, or `all`; by default the recipe's router and its rivals.",
    ),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE,…",
        help="Show a comparison.json, or several as one, without new runs; writes --markdown too.",
    ),
]


@app.command(epilog="\b\nExample: buddy fit --recipe quickstart router=uniform 'rivals=[]'")
def fit(recipe: Annotated[str, RecipeOption], overrides: Overrides = None) -> None:
    """Train or calibrate a router and evaluate it."""
    from buddy.config import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.compare import fit as run_fit
    from buddy.evaluation.record import shown_command

    words = ["buddy", "fit", "--recipe", recipe, *_result_overrides(overrides or [])]
    run_fit(resolved, recipe_name(recipe), shown_command(words))


@app.command(
    epilog="\b\nExample: buddy compare --recipe quickstart --routers 'shortgpt,random[per=input]' --domains my_text.txt"
)
def compare(
    ctx: typer.Context,
    recipe: Annotated[str | None, RecipeOption] = None,
    overrides: Overrides = None,
    routers: RoutersOption = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="For each router that depends on one.", show_default="3")
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(metavar="SOURCE,…", help="More texts than the recipe's; label=SOURCE gives one a name."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs at once.")] = 1,
    backend: Annotated[Backend, typer.Option(help="Processes of this machine, or a Ray cluster.")] = "loky",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for everything.", show_default="OUTPUT/RECIPE")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="TASK,…", help="Score tasks of lm-eval too.")] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N items of each task.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with TASK.jsonl, in place of the hub.")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of your own task definitions (YAML).")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")] = True,
    finished: Annotated[
        bool, typer.Option("--finished", help="Fit nothing: compare the complete runs, each with its seeds.")
    ] = False,
    trained: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Heal the routers of an earlier comparison without fitting them again."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to this file too.")] = None,
    made: FromOption = None,
) -> None:
    """Compare routers under one recipe, with seeds, on several texts."""
    if (recipe is None) == (made is None):
        raise BuddyError("Give either --recipe, to compare routers, or --from, to show an existing comparison.")
    if made is not None:
        return _show(ctx, made, markdown, overrides or [])
    if tasks is not None and not split_list(tasks):
        raise DataError("--tasks names no task; name at least one, such as piqa, or leave it out.")
    if tasks is None:
        refuse_options(ctx, TASK_OPTIONS, "is for tasks; add --tasks, such as --tasks piqa")
    from buddy.config import load_recipe, recipe_name, recipe_path

    resolved = load_recipe(recipe, overrides or [])
    from buddy.compare import CompareConfig
    from buddy.compare import compare as run_compare
    from buddy.io import check_output_path
    from buddy.worker import Tasks

    if markdown:
        check_output_path(markdown, recipe_path(recipe))
    config = CompareConfig(
        resolved,
        recipe_name(recipe),
        command=_compare_command(ctx.params),
        routers=None if routers is None else parse_routers(routers, resolved),
        seeds=seeds,
        texts=domains,
        tasks=Tasks(tuple(split_list(tasks or "")), task_limit, task_data, task_path),
        jobs=jobs,
        backend=backend,
        out=out,
        speed=speed,
        finished=finished,
        trained=trained,
        markdown=markdown,
    )
    if run_compare(config):
        raise typer.Exit(FAILED)


def _compare_command(given: Mapping[str, Any]) -> str:
    """The command with the options that decide its results."""
    from buddy.compare import SEEDS
    from buddy.evaluation.record import shown_command

    seeds = given["seeds"] or (None if given["finished"] else SEEDS)
    values = {name: given[name] for name in RESULT_OPTIONS} | {"seeds": seeds}
    words = [word for name, value in values.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [*(["--finished"] if given["finished"] else []), *_result_overrides(given["overrides"] or [])]
    return shown_command(["buddy", "compare", "--recipe", given["recipe"], *words])


def _show(ctx: typer.Context, made: str, markdown: Path | None, overrides: list[str]) -> None:
    """Show an existing comparison; options that only a new comparison has are refused."""
    why = "belongs to a new comparison; leave it out, or give --recipe instead of --from"
    if overrides:
        raise BuddyError(f"{overrides[0]} {why}.")
    refuse_options(ctx, ctx.params.keys() - {"made", "markdown"}, why)
    from buddy.evaluation.record import show_files

    files = [made] if os.path.isfile(made) else split_list(made)  # a name may contain a comma
    if not files:
        raise BuddyError("--from is empty; name at least one comparison.json.")
    show_files([Path(each) for each in files], markdown)


def _result_overrides(overrides: list[str]) -> list[str]:
    """The overrides without the output folder, which changes no result."""
    return [each for each in overrides if not each.startswith("output=")]


def parse_routers(text: str, recipe: "Recipe") -> "list[Rival]":
    """The routers in "a,b[key=value;key=value],all".

    A key with a dot is a recipe key, as in first[optimizer.lr=3e-3]; others are options of the router. A name without
    brackets has the overrides of the recipe's rival of that name. `all` adds every installed router that works.

    Raises:
        RegistryError: nothing is named, one is named twice, or brackets or options cannot be read.
    """
    from buddy.schema import Rival

    rivals = {rival.name: rival for rival in reversed(recipe.rivals) if rival.name != recipe.router.name}
    named = _split(text, ",")
    found = [_parse(part, rivals) for part in named if part != ALL]
    labels = [each.label for each in found]
    for label in labels:
        if labels.count(label) > 1:
            raise RegistryError(f"--routers names {label} twice; name it once.")
    if ALL in named:
        others = [rivals.get(name, Rival(name)) for name in _installed(recipe)]
        found += [each for each in others if each.label not in labels]
    if not found:
        raise RegistryError("--routers is empty; name at least one, such as --routers buddy,shortgpt, or all.")
    return found


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators outside of brackets, stripped; empty ones are left out."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth < 0:
            break
        if letter == separator and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise RegistryError(
            f"The brackets in {text!r} do not match; write name[key=value;key=value], as in random[per=input]."
        )
    return [part.strip() for part in parts if part.strip()]


def _parse(text: str, rivals: "Mapping[str, Rival]") -> "Rival":
    from buddy.schema import Rival

    match = re.fullmatch(r"(?P<name>[^\[\]]+?)\s*(\[(?P<options>.*)\])?", text, re.DOTALL)
    if not match:
        raise RegistryError(f"{text!r} is not a router; write a name, or name[key=value;key=value].")
    options = _split(match["options"] or "", ";")
    if not options:
        return rivals.get(match["name"], Rival(match["name"]))
    return Rival(match["name"], tuple(_override(option, text) for option in options))


def _override(option: str, text: str) -> str:
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals or not value or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise RegistryError(f"{option!r} in {text} is not an option; write key=value, as in random[per=input].")
    return f"{key}={value}" if "." in key else f"router.options.{key}={value}"


def _installed(recipe: "Recipe") -> list[str]:
    """Names of routers that work: the recipe's own first, then by kind."""
    from buddy.registry import describe

    def place(name: str) -> tuple[bool, int, str]:
        kind = kinds[name]
        return name != recipe.router.name, KINDS.index(kind) if kind in KINDS else len(KINDS), name

    kinds = {each.name: each.kind for each in describe() if not each.problem}
    return sorted(kinds, key=place)
