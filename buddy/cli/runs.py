"""Verbs that use a run: evaluate, bench, inspect, generate, serve, export, push and pull."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from buddy.cli.app import (
    BudgetsOption,
    JsonOption,
    RunOption,
    app,
    checked_budget,
    refuse_options,
    require_one_process,
    split_budgets,
    split_list,
)
from buddy.errors import DataError

Split = Literal["test", "validation"]
DtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"] | None,
    typer.Option(help="Of the backbone, instead of the run's; auto is the faster of bfloat16 and float32."),
]
TASK_OPTIONS = ("limit", "task_data", "task_path")  # of evaluate
TEXT_OPTIONS = ("data", "split", "devices", "mean_over")


@app.command(epilog="\b\nExample: buddy evaluate --run runs/quickstart/buddy --budgets 0.75,22layers --json curve.json")
def evaluate(
    ctx: typer.Context,
    run: RunOption,
    json: JsonOption = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets", "--budget", metavar="B,B…", help="Instead of the recipe's: 0.75, 22layers, 15ms or auto."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="Text instead of the recipe's.")] = None,
    split: Annotated[Split, typer.Option(help="Which part of the recipe's text; tune on validation only.")] = "test",
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices that share the windows of text.")] = 1,
    mean_over: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Hold budgets in the mean over N tokens, instead of the recipe's way."),
    ] = None,
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
    parsed = split_budgets(budgets)
    if tasks is None:
        refuse_options(ctx, TASK_OPTIONS, "is for tasks; add --tasks, such as --tasks piqa")
        if data is not None and split != "test":
            raise DataError(f"--split {split} is for the run's own text, but --data names another; leave one out.")
        from buddy.evaluation.evaluate import evaluate_run

        evaluate_run(run, json_file=json, budgets=parsed, data=data, split=split, devices=devices, mean_over=mean_over)
        return
    refuse_options(ctx, TEXT_OPTIONS, "is for text; leave it out, or --tasks")
    require_one_process("Tasks are scored")
    from buddy.evaluation.tasks import evaluate_tasks

    evaluate_tasks(
        run,
        tasks=split_list(tasks),
        budgets=parsed,
        json_file=json,
        limit=limit,
        task_data=task_data,
        task_path=task_path,
    )


@app.command(epilog="\b\nExample: buddy bench --run runs/quickstart/buddy --budgets 0.75,0.5 --json speed.json")
def bench(
    run: RunOption,
    json: JsonOption = None,
    budgets: BudgetsOption = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Measurements of each model.")] = 7,
    serve: Annotated[bool, typer.Option("--serve", help="Time batches of 1 to 32 texts instead.")] = False,
) -> None:
    """Time a run against the dense and the physically pruned model."""
    parsed = split_budgets(budgets)
    if serve:
        from buddy.evaluation.bench_serve import bench_serving

        return bench_serving(run, json_file=json, budgets=parsed, rounds=rounds)
    from buddy.evaluation.bench import bench_run

    bench_run(run, json_file=json, budgets=parsed, rounds=rounds)


@app.command(epilog="\b\nExample: buddy inspect --run runs/quickstart/buddy --budgets 0.75 --text 'To be or not'")
def inspect(
    run: RunOption,
    budgets: BudgetsOption = None,
    domains: Annotated[
        str | None,
        typer.Option(metavar="SOURCE,…", help="Texts instead of the recipe's; label=SOURCE gives one a name."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Inspect only this text, token by token.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Windows of each domain at most.", show_default="16")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the results, instead of the run's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there as JSON.")] = None,
) -> None:
    """Show which layers run for which token, per budget and text."""
    parsed = split_budgets(budgets)
    from buddy.inspection.inspect import inspect_run

    inspect_run(run, budgets=parsed, domains=domains, text=text, windows=windows, out=out, json_file=json)


@app.command(epilog='\b\nExample: buddy generate --run runs/quickstart/buddy --budget 0.75 "The state of the union is"')
def generate(
    run: RunOption,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "--budgets",
            metavar="B",
            help="0.75, 22layers, 15ms a token, or auto.",
            callback=checked_budget,
        ),
    ],
    prompt_budget: Annotated[
        str | None,
        typer.Option(
            metavar="B", help="Of the prompt's tokens, where it differs, such as 1.0.", callback=checked_budget
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draws above temperature 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    dtype: DtypeOption = None,
) -> None:
    """Continue a prompt at one budget."""
    from buddy.hub.load import generate as run_generate

    run_generate(
        run,
        prompt=prompt,
        budget=budget,
        prompt_budget=prompt_budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        dtype=dtype,
    )


@app.command(epilog="\b\nExample: buddy serve --run runs/quickstart/buddy --budget 0.75")
def serve(
    run: RunOption,
    budget: Annotated[
        str,
        typer.Option(
            metavar="B", help="Where a request names none: 0.75, 22layers and so on.", callback=checked_budget
        ),
    ] = "1.0",
    prompt_budget: Annotated[
        str | None,
        typer.Option(metavar="B", help="Of prompts, where a request names none, such as 1.0.", callback=checked_budget),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Of this machine; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Most texts at the same time.")] = 8,
    batch_plan: Annotated[
        Literal["shared", "row"] | None,
        typer.Option(
            help="One plan for all texts of a batch (shared), or one for each (row); row where routing.mean_over is "
            "above 1, else shared."
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Most texts that wait.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most new tokens of a text.")] = 4096,
    seconds: Annotated[float, typer.Option(min=1.0, metavar="S", help="Most seconds of a request.")] = 600.0,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, one a line; without it none is needed.")
    ] = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a run over OpenAI's HTTP interface, each request at its own budget."""
    from buddy.serve.server import serve as run_serve

    run_serve(
        run,
        budget=budget,
        prompt_budget=prompt_budget,
        host=host,
        port=port,
        api_key_file=api_key_file,
        batch_plan=batch_plan,
        dtype=dtype,
        batch=batch_size,
        queue=queue,
        tokens=max_tokens,
        seconds=seconds,
    )


