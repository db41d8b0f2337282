"""The application that verbs register with, its errors, and what several verbs share."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from buddy.budget import check_budget
from buddy.errors import BuddyError, BudgetError

MULTI_PROCESS = ("fit", "evaluate")  # verbs that several processes of torchrun do together
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
RESUME = {
    "fit": " Repeat the command to resume.",
    "compare": " Repeat the command to resume: finished runs stay, and training resumes from its last checkpoint.",
}


class Verbs(TyperGroup):
    """Ends commands on errors: a `BuddyError` prints one sentence and exits with 2, Ctrl-C with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BuddyError, KeyboardInterrupt) as error:
            from buddy import distributed

            if isinstance(error, KeyboardInterrupt):
                if distributed.is_global_zero():
                    typer.echo(f"\nStopped.{RESUME.get(ctx.invoked_subcommand, '')}", err=True)
                raise typer.Exit(INTERRUPTED) from error
            if prefix := distributed.error_prefix():
                typer.echo(f"{prefix}: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from error


PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(cls=Verbs, no_args_is_help=True, epilog="\b\nExample: buddy fit --recipe quickstart", **PLAIN)

RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="A run folder, such as runs/quickstart/buddy.")]
BudgetsOption = Annotated[
    str | None,
    typer.Option("--budgets", "--budget", metavar="B,B…", help="Instead of the recipe's: 0.75, 22layers or 15ms."),
]
JsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to this file as JSON.")]
RecipeOption = typer.Option(metavar="NAME|FILE", help="A recipe's name (`buddy recipes`) or file.")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that override the recipe's.")]


def checked_budget(text: str | None) -> str | None:
    """The value of an option that takes one budget, refused before a model is loaded where none could have it."""
    if text is not None:
        check_budget(text)
    return text


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_budgets(text: str | None) -> list[str] | None:
    """The budgets of --budgets, checked as far as it goes without a model; None where it was not given."""
    if text is None:
        return None
    budgets = split_list(text)
    if not budgets:
        raise BudgetError("--budgets is empty; name at least one, such as --budgets 0.75,0.5.")
    for budget in budgets:
        check_budget(budget)
    return budgets


def refuse_options(ctx: typer.Context, names: Collection[str], why: str) -> None:
    """Raise `BuddyError` for the first of these parameters that the command line has."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if name in names and source is not None and source.name == "COMMANDLINE":
            spellings = parameter.secondary_opts if ctx.params[name] is False else parameter.opts
            raise BuddyError(f"{spellings[0]} {why}.")


def require_one_process(what: str) -> None:
    """Raise `BuddyError` if torchrun started several processes for a verb that needs one."""
    from buddy import distributed

    launched = distributed.torchrun_world_size()
    if launched > 1:
        raise BuddyError(
            f"{what} by one process, not by {launched}; run the command without torchrun (which fit and evaluate "
            "support; compare has --jobs)."
        )
