"""`buddy bench`."""

from typing import Annotated

import typer

from buddy.cli.app import BudgetsOption, JsonOption, RunOption, app, split_budgets


@app.command(epilog="\b\nExample: buddy bench --run runs/quickstart/buddy --budgets 0.75,0.5 --json speed.json")
def bench(
    run: RunOption,
    json: JsonOption = None,
    budgets: BudgetsOption = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often each contender runs.")] = 7,
) -> None:
    """Time a run against the dense and the physically pruned model."""
    asked = split_budgets(budgets)
    from buddy.evaluation.bench import bench_run

    bench_run(run, json_file=json, budgets=asked, rounds=rounds)
