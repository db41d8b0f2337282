"""The application that verbs register with, and how it ends where something was wrong."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from buddy import distributed
from buddy.errors import BuddyError

VERBS = (  # in the order of --help; each is a module of this package
    *("fit", "compare", "evaluate", "bench", "inspect", "generate"),
    *("export", "push", "pull", "plan", "routers", "recipes"),
)
TOGETHER = ("fit", "evaluate")  # what several processes do
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
ONWARD = {
    "fit": " Repeat the command to go on from the last checkpoint.",
    "compare": " Repeat the command to go on: what is finished stays, and a training goes on from its last checkpoint.",
}


class Verbs(TyperGroup):
    """Ends with one plain sentence where a person made a mistake or pressed Ctrl-C."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=VERBS.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BuddyError as error:
            if distributed.prints_errors():
                typer.echo(f"Error{distributed.rank_suffix()}: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from error
        except KeyboardInterrupt as error:
            if distributed.is_global_zero():
                typer.echo(f"\nStopped.{ONWARD.get(ctx.invoked_subcommand, '')}", err=True)
            raise typer.Exit(INTERRUPTED) from error


PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    context_settings=HELP,
    epilog="\b\nExample: buddy fit --recipe quickstart",
    **PLAIN,
)

RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="A run folder, such as runs/quickstart/buddy.")]
BudgetsOption = Annotated[
    str | None, typer.Option(metavar="B,B…", help="Budgets instead of the recipe's: 0.75, 22layers or 15ms.")
]
JsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there as JSON.")]
RecipeOption = typer.Option(metavar="NAME|FILE", help="A recipe's name (`buddy recipes`) or file.")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values laid over the recipe.")]