@app.command(epilog="\b\nExample: buddy export --run plain/quickstart/shortgpt --budget 0.75 --out shortgpt-22layers")
def export(
    run: RunOption,
    budget: Annotated[
        str, typer.Option(metavar="B", help="A fraction such as 0.75, or 22layers.", callback=checked_budget)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text to choose the plan on instead of the recipe's.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the checkpoint's logits with the engine's, in float32.")
    ] = True,
) -> None:
    """Cut the backbone to one plan, for stock transformers."""
    from buddy.hub.export import export_run

    export_run(run, budget=budget, out=out, data=data, check=check)


@app.command(epilog="\b\nExample: buddy push --run runs/quickstart/buddy --to ./shared")
def push(
    run: RunOption,
    to: Annotated[str, typer.Option(metavar="REPO|DIR", help="owner/name on the hub, or a folder to make.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Of the router's weights, such as apache-2.0.")
    ] = None,
) -> None:
    """Publish a run to a folder or the hub."""
    from buddy.hub.push_pull import push as run_push

    run_push(run, to=to, private=private, licence=license)


@app.command(epilog="\b\nExample: buddy pull ./shared --out pulled")
def pull(
    source: Annotated[str, typer.Argument(metavar="REPO|DIR", help="owner/name on the hub, or a folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder to make.")],
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A branch, tag or commit on the hub.")] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="The backbone on this machine, if its recipe names another.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the run to use Python code of its backbone's repository.")
    ] = False,
) -> None:
    """Download a pushed run as a run folder."""
    from buddy.hub.push_pull import pull as run_pull

    run_pull(source, out=out, revision=revision, backbone=backbone, trust_remote_code=trust_remote_code)
