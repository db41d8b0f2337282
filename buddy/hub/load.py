"""`buddy.load` and `buddy generate`: a run as a model that writes text at any budget."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from buddy.budget import Budget, auto_of, latency_of
from buddy.build import load_model
from buddy.console import errors, status
from buddy.engine.forward import Record
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError, check_text
from buddy.hub.push_pull import check_files, download, folder_of, hub_name, with_backbone
from buddy.io import within_memory
from buddy.run import read_run


def load(
    run: str | Path, *, backbone: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Model:
    """The model of a run, ready to generate: `buddy.load("runs/quickstart/buddy").generate("Once", budget=0.75)`.

    Args:
        run: a run folder, one that `buddy push` or `buddy pull` made, or `owner/name` on the hub.
        backbone: loaded instead of the one that the run names, for one that lies elsewhere here.
        revision: branch, tag or commit, on the hub only.
        trust_remote_code: let a run from the hub ask for the Python of its backbone's repository.

    Raises:
        BuddyError: the run or its backbone cannot be used.
    """
    folder = folder_of(str(run))
    name = None if isinstance(run, Path) or os.path.isdir(folder) else hub_name(run)
    if name is None and revision is not None:
        raise RunError(f"{run} is a folder and has no revisions; leave out revision {revision!r}.")
    if name is None:
        found = read_run(folder)
    else:
        found = check_files(download(name, revision), called=name, trust_remote_code=trust_remote_code)
    return Model(load_model(found if backbone is None else with_backbone(found, backbone), merged=True))


Prompt = str | Sequence[Mapping[str, str]]
COLDEST = 1e-6  # a temperature below it makes logits infinite


class Model:
    """A backbone with its router.

    Args:
        routed: the two together.

    Attributes:
        routed: for all that is not here: its backbone, tokenizer, `at`, `forward`.
        ran: one sentence on the layers that the last text really ran; None before there is one.
    """

    def __init__(self, routed: RoutedLM) -> None:
        self.routed = routed
        self.ran: str | None = None

    def __repr__(self) -> str:
        router, geometry = type(self.routed.router).__name__, self.routed.geometry
        return f"<buddy model: {self.routed.backbone.name}, {geometry.layers} layers, router {router}>"

    def generate(self, prompt: Prompt, budget: Budget = 1.0, **options: Any) -> str:
        """The continuation of a prompt.

        Args:
            prompt: text to continue, or messages {"role": …, "content": …} to answer.
            budget: a fraction such as 0.75, a count such as "22layers", a latency such as "15ms", or "auto".
            options: as `write` has them: max_new_tokens, temperature, seed, chat.

        Raises:
            BuddyError: the prompt, the budget or an option cannot be used.
        """
        return self.write(prompt, budget, **options)

    def stream(self, prompt: Prompt, budget: Budget = 1.0, **options: Any) -> Iterator[str]:
        """The same, piece by piece as it is written; leaving the loop stops it.

        Raises:
            BuddyError: as `generate` does, at the first piece.
        """
        tokenizer = self.routed.backbone.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Stop(), []

        def work() -> None:
            try:
                self.write(prompt, budget, streamer=streamer, stop=stop, **options)
            except BaseException as error:  # raised again where the pieces are read
                failed.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            stop.now = True
            thread.join()
        if failed:
            raise failed[0]

    @torch.no_grad()
    def write(
        self,
        prompt: Prompt,
        budget: Budget = 1.0,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
        streamer: BaseStreamer | None = None,
        stop: Stop | None = None,
    ) -> str:
        """The continuation of a prompt, special tokens left out; `ran` says what it took.

        Args:
            prompt: text to continue, or to answer with `chat`; or messages to answer.
            budget: as `generate` has it.
            max_new_tokens: at most so many.
            temperature: 0 takes the most likely token, above 0 samples.
            seed: of the sampling.
            chat: put the prompt into the model's chat template.
            streamer: of transformers; is given the tokens as they come.
            stop: ends the text after the token at which its `now` is set.

        Raises:
            BuddyError: the prompt, the budget or an option cannot be used.
        """
        routed, device = self.routed, self.routed.backbone.device
        check_options(prompt, max_new_tokens, temperature, seed)
        depth, auto = routed.geometry.layers, auto_of(budget) is not None
        inputs = _encoded(routed, prompt, chat)
        held = inputs["input_ids"].shape[1]
        _check_length(routed, held, max_new_tokens)
        layers = depth if auto else routed.executed_layers(budget)  # a latency may have to be measured first
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        sizes = f"{held} + {max_new_tokens} tokens through {layers} of {depth} layers"
        with (
            within_memory(sizes, "shorten the prompt or max_new_tokens"),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            routed.at(budget) as record,
        ):
            torch.manual_seed(seed)
            written = routed.backbone.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=None if stop is None else [stop],
                pad_token_id=routed.backbone.tokenizer.pad_token_id,
                **sampling,
            )
        self.ran = summary(record, record.auto_executed[0] if auto else layers, depth, budget)
        return routed.backbone.tokenizer.decode(written[0, held:], skip_special_tokens=True)


def summary(record: Record, asked: int, layers: int, budget: Budget | None = None) -> str:
    """Layers that prompt and generated tokens really ran, and how often the plan changed."""
    spread = _spread(record.executed[0], record.sinks[0], layers)
    text = f"{_said(budget)} {asked} of {layers} layers a token. Prompt: {spread}"
    if len(record.executed) > 1:
        steps, sinks, runs = (torch.cat(each[1:], 1) for each in (record.executed, record.sinks, record.runs))
        text += f"; {_counted(steps.shape[1], 'decode step')}: {_spread(steps, sinks, layers)}"
        if not sinks.all():
            text += f", {_counted(len(runs[~sinks].unique(dim=0)), 'distinct plan')}"
    return text + "."


def _said(budget: Budget | None) -> str:
    if budget is not None and auto_of(budget):
        return f"The budget {budget} chose"
    latency = None if budget is None else latency_of(budget)
    return "Asked for" if latency is None else f"Asked for {latency:g} ms, which here are"


def check_options(prompt: Prompt, max_new_tokens: int, temperature: float, seed: int = 0) -> None:
    """Raises DataError for what no model can do."""
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise DataError("The prompt is empty; give some text to continue.")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is {max_new_tokens}; give 1 or more.")
    if not 0 <= seed < 2**64:
        raise DataError(f"The seed is {seed}; give one from 0 to 2⁶⁴ − 1.")
    if not temperature >= 0:
        raise DataError(f"The temperature is {temperature}; give 0 or more.")
    if 0 < temperature < COLDEST:
        raise DataError(f"The temperature is {temperature}; give 0 for the likeliest token, or {COLDEST:g} or more.")


class Stop(StoppingCriteria):
    """Stops when somebody sets `now`."""

    now = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)


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
            f"{routed.backbone.name} was made for; shorten the prompt or set a smaller max_new_tokens."
        )


def _encoded(routed: RoutedLM, prompt: Prompt, chat: bool) -> dict[str, torch.Tensor]:
    tokenizer = routed.backbone.tokenizer
    chat = chat or not isinstance(prompt, str)
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"{routed.backbone.name} has no chat template; give plain text and leave chat out.")
        prompt = _from_messages(routed, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    check_text(str(prompt), "The prompt")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(routed.backbone.device)
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}


def _from_messages(routed: RoutedLM, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text: str = routed.backbone.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the model's makers, and may raise anything
        reason = " ".join(str(error).split())
        raise DataError(
            f"The chat template of {routed.backbone.name} does not take these messages ({reason}); give a list of "
            '{"role": …, "content": …}, with texts for both.'
        ) from error
    return text


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
