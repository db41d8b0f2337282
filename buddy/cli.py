"""The command line: parse, call, print. Everything heavy is imported inside the verb that needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from buddy import __version__
from buddy.errors import BuddyError, BudgetError

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
ONWARD = {
    "fit": " Repeat the command to go on from the last checkpoint.",
    "compare": " Repeat the command to go on: what is finished stays, and a training goes on from its last checkpoint.",
}
Split = Literal["test", "validation"]


class Verbs(TyperGroup):
    """Ends with one plain sentence where a person made a mistake or pressed Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BuddyError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from error
        except KeyboardInterrupt as error:
            typer.echo(f"\nStopped.{ONWARD.get(ctx.invoked_subcommand, '')}", err=True)
            raise typer.Exit(INTERRUPTED) from error


_PLAIN = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    context_settings=_HELP,
    epilog="\b\nExample: buddy fit --recipe quickstart",
    **_PLAIN,
)
recipes_app = typer.Typer(invoke_without_command=True, context_settings=_HELP, **_PLAIN)
app.add_typer(recipes_app, name="recipes", epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")

RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="A run folder, such as runs/quickstart/buddy.")]


def main() -> None:
    """The `buddy` command."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"buddy {__version__}")
        raise typer.Exit


@app.callback()
def _buddy(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Dynamic depth for language models: one router, every compute budget."""


@app.command(epilog="\b\nExample: buddy fit --recipe quickstart router=uniform 'rivals=[]'")
def fit(
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="A recipe's name (`buddy recipes`) or file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values laid over the recipe.")
    ] = None,
) -> None:
    """Train or calibrate a router and evaluate it."""
    from buddy.recipe import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.training.fit import fit as run_fit

    run_fit(resolved, recipe_name(recipe))


@app.command(
    epilog="\b\nExample: buddy compare --recipe quickstart --routers 'shortgpt,random[per=input]' --domains my_text.txt"
)
def compare(
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A recipe's name (`buddy recipes`) or file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values laid over the recipe.")
    ] = None,
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
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there too.")] = None,
    made: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Show a comparison.json, and write --markdown, without any work."),
    ] = None,
) -> None:
    """Hold routers against each other under one recipe, with seeds, on several texts."""
    if (recipe is None) == (made is None):
        raise BuddyError("Give either --recipe, to compare routers, or --from, to show a comparison that was made.")
    options = {"task_limit": task_limit, "task_data": task_data, "task_path": task_path}
    if made is not None:
        given = {"routers": routers, "seeds": seeds, "domains": domains, "jobs": jobs, "out": out, "tasks": tasks}
        given |= options | {"no_speed" if speed is False else "speed": speed}
        why = "belongs to a new comparison; leave it out, or give --recipe in place of --from"
        if overrides:
            raise BuddyError(f"{overrides[0]} {why}.")
        _refuse(given, why)
        from buddy.comparison.compare import rewrite

        return rewrite(made, markdown)
    if tasks is None:
        _refuse(options, "is for tasks; add --tasks, such as --tasks piqa")
    from buddy.recipe import load_recipe, recipe_name

    resolved = load_recipe(recipe, overrides or [])
    from buddy.comparison.asked import SEEDS, Asked, Tasks
    from buddy.comparison.compare import compare as run_compare

    asked = Asked(
        resolved,
        recipe,
        recipe_name(recipe),
        overrides=tuple(overrides or ()),
        routers=routers,
        seeds=SEEDS if seeds is None else seeds,
        domains=domains,
        tasks=Tasks(tuple(_words(tasks or "")), task_limit, task_data, task_path),
        jobs=1 if jobs is None else jobs,
        out=out,
        speed=speed is not False,
        markdown=markdown,
    )
    if run_compare(asked):
        raise typer.Exit(FAILED)


