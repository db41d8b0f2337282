"""`buddy evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from buddy.cli.app import JsonOption, RunOption, app, refuse_options, require_one_process, split_budgets, split_list
from buddy.errors import DataError

Split = Literal["test", "validation"]


@app.command(epilog="\b\nExample: buddy evaluate --run runs/quickstart/buddy --budgets 0.75,22layers --json curve.json")
def evaluate(
    run: RunOption,
    json: JsonOption = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="B,B…", help="Budgets instead of the recipe's: 0.75, 22layers, 15ms or auto."),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Text instead of the recipe's.")] = None,
    split: Annotated[Split, typer.Option(help="Which part of the recipe's text; tune on validation only.")] = "test",
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices that share the windows of text.")] = 1,
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
    asked = split_budgets(budgets)
    options: dict[str, Any] = {"limit": limit, "task_data": task_data, "task_path": task_path}
    if tasks is None:
        refuse_options(options, "is for tasks; add --tasks, such as --tasks piqa")
        if data is not None and split != "test":
            raise DataError(f"--split {split} is of the run's own text, and --data names another; leave one out.")
        from buddy.evaluation.evaluate import evaluate_run

        evaluate_run(run, json_file=json, budgets=asked, data=data, split=split, devices=devices)
        return
    texts = {"data": data, "split": None if split == "test" else split, "devices": None if devices == 1 else devices}
    refuse_options(texts, "is for text; leave it out, or --tasks")
    require_one_process("Tasks are scored")
    from buddy.evaluation.tasks import evaluate_tasks

    evaluate_tasks(run, tasks=split_list(tasks), budgets=asked, json_file=json, **options)
