"""Decoding step by step: rows begin and end independently, and those that decode at the same time share a batch.

`buddy generate` decodes one row with it, `buddy serve` many. Each row has its own number of layers K, its own sampling
and its own end. With a plan for each row (`batch_plan="row"`) what a row writes does not depend on the others, up to
the rounding of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from buddy.engine.batches import Batch, join, keep
from buddy.engine.model import RoutedLM
from buddy.engine.record import ForwardRecord
from buddy.engine.transfer import HostCopy, to_device, to_host

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
CONTEXT = 8  # tokens of the prompt that a text continues, for the space between
CHUNK = 256  # tokens of prompts that are read between two steps of the rows that decode
UNDECIDED = -1  # the batch of rows that have run every layer so far, so that nothing was decided for them


class Sampler:
    """Chooses a row's tokens, as transformers' `generate` does for the same options.

    Args:
        model: a transformers model, whose generation_config gives what `options` leave open.
        prompt: number of tokens.
        temperature: 0 takes the likeliest token.
        seed: of the draws above temperature 0.
        options: of `generate`, for draws: top_p, top_k and so on.
    """

    def __init__(self, model: Any, prompt: int, temperature: float = 0.0, seed: int = 0, **options: Any) -> None:
        self._draws = temperature > 0
        config, _ = model._prepare_generation_config(
            None, do_sample=self._draws, **({"temperature": float(temperature), **options} if self._draws else {})
        )
        model._prepare_special_tokens(config, device=model.device)
        self._processors = model._get_logits_processor(config, input_ids_seq_length=prompt, device=str(model.device))
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._ids = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """The next token, () long on the model's device, from logits (V,) float32.

        Args:
            tokens: all before it: those of the last call, its own choice, and then others.
        """
        scores = logits[None]
        if self._processors:
            if new := tokens[self._ids.shape[1] :]:
                self._ids = torch.cat([self._ids, to_device([new], self._ids.device)], 1)
            scores = self._processors(self._ids, scores.clone())
        if self._draws:
            token = torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator)[0]
        else:
            token = scores[0].argmax()
        if self._processors:
            self._ids = torch.cat([self._ids, token.view(1, 1)], 1)
        return token


class TextPieces:
    """The text of tokens as they come, without special tokens; a piece never ends within a character.

    Args:
        tokenizer: of transformers.
        before: the tokens that the text continues; some tokenizers drop the space at the start of a text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._first, self._given = 0, len(self._tokens)  # these are decoded again, for the spaces between
        if self._text(None).endswith(UNFINISHED):
            self._first = self._given

    def add(self, token: int) -> str:
        """The text that a token completes; it may be empty."""
        self._tokens.append(token)
        return self._piece(final=False)

    def rest(self) -> str:
        """The rest of the text after the last token, even if it ends within a character."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        text = self._text(None)
        if text.endswith(UNFINISHED) and not final:
            return ""
        piece = text[len(self._text(self._given)) :]
        if piece:
            self._first, self._given = self._given, len(self._tokens)
        return piece

    def _text(self, end: int | None) -> str:
        text: str = self._tokenizer.decode(self._tokens[self._first : end], skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen for one row, after a forward of T tokens.

    Attributes:
        token: (1,) long, on the device.
        copy: for each row of the forward the token, and the layers that each of its T tokens ran, −1 for a sink.
        index: of the row in it.
        logits: (V,) float32, from which the token was chosen.
        record: the forward's, of this row alone.
    """

    token: Tensor
    copy: HostCopy
    index: int
    logits: Tensor
    record: ForwardRecord


@dataclass(eq=False)
class Row:
    """One text that is being written.

    Attributes:
        prompt: token ids, at least one.
        executed: K, layers for each token.
        prompt_executed: K for the tokens of the prompt, where it differs.
        sampler: chooses its tokens.
        limit: most new tokens.
        ends: ids after which the text ends.
        tokens: what was written so far.
        counted: its first tokens whose layers a `Written` has given; they may be read again after a failure.
        cache: the KV cache of its first `done` tokens while they are read; None once the row is in a batch.
        chosen: its newest token.
        unread: whether the host has not read that token yet, so that it is not among `tokens`.
    """

    prompt: list[int]
    executed: int
    sampler: Callable[[Sequence[int], Tensor], Tensor]
    limit: int
    ends: frozenset[int] = frozenset()
    prompt_executed: int | None = None
    tokens: list[int] = field(default_factory=list)
    counted: int = 0
    cache: Any = field(default=None, init=False)
    done: int = field(default=0, init=False)
    chosen: Chosen | None = field(default=None, init=False)
    unread: bool = field(default=False, init=False)

    def new_counts(self, counts: Sequence[int], end: int) -> list[int]:
        """Layers that each token ran, without sinks and tokens that were counted before.

        Args:
            counts: of the last tokens up to the `end`-th of prompt and answer; −1 for a sink.
            end: number of tokens read so far.
        """
        first, self.counted = max(0, self.counted - end + len(counts)), max(self.counted, end)
        return [count for count in counts[first:] if count >= 0]

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after a token that ends the text, "length" at the limit; None while it goes on."""
        if self.tokens and self.tokens[-1] in self.ends:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None


def end_tokens(model: Any) -> frozenset[int]:
    """The ids after which a transformers model's texts end."""
    ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


