"""OpenAI's requests and answers, with `budget` and `plans` beside what they have."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from buddy.hub.load import MIN_TEMPERATURE
from buddy.serve.scheduler import GenerationRequest, Piece, TokenLogprob

NAME = "buddy"  # of the model; NAME@BUDGET asks for a budget
Stop = str | Annotated[list[str], Field(max_length=16)]
Words = Annotated[str, Field(max_length=1_000_000)]
Ids = Annotated[list[int], Field(min_length=1)]


def _not_offered(value: Any) -> Any:
    if value not in (None, False, 0, {}, [], "", "none", "auto", {"type": "text"}):
        raise ValueError("this server does not offer it; leave it out")
    return value


NotOffered = Annotated[Any, AfterValidator(_not_offered)]  # would change the answer, so it is not ignored


class _Plain(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(_Plain):
    """Of a streamed answer; without `include_usage` only the last chunk has `usage`."""

    include_usage: bool = False


class TextRequest(_Plain):
    """What completions and chat completions have in common; other fields are ignored, as vLLM does.

    Attributes:
        budget: of each token; else the model's name or the server's default gives it.
        prompt_budget: of the prompt's tokens, where it differs.
        plans: give the layers that ran for each token.
    """

    model: str = NAME
    budget: str | float | None = None
    prompt_budget: str | float | None = None
    plans: bool = False
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    n: int | None = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    frequency_penalty: NotOffered = None
    presence_penalty: NotOffered = None
    logit_bias: NotOffered = None
    response_format: NotOffered = None

    @property
    def limit_name(self) -> str:
        """The field that limits the new tokens."""
        return "max_tokens"

    @property
    def stops(self) -> list[str]:
        """The strings that end a text."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    def sampling(self, number: int, model: Any) -> dict[str, Any]:
        """temperature, seed and options of the text of that number."""
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63 + number
        top_k = self.top_k if self.top_k is not None else model.generation_config.top_k or 0
        options = {"top_p": self.top_p or 1.0, "top_k": max(0, top_k)}
        temperature = max(temperature, MIN_TEMPERATURE) if temperature else 0.0
        return {"temperature": temperature, "seed": seed, "options": options}


class CompletionRequest(TextRequest):
    """`/v1/completions`."""

    prompt: Words | Ids | Annotated[list[Words], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: NotOffered = None
    suffix: NotOffered = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def top_count(self) -> int | None:
        """How many likeliest tokens are shown with each; None for no logarithms."""
        return self.logprobs


class Part(_Plain):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Words


class Message(_Plain):
    """One message of a chat."""

    role: Annotated[str, Field(max_length=64)]
    content: Words | list[Part]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(TextRequest):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: NotOffered = None
    tool_choice: NotOffered = None
    functions: NotOffered = None
    modalities: Annotated[list[Literal["text"]] | None, Field(max_length=1)] = None

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def top_count(self) -> int | None:
        """How many likeliest tokens are shown with each; None for no logarithms."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Answer:
    """Makes the JSON of one request's answer, whole or chunk by chunk.

    Args:
        chat: whether of chat completions.
        request: the request.
        texts: its choices, in order.
        prompt_tokens: of all its prompts, each counted once.
    """

    def __init__(
        self, chat: bool, request: TextRequest, texts: Sequence[GenerationRequest], prompt_tokens: int
    ) -> None:
        self._chat, self._texts, self._prompt_tokens = chat, texts, prompt_tokens
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        name = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}
        self._whole = {**name, "object": kind}
        self._part = {**name, "object": f"{kind}.chunk" if chat else kind}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, and the layers that each routed token ran."""
        ran, written = Counter[int](), sum(text.written for text in self._texts)
        for text in self._texts:
            ran += text.ran
        mean = sum(layers * tokens for layers, tokens in ran.items()) / max(1, ran.total())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
            "executed_layers": {"min": min(ran, default=0), "mean": mean, "max": max(ran, default=0)},
        }

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The answer from all pieces of each text."""
        choices = []
        for index, each in enumerate(pieces):
            content = "".join(piece.text for piece in each)
            body = {"message": {"role": "assistant", "content": content}} if self._chat else {"text": content}
            choices.append({"index": index, **body, **self._rest(index, each)})
        return {**self._whole, "choices": choices, "usage": self.usage}

    def first(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": i, "delta": delta, "finish_reason": None}) for i in range(len(self._texts))]

    def chunk(self, index: int, piece: Piece, usage: bool) -> dict[str, Any]:
        """One piece of a text, with `usage` or without."""
        body = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
        chunk = self._chunk({"index": index, **body, **self._rest(index, [piece])})
        return {**chunk, "usage": self.usage} if usage else chunk

    def end(self) -> dict[str, Any]:
        """The chunk of `include_usage`."""
        return {**self._part, "choices": [], "usage": self.usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._part, "choices": [choice]}

    def _rest(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Logarithms, plans and the reason of the end."""
        text, logs = self._texts[index], [piece.logprob for piece in pieces if piece.logprob is not None]
        found: Any = None
        if text.top_logprobs is not None:
            found = {"content": [_chat_logprob(each) for each in logs], "refusal": None}
            found = found if self._chat else _completion_logprobs(logs)
        plans = {"plans": [piece.plan for piece in pieces if piece.plan is not None]} if text.plans else {}
        return {"logprobs": found, "finish_reason": pieces[-1].finish_reason if pieces else None, **plans}


def _completion_logprobs(logs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [each.token for each in logs],
        "token_logprobs": [each.logprob for each in logs],
        # The likeliest last: parts of characters have the same text.
        "top_logprobs": [{top.token: top.logprob for top in reversed(each.top)} for each in logs],
        "text_offset": [each.offset for each in logs],
    }


def _chat_logprob(each: TokenLogprob) -> dict[str, Any]:
    return {**_shown_logprob(each), "top_logprobs": [_shown_logprob(top) for top in each.top]}


def _shown_logprob(each: TokenLogprob) -> dict[str, Any]:
    return {"token": each.token, "logprob": each.logprob, "bytes": each.bytes}
