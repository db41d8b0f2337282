"""`buddy plan`."""

from typing import Annotated, Literal

import typer

from buddy.cli.app import JsonOption, app
from buddy.cli.words import budgets_of

Dtype = Literal["bfloat16", "float16", "float32"]
Strategy = Literal["auto", "fsdp"]


@app.command(epilog="\b\nExample: buddy plan --backbone smollm2-135m --devices 2 --strategy fsdp")
def plan(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR|FILE", help="A backbone's name, its folder, or a config.json alone.")
    ],
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices to train on.")] = 1,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="Whose cache is shown: 0.75 or 22layers, say.")
    ] = None,
    window: Annotated[int, typer.Option(min=18, metavar="W", help="Tokens in a training window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Windows a step, over all devices.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights and the cache.")] = "bfloat16",
    strategy: Annotated[Strategy, typer.Option(help="auto copies the weights, fsdp shares them out.")] = "auto",
    router: Annotated[str, typer.Option(metavar="NAME", help="An installed router.")] = "buddy",
    json: JsonOption = None,
) -> None:
    """Say how much memory training and serving take."""
    asked = budgets_of(budgets)
    from buddy.footprint import plan_memory

    plan_memory(
        backbone,
        devices=devices,
        budgets=asked,
        window=window,
        batch_size=batch_size,
        dtype=dtype,
        strategy=strategy,
        router=router,
        json_file=json,
    )
