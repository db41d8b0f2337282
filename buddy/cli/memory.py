"""`buddy memory`."""

from typing import Annotated, Literal

import typer

from buddy.cli.app import JsonOption, app, split_budgets

Dtype = Literal["bfloat16", "float16", "float32"]
Strategy = Literal["auto", "fsdp"]


@app.command("plan", hidden=True)  # the verb's name in 0.1
@app.command(epilog="\b\nExample: buddy memory --backbone smollm2-135m --devices 2 --strategy fsdp")
def memory(
    backbone: Annotated[
        str, typer.Option(metavar="NAME|DIR|FILE", help="A backbone's name, its folder, or a config.json alone.")
    ],
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices to train on.")] = 1,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="Budgets of the caches: 0.75 or 22layers, for example.")
    ] = None,
    window: Annotated[int, typer.Option(min=18, metavar="W", help="Tokens in a training window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Windows a step, over all devices.")] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights and the cache.")] = "bfloat16",
    strategy: Annotated[Strategy, typer.Option(help="auto copies the weights, fsdp shards them.")] = "auto",
    router: Annotated[str, typer.Option(metavar="NAME", help="An installed router.")] = "buddy",
    json: JsonOption = None,
) -> None:
    """Print how much memory training and serving take."""
    parsed = split_budgets(budgets)
    from buddy.footprint import print_memory

    print_memory(
        backbone,
        devices=devices,
        budgets=parsed,
        window=window,
        batch_size=batch_size,
        dtype=dtype,
        strategy=strategy,
        router=router,
        json_file=json,
    )