@app.command(epilog="\b\nExample: buddy evaluate --run runs/quickstart/buddy --budgets 0.75,22layers --json curve.json")
def evaluate(
    run: RunOption,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there as JSON.")] = None,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="Budgets instead of the recipe's: 0.75 or 22layers.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Text instead of the recipe's.")] = None,
    split: Annotated[Split, typer.Option(help="Which part of the recipe's text; tune on validation only.")] = "test",
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,…", help="Score tasks of lm-eval instead: piqa,arc_easy.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of tasks: the first N items of each.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of tasks: a folder with TASK.jsonl, in place of the hub.")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of tasks: a folder of your own definitions (YAML).")
    ] = None,
) -> None:
    """Measure a run on held-out text, or on tasks, at every budget."""
    asked = None if budgets is None else _split(budgets)
    options = {"limit": limit, "task_data": task_data, "task_path": task_path}
    if tasks is None:
        _refuse(options, "is for tasks; add --tasks, such as --tasks piqa")
        from buddy.evaluation.evaluate import evaluate_run

        evaluate_run(run, json_file=json, budgets=asked, data=data, split=split)
        return
    _refuse({"data": data, "split": None if split == "test" else split}, "is for text; leave it out, or --tasks")
    from buddy.evaluation.tasks import evaluate_tasks

    evaluate_tasks(run, tasks=_words(tasks), budgets=asked, json_file=json, **options)


@app.command(epilog="\b\nExample: buddy bench --run runs/quickstart/buddy --budgets 0.75,0.5 --json speed.json")
def bench(
    run: RunOption,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there as JSON.")] = None,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="Budgets instead of the recipe's: 0.75 or 22layers.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often each contender runs.")] = 7,
) -> None:
    """Time a run against the dense and the physically pruned model."""
    asked = None if budgets is None else _split(budgets)
    from buddy.evaluation.bench import bench_run

    bench_run(run, json_file=json, budgets=asked, rounds=rounds)


@app.command(epilog="\b\nExample: buddy inspect --run runs/quickstart/buddy --budgets 0.75 --text 'To be or not'")
def inspect(
    run: RunOption,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", "--budget", metavar="B,B…", help="Instead of the recipe's: 0.75 or 22layers."),
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(metavar="SOURCE,…", help="Texts instead of the recipe's; label=SOURCE gives one a name."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Look at this text alone, token by token.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Windows of each domain at most.", show_default="16")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for all that is written, instead of the run's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there as JSON.")] = None,
) -> None:
    """Show which layers run for which token, per budget and text."""
    asked = None if budgets is None else _split(budgets)
    from buddy.inspection.inspect import inspect_run

    inspect_run(run, budgets=asked, domains=domains, text=text, windows=windows, out=out, json_file=json)


@app.command(epilog='\b\nExample: buddy generate --run runs/quickstart/buddy --budget 0.75 "The state of the union is"')
def generate(
    run: RunOption,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    budget: Annotated[str, typer.Option(metavar="B", help="A fraction such as 0.75, or 22layers.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draws above temperature 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
) -> None:
    """Write on from a prompt at one budget."""
    from buddy.serve import generate as run_generate

    run_generate(
        run,
        prompt=prompt,
        budget=budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )


@app.command(epilog="\b\nExample: buddy routers")
def routers() -> None:
    """List the installed routers, and why one cannot be used."""
    from buddy.registry import describe

    rows = [(d.name, d.kind or "broken", d.problem or d.summary, d.source, d.distribution) for d in describe()]
    _print_table(("name", "kind", "what it does", "source", "distribution"), rows)


@recipes_app.callback()
def _recipes(ctx: typer.Context) -> None:
    """List, show or copy the recipes that come with Buddy."""
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list", epilog="\b\nExample: buddy recipes list")
def list_recipes() -> None:
    """List the recipes (as `buddy recipes` alone does)."""
    from buddy.recipe import list_recipes as listed

    _print_table(("name", "what it is"), [(recipe.name, recipe.summary) for recipe in listed()])


@recipes_app.command(epilog="\b\nExample: buddy recipes show quickstart")
def show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe with its comments."""
    from buddy.recipe import recipe_path

    typer.echo(recipe_path(name).read_text("utf-8"), nl=False)


@recipes_app.command(epilog="\b\nExample: buddy recipes copy quickstart mine.yaml")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path | None, typer.Argument(metavar="DEST", help="File or folder.")] = None,
) -> None:
    """Copy a recipe to a new file of your own."""
    from buddy.recipe import copy_recipe

    target = copy_recipe(name, destination or Path())
    typer.echo(f"Wrote {target}; run it with: buddy fit --recipe {target}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise BuddyError(f"--{name.replace('_', '-')} {why}.")


def _split(budgets: str) -> list[str]:
    asked = _words(budgets)
    if not asked:
        raise BudgetError("--budgets is empty; name at least one, such as --budgets 0.75,0.5.")
    return asked


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # into a pipe or file: one line a row, whatever its length
    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
    console.print(table)
