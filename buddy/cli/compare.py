"""`buddy compare`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from buddy.cli.app import FAILED, Overrides, RecipeOption, app, refuse_options, split_list
from buddy.errors import BuddyError


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
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Processes at once.", show_default="1")] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="`ray`: runs as tasks of the cluster at RAY_ADDRESS.", show_default="loky"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for everything.", show_default="OUTPUT/RECIPE-compare")
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
        given |= {"backend": backend}
        given |= options | {"no_speed" if speed is False else "speed": speed, "finished": finished or None}
        return _show(made, markdown, overrides or [], given | {"trained": trained})
    if tasks is None:
        refuse_options(options, "is for tasks; add --tasks, such as --tasks piqa")
    from buddy.config import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.compare import Asked, Tasks
    from buddy.compare import compare as run_compare

    asked = Asked(
        resolved,
        recipe,
        recipe_name(recipe),
        overrides=tuple(overrides or ()),
        routers=routers,
        seeds=seeds,
        domains=domains,
        tasks=Tasks(tuple(split_list(tasks or "")), task_limit, task_data, task_path),
        jobs=1 if jobs is None else jobs,
        backend=backend or "loky",
        out=out,
        speed=speed is not False,
        finished=finished,
        trained=trained,
        markdown=markdown,
    )
    if run_compare(asked):
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
