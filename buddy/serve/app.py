"""The HTTP interface: OpenAI's paths, `/health`, `/metrics` and the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from buddy.budget import Budget, auto_cap, format_budget, latency_of
from buddy.errors import BuddyError, BudgetError
from buddy.hub.load import Model, Prompt
from buddy.metrics.perplexity import keys_of
from buddy.router import available_budgets
from buddy.serve.guard import ERRORS, ApiError, ClientLeft, Guard, Metrics, answer_error, shown_error
from buddy.serve.protocol import NAME, Answer, ChatRequest, CompletionRequest
from buddy.serve.scheduler import GenerationRequest, Piece, Scheduler, batch_plan_of

DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI has it
Numbered = tuple[int, Piece, bool]  # the number of a text, a piece of it, whether it is the last of all texts
POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
LONGEST_BUDGET = 64  # in the name of a model, which each chunk of a stream repeats
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        batch: texts that are written at the same time.
        queue: texts that wait, and so those of one request.
        tokens: new tokens of a text.
        seconds: from a request to its end.
    """

    batch: int = 8
    queue: int = 128
    tokens: int = 4096
    seconds: float = 600.0


class _EventStream(StreamingResponse):
    """Server-sent events of some texts, whose rows are freed when the client has left."""

    def __init__(self, events: AsyncGenerator[str], scheduler: Scheduler, texts: Sequence[GenerationRequest]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._scheduler, self._texts = events, scheduler, texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._scheduler.cancel(self._texts)
            await self._events.aclose()


class Server:
    """What the paths do.

    Args:
        scheduler: writes texts.
        budget: the default.
        prompt_budget: the default of prompts, where it differs.
        budgets: those that /v1/models lists.
        limits: of requests.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        budget: Budget,
        prompt_budget: Budget | None,
        budgets: Sequence[str],
        limits: Limits,
    ) -> None:
        self._model = scheduler.model  # its tokenizer and settings alone: the scheduler's thread runs it
        self._scheduler, self._limits = scheduler, limits
        self._budget, self._prompt_budget = budget, prompt_budget
        self._names = [NAME, *(f"{NAME}@{each}" for each in budgets)]

    def models(self) -> dict[str, Any]:
        """`/v1/models`."""
        return {"object": "list", "data": [self.model(name) for name in self._names]}

    def model(self, name: str) -> dict[str, Any]:
        """One of them, with the sizes that the page draws.

        Raises:
            ApiError: no such model.
        """
        self._checked_budget(self.named(name), "model")
        geometry = self._model.routed.geometry
        depth = {"layers": geometry.layers, "always_first": geometry.context_layer, "always_on": geometry.always_on}
        return {"id": name, "object": "model", "created": 0, "owned_by": "buddy", **depth}

    def named(self, name: str) -> Budget | None:
        """The budget in a model's name.

        Raises:
            ApiError: another name.
        """
        first, at, budget = name.partition("@")
        if first != NAME or (at and not budget) or len(budget) > LONGEST_BUDGET:
            raise ApiError(
                f"There is no model {name[:80]!r}; use {NAME!r}, or {NAME}@BUDGET.", 404, "model", "model_not_found"
            )
        return budget or None

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """`/v1/completions`."""
        several = "prompt" if len(asked.prompts) > self._limits.queue else "n"
        self._check_count(len(asked.prompts) * (asked.n or 1), several)
        prompts = [await self._encoded(each) if isinstance(each, str) else each for each in asked.prompts]
        vocabulary = self._model.routed.backbone.model.config.get_text_config().vocab_size
        if any(not 0 <= id < vocabulary for prompt in prompts for id in prompt):
            raise ApiError(f"A token id is not from 0 to {vocabulary - 1}.", field="prompt")
        limit = asked.max_tokens or min(DEFAULT_TOKENS, self._room(prompts))
        return await self._answer(asked, request, prompts, "prompt", limit)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """`/v1/chat/completions`."""
        self._check_count(asked.n or 1, "n")
        if not self._model.routed.tokenizer.chat_template:
            raise ApiError("This model has no chat template; use /v1/completions.", field="messages")
        try:
            prompt = await self._encoded([message.plain for message in asked.messages])
        except BuddyError as error:
            raise ApiError(str(error), field="messages") from error
        limit = asked.max_completion_tokens or asked.max_tokens or self._room([prompt])
        return await self._answer(asked, request, [prompt], "messages", limit)

    async def _encoded(self, prompt: Prompt) -> list[int]:
        """Token ids, by another thread: a text of megabytes takes seconds, and other answers go on."""
        return await asyncio.to_thread(self._model.encode, prompt)

    def _room(self, prompts: Sequence[list[int]]) -> int:
        """The most new tokens that the server and the backbone allow after these prompts, at least 1."""
        longest = max(map(len, prompts), default=0)
        return max(1, min(self._limits.tokens, self._model.routed.backbone.context_length - longest))

    async def _answer(
        self,
        asked: CompletionRequest | ChatRequest,
        request: Request,
        prompts: Sequence[list[int]],
        field: str,
        limit: int,
    ) -> Response:
        self._check(prompts, field, limit, asked.limit_name)
        named, budget = self.named(asked.model), asked.budget
        given = self._checked_budget(named, "model") if budget is None else self._checked_budget(budget, "budget")
        budget = given or self._budget
        deeper = self._checked_budget(asked.prompt_budget, "prompt_budget") or self._prompt_budget
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        prompts = [prompt for prompt in prompts for _ in range(asked.n or 1)]
        texts = []
        for index, prompt in enumerate(prompts):

            def emit(piece: Piece, index: int = index) -> None:
                with suppress(RuntimeError):  # the server was stopped at once, and its loop is closed
                    loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

            sampling = asked.sampling(index, self._model.routed.backbone.model)
            options = {**sampling, "stops": asked.stops, "top_logprobs": asked.top_count, "plans": asked.plans}
            options |= {"prompt_budget": deeper, "chat": field == "messages"}
            texts.append(GenerationRequest(prompt, budget, limit, emit, self._limits.seconds, **options))
        answer = Answer(field == "messages", asked, texts, sum(map(len, prompts)) // (asked.n or 1))
        self._scheduler.submit(texts)
        try:
            pieces = self._pieces(queue, len(texts), request)
            if not asked.stream:
                found: list[list[Piece]] = [[] for _ in texts]
                async for index, piece, _ in pieces:
                    found[index].append(piece)
                return JSONResponse(answer.whole(found))
            first = await anext(pieces)  # an error before any text has a status of its own
        except BaseException:
            self._scheduler.cancel(texts)
            raise
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _EventStream(self._events(answer, first, pieces, usage), self._scheduler, texts)

    def _check_count(self, count: int, field: str) -> None:
        most = max(self._limits.queue, self._limits.batch)
        if count > most:
            raise ApiError(f"These are {count} texts; ask for {most} at most.", field=field)

    def _check(self, prompts: Sequence[list[int]], field: str, limit: int, name: str) -> None:
        if limit > self._limits.tokens:
            raise ApiError(f"{name} is {limit}; this server allows {self._limits.tokens}.", field=name)
        for prompt in prompts:
            if not prompt:
                raise ApiError("The prompt is empty; give some text to continue.", field=field)
            try:
                self._model.check_length(len(prompt), limit, name)
            except BuddyError as error:
                raise ApiError(str(error), field=field, code="context_length_exceeded") from error

    def _checked_budget(self, budget: Budget | None, field: str) -> Budget | None:
        """The budget; what can be known of it without the model is checked at once."""
        if isinstance(budget, str) and len(budget) > LONGEST_BUDGET:
            raise ApiError(f"{field} has {len(budget)} characters; give a budget such as 0.75.", field=field)
        try:
            # A latency may have to be measured, on the thread that has the model.
            if budget is not None and latency_of(auto_cap(budget) or budget) is None:
                keys_of(self._model.routed, [budget])
        except BudgetError as error:
            raise ApiError(str(error), field=field, code="invalid_budget") from error
        return budget

    @staticmethod
    async def _pieces(queue: asyncio.Queue, count: int, request: Request) -> AsyncGenerator[Numbered]:
        """All pieces of the texts as they come.

        Raises:
            ApiError: a text failed.
            ClientLeft: the client has disconnected.
        """

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            queue.put_nowait((0, Piece(error=ClientLeft())))

        watching = asyncio.create_task(watch())
        try:
            while count:
                index, piece = await queue.get()
                if piece.error is not None:
                    raise shown_error(piece.error)
                count -= piece.finish_reason is not None
                yield index, piece, not count
        finally:
            watching.cancel()

    @staticmethod
    async def _events(
        answer: Answer, first: Numbered, pieces: AsyncGenerator[Numbered], usage: bool
    ) -> AsyncGenerator[str]:
        try:
            for chunk in answer.first():
                yield _event(chunk)
            index, piece, last = first
            yield _event(answer.chunk(index, piece, last and not usage))  # once only: a client may add up what it finds
            async with aclosing(pieces):
                async for index, piece, last in pieces:
                    yield _event(answer.chunk(index, piece, last and not usage))
            if usage:
                yield _event(answer.end())
        except ApiError as error:
            yield _event(error.body)
        except ClientLeft:
            return
        yield "data: [DONE]\n\n"


def make_app(
    load: Callable[[], Model],
    budget: Budget = 1.0,
    budgets: Sequence[float] = (),
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    batch_plan: str | None = None,
    prompt_budget: Budget | None = None,
) -> FastAPI:
    """The application for a model, which is loaded on a thread of its own that ends with it.

    Args:
        load: gives the model, such as `lambda: buddy.load("runs/quickstart/buddy")`; nobody else may use it meanwhile.
        budget: where a request names none.
        budgets: that /v1/models lists, if the router can serve them; "auto" is added where there is a budget predictor.
        limits: of requests.
        keys: API keys; empty: none is needed.
        batch_plan: "shared", one plan for all texts of a batch, or "row", one for each; None for "shared", or for
            "row" where the run holds budgets in the mean over tokens, which a shared plan cannot.
        prompt_budget: of prompts, where a request names none; None for the request's budget.

    Raises:
        BuddyError: a default budget cannot be used, or what `load` raises.
    """
    limits, metrics = limits or Limits(), Metrics()

    def checked() -> Model:
        model = load()
        routed = model.routed
        with routed.changed(batch_plan=batch_plan or batch_plan_of(routed)):
            keys_of(routed, [budget] if prompt_budget is None else [budget, prompt_budget])  # raises BudgetError
            if latency_of(budget) is not None:
                routed.table(routed, limits.batch)  # that of one text was measured above
        return model

    scheduler = Scheduler(checked, metrics, limits.batch, limits.queue, batch_plan)
    model = scheduler.model
    names = [format_budget(each) for each in available_budgets(model.routed.router, budgets)]
    auto = [] if model.routed.chooser is None else ["auto"]
    server = Server(scheduler, budget, prompt_budget, [*names, *auto], limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        scheduler.close()

    # FastAPI's own pages load scripts from other hosts.
    handlers: dict[int | type[Exception], Any] = dict.fromkeys(ERRORS, answer_error)
    app = FastAPI(title="Buddy", lifespan=lifespan, docs_url=None, redoc_url=None, exception_handlers=handlers)
    app.state.scheduler = scheduler
    app.add_middleware(Guard, metrics=metrics, keys=keys)

    app.post("/v1/completions")(server.complete)
    app.post("/v1/chat/completions")(server.chat)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name}")(server.model)

    @app.get("/health")
    async def health() -> Response:
        alive = scheduler.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.text())

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"Content-Security-Policy": POLICY})

    return app


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
