"""`buddy generate`."""

from typing import Annotated

import typer

from buddy.cli.app import RunOption, app


@app.command(epilog='\b\nExample: buddy generate --run runs/quickstart/buddy --budget 0.75 "The state of the union is"')
def generate(
    run: RunOption,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    budget: Annotated[str, typer.Option(metavar="B", help="0.75, 22layers, 15ms a token, or auto.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the draws above temperature 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
) -> None:
    """Write on from a prompt at one budget."""
    from buddy.hub.load import generate as run_generate

    run_generate(
        run,
        prompt=prompt,
        budget=budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
