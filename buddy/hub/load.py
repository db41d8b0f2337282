"""`buddy.load` and `buddy generate`: a run as a model that writes text at any budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from buddy.budget import Budget, auto_cap, latency_of
from buddy.builders.model import load_model
from buddy.console import counted, status, stderr
from buddy.engine.decode import Decoder, Row, Sampler, TextPieces, end_tokens
from buddy.engine.model import RoutedLM
from buddy.engine.record import Record
from buddy.errors import DataError, check_text, reason
from buddy.hub.push_pull import check_run, download, folder_of, hub_name, with_backbone
from buddy.io import within_memory
from buddy.run import read_run

Prompt = str | Sequence[Mapping[str, str]]
MIN_TEMPERATURE = 1e-6  # a lower one makes logits infinite


def load(
    run: str | Path,
    *,
    backbone: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    accept_license: bool = False,
) -> Model:
    """The model of a run, ready to generate: `buddy.load("runs/quickstart/buddy").generate("Once", budget=0.75)`.

    Args:
        run: a run folder, one that `buddy push` or `buddy pull` made, or `owner/name` on the hub.
        backbone: loaded instead of the one that the run names, such as a folder of this machine.
        dtype: of the backbone, instead of the run's: float32, bfloat16, float16, or auto, the faster of the first two.
        revision: branch, tag or commit, on the hub only.
        trust_remote_code: allow a run from the hub that runs the Python of its backbone's repository. In a folder its
            recipe alone decides; `pull` checks a folder of somebody else.
        accept_license: accept the licence of an embedded backbone that asks for it; needed once.

    Raises:
        BuddyError: the run or its backbone cannot be used.
    """
    source = run if isinstance(run, str) else str(run.absolute())  # a Path is never a name on the hub
    name = hub_name(source, revision)
    if name is None:
        found = read_run(folder_of(source))
    else:
        found = check_run(download(name, revision), shown_as=name, trust_remote_code=trust_remote_code)
    found = found if backbone is None else with_backbone(found, backbone)
    section = replace(found.recipe.backbone, accept_license=accept_license)
    if dtype is not None:
        section = replace(section, dtype=dtype)
    found = replace(found, recipe=replace(found.recipe, backbone=section))
    return Model(load_model(found, merged=True))


def generate(
    folder: Path,
    *,
    prompt: str,
    budget: Budget = 1.0,
    prompt_budget: Budget | None = None,
    dtype: str | None = None,
    **options: Any,
) -> None:
    """Stream a continuation to standard output, then print on the error stream which layers ran.

    Args:
        folder: a finished run.
        prompt: text to continue, or to answer with `chat`.
        budget, prompt_budget: as for `Model.generate`.
        dtype: as for `load`.
        options: max_new_tokens, temperature, seed, chat of `Model.generate`.

    Raises:
        BuddyError: the run, the budget or the prompt cannot be used.
    """
    _check_options(prompt, **options)
    with status(f"Loading {folder} …"):
        model = load(folder, dtype=dtype)
    for piece in model.stream(prompt, budget, prompt_budget=prompt_budget, **options):
        print(piece, end="", flush=True)
    print()
    stderr.print(model.ran)


class Model:
    """A backbone with its router.

    Args:
        routed: the two together.

    Attributes:
        routed: gives everything else: its backbone, tokenizer, `at`, `forward`.
        ran: one sentence on the layers that the last text really ran; None before there is one.
    """

    def __init__(self, routed: RoutedLM) -> None:
        self.routed = routed
        self.ran: str | None = None

    def __repr__(self) -> str:
        router, geometry = type(self.routed.router).__name__, self.routed.geometry
        return f"<buddy model: {self.routed.backbone.name}, {geometry.layers} layers, router {router}>"

    def generate(self, prompt: Prompt, budget: Budget = 1.0, **options: Any) -> str:
        """The continuation of a prompt without special tokens; sets `ran`.

        Args:
            prompt: text to continue, or to answer with `chat`; or messages {"role": …, "content": …} to answer.
            budget: a fraction such as 0.75, a count such as "22layers", a latency such as "15ms", or "auto".
            options: prompt_budget, of the prompt's tokens where it differs; max_new_tokens (64), the most tokens to
                generate; temperature (0), 0 takes the most likely token, above 0 samples; seed (0) of the sampling;
                chat (False), put the prompt into the model's chat template.

        Raises:
            BuddyError: the prompt, the budget or an option cannot be used.
        """
        return "".join(self.stream(prompt, budget, **options))

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """The token ids of a prompt, as `generate` reads it.

        Raises:
            DataError: the model has no chat template, or it does not take these messages; or the text is not UTF-8.
        """
        backbone, tokenizer = self.routed.backbone, self.routed.tokenizer
        chat = chat or not isinstance(prompt, str)
        if chat:
            if not tokenizer.chat_template:
                raise DataError(f"{backbone.name} has no chat template; give plain text and leave chat out.")
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            try:
                prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # a template is a program and may raise any error
                raise DataError(
                    f"The chat template of {backbone.name} does not take these messages ({reason(error)}); give a list "
                    'of {"role": …, "content": …}, with texts for both.'
                ) from error
        check_text(str(prompt), "The prompt")
        ids = list(tokenizer(prompt, add_special_tokens=not chat, verbose=False).input_ids)  # `check_length` follows
        if not ids and chat:
            raise DataError(f"The chat template of {backbone.name} makes no text of these messages; give others.")
        return ids

    def executed_layers(self, budget: Budget, tokens: list[int]) -> int:
        """K for a prompt: a latency may be measured for it, and "auto" is chosen.

        Raises:
            BudgetError: no K for this budget.
        """
        routed = self.routed
        if auto_cap(budget) is None:
            return routed.executed_layers(budget)
        ids = torch.tensor([tokens], device=routed.backbone.device)
        return int(routed.choosing(str(budget))(routed.context(ids)))

    def check_length(self, prompt: int, new: int, limit: str = "max_new_tokens") -> None:
        """Raises DataError where so many tokens of a prompt and new ones are more than the backbone was made for.

        Args:
            prompt, new: numbers of tokens.
            limit: the option that sets the number of new ones.
        """
        backbone = self.routed.backbone
        if prompt + new > backbone.context_length:
            raise DataError(
                f"The prompt has {counted(prompt, 'token')}, and {new} new ones go past the {backbone.context_length} "
                f"positions that {backbone.name} was made for; shorten the prompt or set a smaller {limit}."
            )

    def stream(
        self,
        prompt: Prompt,
        budget: Budget = 1.0,
        *,
        prompt_budget: Budget | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
    ) -> Iterator[str]:
        """The text of `generate` piece by piece; leaving the loop stops the model.

        Raises:
            BuddyError: as `generate` does, at the first piece.
        """
        routed, model = self.routed, self.routed.backbone.model
        _check_options(prompt, max_new_tokens, temperature, seed)
        tokens = self.encode(prompt, chat)
        if not tokens:  # a tokenizer may know nothing of some characters
            raise DataError("The prompt is empty; give some text to continue.")
        self.check_length(len(tokens), max_new_tokens)
        depth, record = routed.geometry.layers, Record()
        executed = self.executed_layers(budget, tokens)
        deeper = None if prompt_budget is None else self.executed_layers(prompt_budget, tokens)
        sampler = Sampler(model, len(tokens), temperature, seed)
        row = Row(tokens, executed, sampler, max_new_tokens, end_tokens(model), deeper)
        pieces = TextPieces(routed.tokenizer, () if chat or not isinstance(prompt, str) else tokens)
        decoder = Decoder(routed, chunk=len(tokens))
        decoder.add(row)
        sizes = f"{len(tokens)} + {max_new_tokens} tokens through {executed} of {depth} layers"
        try:
            with within_memory(sizes, "shorten the prompt or max_new_tokens"):
                while len(decoder):
                    for written in decoder.step():
                        if written.error:
                            raise written.error
                        record.forwards.append(written.record)
                        if piece := pieces.add(written.token):
                            yield piece
            if piece := pieces.rest():
                yield piece
        finally:
            if record.forwards:
                self.ran = summary(record, executed, depth, budget, routed.mean_over)


def summary(record: Record, executed: int, layers: int, budget: Budget = 1.0, over: int = 1) -> str:
    """One sentence: the layers that the tokens of prompt and decoding really ran, and how many plans they had.

    Args:
        record: of one row.
        executed: K.
        layers: L.
        budget: of the request.
        over: tokens over which K is the mean.
    """
    latency = latency_of(budget)
    text = f"The budget {budget} chose" if auto_cap(budget) else "Asked for"
    if latency is not None:
        text = f"Asked for {latency:g} ms, which allow"
    mean = f" in the mean over {over} tokens" if over > 1 else ""
    text += f" {executed} of {layers} layers per token{mean}. Prompt: "
    text += _range(record.executed[0], record.sinks[0], layers)
    if len(record.executed) > 1:
        steps, sinks, runs = (torch.cat(each[1:], 1) for each in (record.executed, record.sinks, record.runs))
        text += f"; {counted(steps.shape[1], 'decode step')}: {_range(steps, sinks, layers)}"
        if not sinks.all():
            text += f", {counted(len(runs[~sinks].unique(dim=0)), 'distinct plan')}"
    return text + "."


def _range(executed: torch.Tensor, sinks: torch.Tensor, layers: int) -> str:
    """Least, mean and most layers of the routed tokens in (1, T); where a prompt is short, decode steps have sinks."""
    routed, full = executed[~sinks], int(sinks.sum())
    text = "no routed token"
    if len(routed):
        least, mean, most = routed.min().item(), routed.float().mean().item(), routed.max().item()
        text = f"{most} layers" if least == most else f"{least} / {mean:.1f} / {most} layers (min / mean / max)"
    return f"{text} ({counted(full, 'sink token')} at {layers})" if full else text


def _check_options(
    prompt: Prompt, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0, chat: bool = False
) -> None:
    """Raises DataError for an empty prompt and for values of other types or out of range."""
    if not isinstance(prompt, Sequence):
        raise DataError(f"The prompt is {type(prompt).__name__}; give a text or a list of messages.")
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise DataError("The prompt is empty; give some text to continue.")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise DataError(f"max_new_tokens is {max_new_tokens!r}; give a whole number of 1 or more.")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise DataError(f"The seed is {seed!r}; give a whole number from 0 to 2⁶⁴ − 1.")
    number = isinstance(temperature, Real)
    if not (number and (temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf)):
        raise DataError(
            f"The temperature is {temperature}; give 0 for the most likely token, or {MIN_TEMPERATURE:g} or more."
        )
