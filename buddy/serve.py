"""`buddy generate`: text from a finished run, streamed, at the budget asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TextStreamer

from buddy.assemble import routed_from
from buddy.engine.model import RoutedLM
from buddy.engine.record import Record
from buddy.errors import DataError
from buddy.memory import within_memory
from buddy.progress import errors, status
from buddy.runs import read_run


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
        budget: a fraction or a count such as "22layers".
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token, above 0 samples.
        seed: of the sampling.
        chat: put the prompt into the model's chat template.

    Raises:
        BuddyError: the run, the budget or the prompt cannot be used.
    """
    run = read_run(folder)
    if not prompt.strip():
        raise DataError("The prompt is empty; give some text to continue.")
    if temperature < 0:
        raise DataError(f"The temperature is {temperature}; give 0 or more.")
    with status(f"Loading {run.backbone} …"):
        routed = routed_from(run)
    layers = routed.executed_layers(budget)
    inputs = _encode(routed, prompt, chat)
    _check_length(routed, inputs["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextStreamer(routed.backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sizes = (
        f"{inputs['input_ids'].shape[1]} + {max_new_tokens} tokens through {layers} of {routed.geometry.layers} layers"
    )
    with within_memory(sizes, "shorten the prompt or --max-new-tokens"), routed.at(budget) as record:
        routed.backbone.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=routed.backbone.tokenizer.pad_token_id,
            **sampling,
        )
    errors.print(summary(record, layers, routed.geometry.layers), soft_wrap=True)


def summary(record: Record, asked: int, layers: int) -> str:
    """Layers that prompt and generated tokens really ran, and how often the plan changed."""
    spread = _spread(record.executed[0], record.sinks[0], layers)
    text = f"Asked for {asked} of {layers} layers a token. Prompt: {spread}"
    if len(record.executed) > 1:
        steps, sinks, runs = (torch.cat(each[1:], 1) for each in (record.executed, record.sinks, record.runs))
        text += f"; {_counted(steps.shape[1], 'decode step')}: {_spread(steps, sinks, layers)}"
        if not sinks.all():
            text += f", {_counted(len(runs[~sinks].unique(dim=0)), 'distinct plan')}"
    return text + "."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _spread(executed: torch.Tensor, sinks: torch.Tensor, layers: int) -> str:
    """What the routed tokens of (1, T) ran; a short prompt leaves sinks to the first decode steps."""
    routed, full = executed[~sinks], int(sinks.sum())
    text = "no routed token"
    if len(routed):
        least, mean, most = routed.min().item(), routed.float().mean().item(), routed.max().item()
        text = f"{least} / {mean:.1f} / {most} layers (min / mean / max)"
    return f"{text} ({_counted(full, 'sink token')} at {layers})" if full else text


def _check_length(routed: RoutedLM, prompt: int, new: int) -> None:
    most = routed.backbone.context_length
    if prompt + new > most:
        raise DataError(
            f"The prompt has {prompt} tokens, and {new} new ones go past the {most} positions that "
            f"{routed.backbone.name} was made for; shorten the prompt or set a smaller --max-new-tokens."
        )


def _encode(routed: RoutedLM, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    tokenizer = routed.backbone.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"{routed.backbone.name} has no chat template; leave --chat out.")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(routed.backbone.device)
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
