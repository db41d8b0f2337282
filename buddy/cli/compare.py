"""`buddy compare`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buddy.cli.app import FAILED, Overrides, RecipeOption, app, refuse_options, split_list
from buddy.errors import BuddyError, RegistryError

if TYPE_CHECKING:
    from buddy.schema import Recipe, Rival

ALL = "all"
KINDS = ("learned", "static", "random")  # the order of `all`
OPENING, CLOSING = "[{(", "]})"


@app.command(
    epilog="\b\nExample: buddy compare --recipe quickstart --routers 'shortgpt,random[per=input]' --domains my_text.txt"
)
def compare(
    recipe: Annotated[str | None, RecipeOption] = None,
    overrides: Overrides = None,
    routers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B[KEY=VALUE;…],…",
            help="Names, with options in brackets, or `all`; by default the recipe's router and its rivals.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="For each router that depends on one.", show_default="3")
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(metavar="SOURCE,…", help="Texts beside the recipe's own; label=SOURCE gives one a name."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Runs at once.", show_default="1")] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="loky|ray", help="Processes of this machine, or a Ray cluster.", show_default="loky"),
    ] = None,
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
    speed: Annotated[
        bool | None, typer.Option("--speed/--no-speed", help="Measure tokens a second.", show_default="speed")
    ] = None,
    finished: Annotated[
        bool, typer.Option("--finished", help="Fit nothing: compare the runs that are finished, each with its seeds.")
    ] = False,
    trained: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Heal the routers of an earlier comparison, which are not fitted again."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there too.")] = None,
    made: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE,…",
            help="Show a comparison.json, or several as one, and write --markdown, without any work.",
        ),
    ] = None,
) -> None:
    """Compare routers under one recipe, with seeds, on several texts."""
    if (recipe is None) == (made is None):
        raise BuddyError("Give either --recipe, to compare routers, or --from, to show a comparison that was made.")
    options = {"task_limit": task_limit, "task_data": task_data, "task_path": task_path}
    if made is not None:
        given = {"routers": routers, "seeds": seeds, "domains": domains, "jobs": jobs, "out": out, "tasks": tasks}
        given |= (
            {"backend": backend}
            | options
            | {"no_speed" if speed is False else "speed": speed, "finished": finished or None}
        )
        return _show(made, markdown, overrides or [], given | {"trained": trained})
    if tasks is None:
        refuse_options(options, "is for tasks; add --tasks, such as --tasks piqa")
    from buddy.config import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.compare import SEEDS, CompareConfig
    from buddy.compare import compare as run_compare
    from buddy.evaluation.record import shown_command
    from buddy.worker import Tasks

    decisive = {"routers": routers, "seeds": seeds or (None if finished else SEEDS), "domains": domains, "tasks": tasks}
    decisive |= {"task-limit": task_limit, "task-data": task_data, "task-path": task_path, "trained": trained}
    spelt = [word for name, value in decisive.items() if value for word in (f"--{name}", str(value))]
    spelt += ["--finished"] if finished else []
    spelt += [each for each in overrides or () if not each.startswith("output=")]
    config = CompareConfig(
        resolved,
        recipe_name(recipe),
        command=shown_command(["buddy", "compare", "--recipe", recipe, *spelt]),
        routers=None if routers is None else parse_routers(routers, resolved),
        seeds=seeds,
        texts=domains,
        tasks=Tasks(tuple(split_list(tasks or "")), task_limit, task_data, task_path),
        jobs=1 if jobs is None else jobs,
        backend=backend or "loky",
        out=out,
        speed=speed is not False,
        finished=finished,
        trained=trained,
        markdown=markdown,
    )
    if run_compare(config):
        raise typer.Exit(FAILED)


def _show(made: str, markdown: Path | None, overrides: list[str], given: dict[str, object]) -> None:
    """Show a comparison that was made; what only a new one can take is refused."""
    why = "belongs to a new comparison; leave it out, or give --recipe in place of --from"
    if overrides:
        raise BuddyError(f"{overrides[0]} {why}.")
    refuse_options(given, why)
    from buddy.evaluation.report import show_files

    files = [made] if os.path.isfile(made) else split_list(made)  # a name may hold a comma
    if not files:
        raise BuddyError("--from is empty; name at least one comparison.json.")
    show_files([Path(each) for each in files], markdown)


def parse_routers(text: str, recipe: "Recipe") -> "list[Rival]":
    """The routers in "a,b[key=value;key=value],all".

    A key with a dot is a recipe's, as in first[optimizer.lr=3e-3]; one without is an option of the router. A name alone
    has the overrides of the recipe's rival of that name. `all` adds every installed router that works.

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
    parts, open_brackets = [""], []
    for letter in text:
        if letter in OPENING:
            open_brackets.append(CLOSING[OPENING.index(letter)])
        elif letter in CLOSING and (not open_brackets or open_brackets.pop() != letter):
            open_brackets = [""]
            break
        if letter == separator and not open_brackets:
            parts.append("")
        else:
            parts[-1] += letter
    if open_brackets:
        raise RegistryError(
            f"The brackets in {text!r} do not match; write name[key=value;key=value], as in random[per=input]."
        )
    return [part.strip() for part in parts if part.strip()]


def _parse(text: str, rivals: "Mapping[str, Rival]") -> "Rival":
    from buddy.schema import Rival

    match = re.fullmatch(r"(?P<name>[^\[\]]+?)\s*(\[(?P<options>.*)\])?", text, re.DOTALL)
    if not match:
        raise RegistryError(f"{text!r} is no router; write a name, or name[key=value;key=value].")
    options = _split(match["options"] or "", ";")
    if not options:
        return rivals.get(match["name"], Rival(match["name"]))
    return Rival(match["name"], tuple(_override(option, text) for option in options))


def _override(option: str, text: str) -> str:
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals or not value or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise RegistryError(f"{option!r} in {text} is no option; write key=value, as in random[per=input].")
    return f"{key}={value}" if "." in key else f"router.options.{key}={value}"


def _installed(recipe: "Recipe") -> list[str]:
    """Names of routers that work: the recipe's own first, then by kind."""
    from buddy.registry import describe

    kinds = {each.name: each.kind for each in describe() if not each.problem}
    return sorted(kinds, key=lambda name: (name != recipe.router.name, (*KINDS, kinds[name]).index(kinds[name]), name))
