"""The thread that owns the model: it admits texts that wait to the batch, steps it, and hands out what was written."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from buddy.budget import Budget, latency_of
from buddy.engine.decode import UNFINISHED, Decoder, Row, Sampler, TextPieces, Written, end_tokens
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, BudgetError
from buddy.hub.load import Model
from buddy.serve.guard import ApiError, Metrics

log = logging.getLogger("buddy.serve")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before temperature and top_p.

    Attributes:
        token: its text.
        logprob: the logarithm.
        top: the likeliest tokens at this place and theirs.
        offset: characters of the answer before it.
    """

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    offset: int = 0

    @property
    def bytes(self) -> list[int] | None:
        """Of the text in UTF-8; None for a part of a character."""
        return None if UNFINISHED in self.token else list(self.token.encode())


@dataclass(frozen=True)
class Piece:
    """What one step wrote of a text.

    Attributes:
        text: may be empty.
        logprob: where it was asked for.
        plan: "1101…", the layers that ran for the position that this token was chosen at, where asked for.
        finish_reason: "stop" or "length" with the last piece.
        error: why the text ends here.
    """

    text: str = ""
    logprob: TokenLogprob | None = None
    plan: str | None = None
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class GenerationRequest:
    """One text to be written: a choice of a request.

    Attributes:
        prompt: token ids.
        budget: of each token.
        prompt_budget: of the prompt's tokens, where it differs.
        limit: most new tokens.
        emit: called with each piece, from the scheduler's thread; it must not wait.
        seconds: until the text must be finished.
        temperature, seed, options: of `Sampler`.
        stops: strings that end the text; they are not part of it.
        top_logprobs: number of likeliest tokens to give with each; None for no logarithms.
        plans: whether pieces have plans.
        chat: whether it answers the prompt, and does not continue its text.
        cancelled: set by the owner when nobody reads the text any longer.
        ran: how many tokens ran each number of layers so far; sinks left out.
        written: new tokens so far.
        characters: of the text so far, where logarithms are asked for.
        arrived, latest: when the text was asked for, and when its latest token came, by the monotonic clock.
    """

    prompt: list[int]
    budget: Budget
    limit: int
    emit: Callable[[Piece], None]
    seconds: float = 600.0
    temperature: float = 0.0
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    plans: bool = False
    prompt_budget: Budget | None = None
    chat: bool = False
    cancelled: bool = False
    ran: Counter[int] = field(default_factory=Counter)
    written: int = 0
    arrived: float = field(default_factory=time.monotonic)
    latest: float | None = field(default=None, init=False)
    _held: str = field(default="", init=False)  # text that a stop string may begin with
    characters: int = field(default=0, init=False)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.arrived + self.seconds

    def cut(self, piece: str, final: bool) -> tuple[str, bool]:
        """What may be given out of the text so far, and whether a stop string ended it."""
        text = self._held + piece
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        begun = [n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        keep = len(text) - (0 if final else max(begun, default=0))
        self._held = text[keep:]
        return text[:keep], False


def batch_plan_of(routed: RoutedLM) -> str:
    """One plan for all texts of a batch; one for each where budgets are in the mean, which no shared plan holds."""
    return "shared" if routed.settings.mean_over == 1 else "row"


def _too_late() -> Piece:
    """The end of a text that was not finished within the time of a request."""
    return Piece(error=ApiError("The text was not finished in time; ask for fewer tokens.", 504, code="timeout"))


class Scheduler:
    """Writes texts on a thread of its own, as many at a time as fit into the batch.

    Args:
        load: gives the model, which nobody else may use meanwhile. The thread calls it, because a second thread with
            products of its own makes each of them slower: the threads of OpenMP that wait for either share the cores.
        metrics: where to count.
        batch: rows at most.
        queue: texts that may wait, beside those that the next step begins.
        batch_plan: "shared" or "row", see `RoutedLM`; None for `batch_plan_of`.

    Raises:
        Exception: what `load` raises.

    Attributes:
        model: as loaded.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        metrics: Metrics,
        batch: int = 8,
        queue: int = 128,
        batch_plan: str | None = None,
    ) -> None:
        self._metrics, self._batch, self._queue = metrics, batch, queue
        self._running: dict[Row, tuple[GenerationRequest, TextPieces]] = {}
        self._waiting: deque[GenerationRequest] = deque()
        self._slower = 1.0  # a step's time over the latency table's, lately
        self._changed, self._closing = threading.Condition(), False
        loaded = Future[None]()
        arguments = load, loaded, batch_plan
        self._thread = threading.Thread(target=self._run, args=arguments, name="buddy-decode", daemon=True)
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # Ctrl-C: a process must not end while a thread computes
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether texts are taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, texts: Sequence[GenerationRequest]) -> None:
        """Queue the texts of a request.

        Raises:
            ApiError: there is no room for all of them, or the scheduler is closing.
        """
        with self._changed:
            free = max(0, self._batch - len(self._running))
            if self._closing or len(self._waiting) + len(texts) > self._queue + free:
                raise ApiError("Too many requests wait; try again later.", 429, code="queue_full")
            self._waiting.extend(texts)
            self._changed.notify()

    def cancel(self, texts: Sequence[GenerationRequest]) -> None:
        """Free the rows of texts before the next step."""
        for text in texts:
            text.cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step that runs; texts that are not finished stay so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self, load: Callable[[], Model], loaded: Future[None], batch_plan: str | None) -> None:
        try:
            model = load()
            self._tokenizer, self._ends = model.routed.tokenizer, end_tokens(model.routed.backbone.model)
            self._before = self._tokenizer("a", add_special_tokens=False).input_ids[-1:]  # any token with text
            self._before_text: str = self._tokenizer.decode(self._before)
            self._decoder = Decoder(model.routed)
        except BaseException as error:
            loaded.set_exception(error)
            return
        self.model = model
        loaded.set_result(None)
        with model.routed.changed(batch_plan=batch_plan or batch_plan_of(model.routed)):
            self._work()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
            try:
                self._step()
            except Exception as error:  # a defect: no text can go on, but the server can
                log.exception("A step failed.")
                self._decoder = Decoder(self.model.routed)
                for row in list(self._running):
                    self._finish(row, Piece(error=error))
                self._metrics.rows.set(0)

    def _step(self) -> None:
        gone = [row for row, (text, _) in self._running.items() if text.cancelled or text.is_late]
        self._decoder.remove(gone)
        for row in gone:
            self._finish(row, _too_late())
        for text in self._admitted():
            self._begin(text)
        expected, start = self._keep_latencies(), time.perf_counter()
        for written in self._decoder.step():
            if written.row not in self._running:  # it ended earlier in this step, by a stop string for example
                continue
            try:
                self._hand_out(written, *self._running[written.row])
            except Exception as error:
                log.exception("A text failed.")
                self._decoder.remove([written.row])
                self._finish(written.row, Piece(error=error))
        if expected is not None:
            ratio = 1e3 * (time.perf_counter() - start) / expected
            self._slower += 0.1 * (min(ratio, 4.0) - self._slower)  # a single pause of the machine counts little
        self._metrics.rows.set(len(self._running))

    def _admitted(self) -> list[GenerationRequest]:
        """The texts that begin now."""
        with self._changed:
            waiting = [text for text in self._waiting if not text.cancelled]
            late = {text for text in waiting if text.is_late}
            for text in late:
                text.emit(_too_late())
            left = [text for text in waiting if text not in late]
            room = max(0, self._batch - len(self._running))
            self._waiting = deque(left[room:])
            self._metrics.queue.set(len(self._waiting))
            return left[:room]

    def _begin(self, text: GenerationRequest) -> None:
        try:
            executed = self.model.executed_layers(text.budget, text.prompt)
            if latency_of(text.budget) is not None:  # measured here, where a failure ends this text alone
                self.model.routed.table(self.model.routed, self._batch)
            deeper = self._prompt_layers(text)
            model = self.model.routed.backbone.model
            sampler = Sampler(model, len(text.prompt), text.temperature, text.seed, **text.options)
            row = Row(text.prompt, executed, sampler, text.limit, self._ends, deeper)
            pieces = TextPieces(self._tokenizer, () if text.chat else text.prompt)
            self._decoder.add(row)
        except Exception as error:
            if not isinstance(error, ApiError | BuddyError):
                log.exception("A text could not begin.")
            text.emit(Piece(error=error))
            return
        self._running[row] = text, pieces

    def _prompt_layers(self, text: GenerationRequest) -> int | None:
        """K of the prompt's tokens, where it differs; the error names that field."""
        try:
            return None if text.prompt_budget is None else self.model.executed_layers(text.prompt_budget, text.prompt)
        except BudgetError as error:
            raise ApiError(str(error), field="prompt_budget", code="invalid_budget") from error

    def _keep_latencies(self) -> float | None:
        """Give the rows that asked for a latency as many layers as fit into it beside so many other rows.

        If even the smallest K is too slow, rows get the smallest K. The table's time is linear between one row and a
        full batch; it is corrected by how much longer steps took lately.

        Returns:
            The table's milliseconds of the next step, if a latency was asked for and no prompt is read in that step.
        """
        asked = {row: latency_of(text.budget) for row, (text, _) in self._running.items()}
        asked = {row: latency for row, latency in asked.items() if latency is not None}
        if not asked:
            return None
        routed = self.model.routed
        one, full = routed.table(routed), routed.table(routed, self._batch)
        share = (len(self._running) - 1) / max(1, self._batch - 1)
        table = {count: alone + share * (full[count] - alone) for count, alone in one.items()}
        for row, latency in asked.items():
            fits = [count for count, taken in table.items() if taken * self._slower <= latency]
            row.executed = max(fits, default=min(table))
        writes = all(text.written for text, _ in self._running.values())
        return table[max(row.executed for row in self._running)] if writes else None

    def _hand_out(self, written: Written, text: GenerationRequest, pieces: TextPieces) -> None:
        """Give what a step wrote to the owner of the text."""
        row, token = written.row, written.token
        if written.error is not None:
            raise written.error
        self._count(text, written)
        if token is None:
            return
        reason = written.finish_reason
        new = "" if token in self._ends else pieces.add(token)
        piece, stopped = text.cut(new + (pieces.rest() if reason else ""), final=bool(reason))
        logprob = self._logprob(text, written.logits, token, len(new))
        plan = "".join(str(int(runs)) for runs in written.record.runs[0, -1].tolist()) if text.plans else None
        if stopped:
            reason = "stop"
            self._decoder.remove([row])
        given = Piece(piece, logprob, plan, reason)
        if reason:
            self._finish(row, given)
        else:
            text.emit(given)

    def _finish(self, row: Row, piece: Piece) -> None:
        text, _ = self._running.pop(row)
        if not text.cancelled:
            text.emit(piece)

    def _count(self, text: GenerationRequest, written: Written) -> None:
        counts = written.executed
        text.ran.update(counts)
        now = time.monotonic()
        for executed, tokens in Counter(counts).items():
            self._metrics.step(executed, tokens)
        if written.token is None:
            return
        text.written += 1
        self._metrics.written.inc()
        if text.latest is None:
            self._metrics.first.observe(now - text.arrived)
        else:
            self._metrics.between.observe(now - text.latest)
        text.latest = now

    def _logprob(self, text: GenerationRequest, logits: Tensor, token: int, added: int) -> TokenLogprob | None:
        """Of a token that added so many characters to the text, where it was asked for."""
        top = text.top_logprobs
        if top is None:
            return None
        word = self._word(token)
        offset = text.characters + max(0, added - len(word))  # what it added begins with parts of characters
        text.characters += added
        logs = torch.log_softmax(logits, -1)
        best, ids = logs.topk(min(top, len(logs))) if top else (logs[:0], logs[:0].long())
        likeliest = (TokenLogprob(self._word(id), value) for id, value in zip(ids.tolist(), best.tolist(), strict=True))
        return TokenLogprob(word, float(logs[token]), tuple(likeliest), offset)

    def _word(self, token: int) -> str:
        """The text of a token behind another one: some tokenizers drop the space at the start of a text."""
        return str(self._tokenizer.decode([*self._before, token])).removeprefix(self._before_text)
