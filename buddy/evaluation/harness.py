"""The model `buddy` of lm-eval: a finished run, routed at one budget.

lm-eval finds it through the entry point group `lm_eval.models`, in versions that look there (after 0.4.13);
`buddy.evaluation.lm_eval` is the same command for those that do not. This module imports lm-eval, of the
extra `tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]

from buddy.builders.model import load_model
from buddy.engine.decode import end_tokens
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError, described, did_you_mean
from buddy.run import read_run

# What HFLM takes and what makes sense for a model that is loaded already.
OPTIONS = {
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}
BATCH_TOKENS = 1024  # tokens of a batch, by default


@dataclass
class _Row:
    """One sequence to run: tokens without the last, and the requests that it answers."""

    tokens: list[int]
    prompt: int
    requests: list[int] = field(default_factory=list)


Tokenised = tuple[Any, list[int], list[int]]  # the request's texts, its context's tokens, its continuation's tokens


@register_model("buddy")
class BuddyLM(HFLM):
    """A routed model for lm-eval: likelihoods and generated text.

    A request is a context and a continuation. The plans of the continuation's tokens come from the context and from
    what precedes them, never from what follows: all tokens run at once in the engine's parallel form, which is what
    step-by-step decoding gives. Where plans depend on where the prompt ends (`routing.prompt_plan=shared`,
    `routing.reroute_every`, routers of one plan per input), only sequences whose contexts are equally long share a
    batch. At full depth batches and scores are those of `HFLM`, bit for bit.

    Args:
        run: a run folder, or a model that is loaded already.
        budget: a fraction such as 0.75, or "22layers".
        batch_size: sequences a batch, as in HFLM; "auto" for as many as hold `batch_tokens` tokens.
        batch_tokens: tokens per batch, padding included; the run's `data.batch_size` × `data.window` by default.
        device: "cpu" moves the model there; anything else leaves it where the run's recipe puts it, since `lm_eval`
            requests a GPU even where there is none.
        max_batch_size, trust_remote_code: `lm_eval` may give them; they change nothing here.
        options: of HFLM; those in `OPTIONS` alone.

    Attributes:
        routed: the model and its router.
        layers: K, the executed layers of the budget.
        on_scored: called with the number of likelihood requests of each batch, instead of a progress bar.

    Raises:
        RunError: no run, no budget, or an unknown option.
        DataError: when scoring, an empty context or continuation.
        BuddyError: the run or the budget cannot be used.
    """

    def __init__(
        self,
        run: str | Path | RoutedLM | None = None,
        budget: float | int | str | None = None,
        *,
        batch_size: int | str | None = "auto",
        batch_tokens: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> None:
        _check(run, budget, options)
        self.routed, tokens, rows = _loaded(run)
        fixed = not str(batch_size or "auto").startswith("auto")
        self._batch_tokens = None if fixed else int(batch_tokens or tokens)
        if device is not None and torch.device(device).type == "cpu":
            self.routed.backbone.model.cpu()
            self.routed.cpu()  # router and bridges
        backbone = self.routed.backbone
        super().__init__(
            backbone.model,
            tokenizer=backbone.tokenizer,
            backend="causal",
            batch_size=int(batch_size) if fixed else rows,
            **options,
        )
        self.on_scored: Callable[[int], None] | None = None
        self.set_budget(budget)

    def set_budget(self, budget: float | int | str) -> None:
        """Set the budget, and count executed layers from zero."""
        self.layers = self.routed.executed_layers(budget)
        self._executed: list[Tensor] = []

    @property
    def executed(self) -> Tensor:
        """(n,) long, layers that each token ran since the budget was set; sinks and padding are left out."""
        return torch.cat([torch.zeros(0, dtype=torch.long), *self._executed])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each whole text."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.on_scored is not None)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self.on_scored is not None)

    def get_model_info(self) -> dict[str, Any]:
        """The model's entry in lm-eval's results."""
        backbone = self.routed.backbone
        return {
            "model_num_parameters": backbone.model.num_parameters(),
            "model_dtype": str(backbone.dtype),
            "backbone": backbone.name,
            "router": type(self.routed.router).__name__,
            "layers": self.layers,
            "layers_of": self.routed.geometry.layers,
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenised], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        quiet = disable_tqdm or self.on_scored is not None
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for rows in self._batches(requests):
                # The first position whose logits any row needs; at full depth HFLM computes them all.
                first = min(len(row.tokens) - _longest(row, requests) for row in rows) if self._routes else 0
                lengths = torch.tensor([len(row.tokens) for row in rows])
                logits = self._logits([row.tokens for row in rows], lengths, rows[0].prompt, first)
                for row, own in zip(rows, logits, strict=True):
                    self._answer(row, own[: len(row.tokens) - first], requests, answers)
                count = sum(len(row.requests) for row in rows)
                bar.update(count)
                if self.on_scored is not None:
                    self.on_scored(count)
        return answers

    def _answer(self, row: _Row, logits: Tensor, requests: Sequence[Tokenised], answers: list[Any]) -> None:
        """Answer a row's requests from its last logits (T', V)."""
        scores = F.log_softmax(logits[-_longest(row, requests) :], dim=-1, dtype=self.softmax_dtype)
        greedy = scores.argmax(-1)
        for index in row.requests:
            text, _, continuation = requests[index]
            target, count = torch.tensor(continuation, device=scores.device), len(continuation)
            picked = scores[-count:].gather(-1, target[:, None]).squeeze(-1)
            answers[index] = float(picked.sum()), bool((greedy[-count:] == target).all())
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[index])

    def _batches(self, requests: Sequence[Tokenised]) -> Iterator[list[_Row]]:
        """Rows that run together: longest first, as HFLM has them; equal prompts only where plans depend on them."""
        rows: dict[tuple, _Row] = {}
        for index, (text, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"An item cannot be scored: {shorten(repr(text), 120)} has an empty question or answer, or an "
                    f"answer of more than {self.max_length} tokens; shorten or remove it."
                )
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            prompt = len(tokens) - len(continuation) + 1 if self._prompt_matters else 0
            rows.setdefault((prompt, *tokens), _Row(tokens, prompt)).requests.append(index)

        def order(row: _Row) -> tuple:
            index = max(row.requests, key=lambda index: len(requests[index][2]))
            whole = requests[index][1] + requests[index][2]
            return row.prompt, -len(whole), whole

        for _, group in groupby(sorted(rows.values(), key=order), key=lambda row: row.prompt):
            rest = list(group)
            while rest:
                size = self.batch_size
                if self._batch_tokens is not None:
                    size = max(1, self._batch_tokens // len(rest[0].tokens))
                yield rest[:size]
                rest = rest[size:]

    @property
    def _routes(self) -> bool:
        """Whether there is anything to plan; at full depth there is not."""
        return self.layers < self.routed.geometry.layers

    @property
    def _prompt_matters(self) -> bool:
        settings = self.routed.settings
        return self._routes and (settings.prompt_plan == "shared" or settings.reroute_every != 1)

    @torch.no_grad()
    def _logits(self, sequences: Sequence[Sequence[int]], lengths: Tensor, prompt: int, first: int = 0) -> Tensor:
        """(B, T − first, V) of sequences padded on the right; what they ran is counted."""
        device = self.routed.backbone.device
        ids = pad_sequence([torch.tensor(tokens) for tokens in sequences], batch_first=True).to(device)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None].to(device)
        # Padding after the end changes nothing before it, unless rows share the mean of their scores.
        mask = real.long() if self._routes and self.routed.settings.batch_plan == "shared" else None
        keep = torch.arange(first, ids.shape[1], device=device) if first else 0
        try:
            output = self.routed(
                ids, mask, executed=torch.full((len(ids),), self.layers), prompt=prompt, logits_to_keep=keep
            )
        except (TypeError, AttributeError, LookupError) as error:  # of the router, not of the task
            raise RuntimeError(described(error)) from error
        self._executed.append(output.executed[real & ~output.sinks].cpu())
        return output.logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with self.routed.at(executed=[self.layers]) as record:
            tokens = super()._model_generate(context, max_length=max_length, stop=stop, **options)
        read = ~record.sinks[0]
        mask = options.get("attention_mask")
        if mask is not None:
            read &= mask.bool().repeat_interleave(len(read) // len(mask), 0)  # rows of one text's beams are neighbours
        self._executed.append(record.executed[0][read].cpu())
        new = tokens[:, context.shape[1] :]
        ended = torch.isin(new, torch.tensor([*end_tokens(self.model)], device=new.device)).cumsum(1) > 0
        for number, (step, sinks) in enumerate(zip(record.executed[1:], record.sinks[1:], strict=True)):
            read = ~sinks
            if len(read) == len(new):  # not so with beams, of which the texts are a choice
                read &= ~ended[:, number : number + 1]
            self._executed.append(step[read].cpu())
        return tokens


def _longest(row: _Row, requests: Sequence[Tokenised]) -> int:
    """Tokens of the longest continuation that a row answers for."""
    return max(len(requests[index][2]) for index in row.requests)


def _check(run: Any, budget: Any, options: dict[str, Any]) -> None:
    if run is None or budget is None:
        raise RunError(
            "The model 'buddy' needs a run and a budget, such as --model_args run=runs/quickstart/buddy,budget=0.75."
        )
    for name in options:
        if name not in OPTIONS:
            known = sorted({"run", "budget", "batch_tokens", *OPTIONS})
            hint = did_you_mean(name, known) or f"; choose from {', '.join(known)}."
            raise RunError(f"The model 'buddy' has no argument {name!r}{hint}")


def _loaded(run: str | Path | RoutedLM) -> tuple[RoutedLM, int, int]:
    """The model, tokens per batch and rows per batch of generation."""
    if isinstance(run, RoutedLM):
        return run, BATCH_TOKENS, 1
    found = read_run(run)
    data = found.recipe.data
    return load_model(found), data.batch_size * data.window, data.batch_size
