"""`buddy generate`: text from a finished run, streamed, at the budget asked for."""

from __future__ import annotations

from pathlib import Path

from transformers import TextStreamer

from buddy.build import load_model
from buddy.console import errors, status
from buddy.hub.load import Model, check_options
from buddy.run import read_run


def generate(
    folder: Path,
    *,
    prompt: str,
    budget: str = "1.0",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> None:
    """Stream a continuation to standard output, then say on the error stream what ran.

    Args:
        folder: a finished run.
        prompt: text to continue, or to answer with `chat`.
        budget: a fraction, a count such as "22layers", a latency such as "15ms" a token, or "auto".
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token, above 0 samples.
        seed: of the sampling.
        chat: put the prompt into the model's chat template.

    Raises:
        BuddyError: the run, the budget or the prompt cannot be used.
    """
    run = read_run(folder)
    check_options(prompt, max_new_tokens, temperature)
    with status(f"Loading {run.backbone} …"):
        model = Model(load_model(run, merged=True))
    model.write(
        prompt,
        budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        streamer=TextStreamer(model.routed.backbone.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    errors.print(model.ran, soft_wrap=True)