@dataclass(frozen=True)
class Written:
    """What a step did for one row.

    Attributes:
        row: the row.
        token: the new token; None where only a part of the prompt was read, or where the row failed.
        logits: (V,) float32, from which the token was chosen.
        executed: layers that each token read in this step ran, without sinks and tokens that were read before.
        record: the forward's, of this row alone.
        finish_reason: the row's after this token.
        error: why the row cannot go on.
    """

    row: Row
    token: int | None = None
    logits: Tensor | None = None
    executed: Sequence[int] = ()
    record: ForwardRecord | None = None
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def ends(self) -> bool:
        """Whether the row is not to be continued."""
        return self.error is not None or self.finish_reason is not None


class Decoder:
    """Rows of one model, each at its own K. Not to be used by two threads at once.

    A forward that fails ends only the row that causes it: the rows of a failed batch are read again, one by one.
    Where not every token decides (`reroute_every`), rows at full depth of one batch decide when the first of them gets
    fewer layers.

    Args:
        routed: the model.
        chunk: tokens of prompts that are read in one step. A prompt whose tokens do not all decide for themselves is
            read whole.
        read_late: read the tokens of a step after the next forward has begun, so that the device need not wait for the
            host between steps. A token is then given one step later, and a row that ends before its limit takes part in
            one more forward, also in a plan that the batch shares. None: on CUDA devices.
    """

    def __init__(self, routed: RoutedLM, chunk: int = CHUNK, read_late: bool | None = None) -> None:
        self.routed = routed
        self._read_late = routed.backbone.device.type == "cuda" if read_late is None else read_late
        settings = routed.settings
        self._every, self._chunk, self._steps = settings.reroute_every, chunk, 0
        self._splits = settings.prompt_plan != "shared" and self._every == 1  # whether a prompt is read in parts
        self._reading: list[Row] = []
        # Rows that decide at the same steps, by their phase; beside them those of `UNDECIDED`.
        self._batches: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self._reading) + sum(len(batch.owners) for batch in self._batches.values())

    def add(self, row: Row) -> None:
        """Begin to write a row in the next step."""
        row.cache, row.done = DynamicCache(config=self.routed.backbone.base.config), 0
        self._reading.append(row)

    def remove(self, gone: Iterable[Row]) -> None:
        """Stop rows; those that are not there are passed over."""
        rows = set(gone)
        self._reading = [row for row in self._reading if row not in rows]
        for key, batch in list(self._batches.items()):
            stay = [index for index, row in enumerate(batch.owners) if row not in rows]
            if not stay:
                del self._batches[key]
            elif len(stay) < len(batch.owners):
                self._batches[key] = keep(self.routed, batch, stay)

    @torch.no_grad()
    def step(self) -> list[Written]:
        """One token for each row that decodes, and one chunk of prompts read; rows that end are removed.

        Returns:
            In order; a row may have several, such as a token and then an error.
        """
        self._steps += 1
        written = [each for key in list(self._batches) for each in self._decode(key)]
        self.remove(each.row for each in written if each.ends)
        if UNDECIDED in self._batches and self._batches[UNDECIDED].cache.scores is not None:
            written += self._join(self._phase(1), self._batches.pop(UNDECIDED))  # this step decided
        return written + self._read()

    def _join(self, key: int, batch: Batch) -> list[Written]:
        """Add rows to a batch. If that fails, what they wrote is read, and given."""
        parts = [self._batches.pop(key), batch] if key in self._batches else [batch]
        try:
            self._batches[key] = join(self.routed, parts)
        except Exception as error:  # out of memory: what a part has become is not known
            warnings.warn(f"{sum(len(part.owners) for part in parts)} rows are read again: {error}", stacklevel=2)
            rows = [row for part in parts for row in part.owners]
            written = self._take(rows)
            for row in rows:
                if row.finish_reason is None:
                    self.add(row)
            return written
        return []

    def _decode(self, key: int) -> list[Written]:
        """The next token of each row of a batch."""
        batch = self._batches[key]
        rows, cache = batch.owners, batch.cache
        lengths = [len(row.prompt) + len(row.tokens) - (not row.unread) for row in rows]
        cache.shortest = min(lengths) if batch.padded else None
        try:
            logits, record = self._forward(
                [row.executed for row in rows],
                torch.stack([row.chosen.token for row in rows]),
                cache,
                position_ids=batch.positions,
                attention_mask=batch.extend(),
            )
        except Exception as error:
            del self._batches[key]
            written = self._take(rows)
            left = [row for row in rows if row.finish_reason is None]
            if len(rows) == 1:
                return written + [Written(row, error=error) for row in left]
            warnings.warn(f"A step of {len(rows)} rows failed and is repeated row by row: {error}", stacklevel=2)
            for row in left:  # alone, so that only the row that causes the error fails
                self.add(row)
            return written
        written = self._take(rows)
        written += self._choose([None if row.finish_reason else row for row in rows], logits, record)
        late = self._read_late
        return written + self._take([row for row in rows if not late or len(row.tokens) + 1 >= row.limit])

    def _read(self) -> list[Written]:
        """Read prompts, oldest first, until a chunk is full; rows that are read whole join a batch."""
        written, room = [], self._chunk
        for row in list(self._reading):
            if room <= 0:
                break
            first = row.done
            tokens = row.prompt + row.tokens
            in_prompt = first < len(row.prompt)
            last = len(row.prompt) if in_prompt else len(tokens)  # a prompt is planned as such
            if self._splits:
                last = min(last, first + room)
            room -= last - first
            ids = to_device([tokens[first:last]], self.routed.backbone.device)
            try:
                executed = row.prompt_executed if in_prompt else None
                logits, record = self._forward([executed or row.executed], ids, row.cache)
            except Exception as error:
                self._reading.remove(row)
                written.append(Written(row, error=error))
                continue
            row.done = last
            if last < len(tokens):
                counts = to_host(torch.where(record.sinks, -1, record.executed)[0])
                written.append(Written(row, executed=row.new_counts(counts, last), record=record))
                continue
            self._reading.remove(row)
            written += self._choose([row], logits, record) or self._take([row])
            if written[-1].ends:
                continue
            mask = torch.ones(1, last, dtype=torch.bool, device=ids.device)
            cache, row.cache = row.cache, None
            written += self._join(self._key(cache, last), Batch(cache, mask, [row]))
        return written

    def _key(self, cache: Any, tokens: int) -> int:
        """The batch of a row with so many tokens in its cache."""
        if self._every == 1:
            return 0
        return UNDECIDED if cache.scores is None else self._phase(tokens - cache.decided)

    def _phase(self, since: int) -> int:
        """The batch of rows that decided in the step `since` - 1 steps ago."""
        return (self._steps - since) % (self._every or 1)

    def _forward(
        self, executed: Sequence[int], ids: Tensor, cache: Any, **inputs: Tensor
    ) -> tuple[Tensor, ForwardRecord]:
        """Logits (B, V) float32 of each row's last token."""
        routed = self.routed
        with routed.at(executed=executed) as record:
            logits = routed.backbone.model(
                input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1, **inputs
            ).logits
        return logits[:, -1].float(), record.forwards[-1]

    @staticmethod
    def _choose(rows: Sequence[Row | None], logits: Tensor, record: ForwardRecord) -> list[Written]:
        """Choose the next token of each row of a forward, but of None; it is unread then. Returns the failures."""
        executed = record.executed  # counted once for all rows
        record, failed = replace(record, full_layers=0, partial_layers=[executed]), []
        tokens = [executed.new_zeros(())] * len(rows)
        chosen = []
        for index, row in enumerate(rows):
            if row is None:
                continue
            try:
                tokens[index] = row.sampler(row.prompt + row.tokens, logits[index])
                chosen.append((index, row))
            except Exception as error:
                failed.append(Written(row, error=error))
        newest = torch.stack(tokens)[:, None]
        copy = HostCopy(torch.cat([newest, torch.where(record.sinks, -1, executed)], 1))
        for index, row in chosen:
            row.chosen, row.unread = Chosen(newest[index], copy, index, logits[index], record.row(index)), True
        return failed

    @staticmethod
    def _take(rows: Sequence[Row]) -> list[Written]:
        """Read the newest tokens of rows, where they are unread."""
        written = []
        for row in rows:
            if row.unread:
                chosen, row.unread = row.chosen, False
                token, *counts = chosen.copy.values[chosen.index]
                ran = row.new_counts(counts, len(row.prompt) + len(row.tokens))
                row.tokens.append(token)
                written.append(Written(row, token, chosen.logits, ran, chosen.record, row.finish_reason))
        return written
