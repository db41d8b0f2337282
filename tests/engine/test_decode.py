"""Rows that join and leave a running batch write what each writes alone with transformers' `generate`."""

import itertools
import random
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from buddy import Context
from buddy.engine import decode, forward, hooks
from buddy.engine.batches import join
from buddy.engine.decode import Decoder, Row, Sampler, TextPieces
from buddy.engine.model import RoutedLM
from buddy.engine.transfer import to_host
from tests.engine.reference import Fickle, FickleGates, routed_tiny

LAYERS = 6


def alone(model: RoutedLM, row: Row, **options) -> list[int]:
    """The new tokens of transformers' `generate`."""
    ids = torch.tensor([row.prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    if row.prompt_executed:
        return deeper(model, row)
    with model.at(executed=[row.executed]):
        out = model.backbone.model.generate(ids, max_new_tokens=row.limit, **options)
    return out[0, len(row.prompt) :].tolist()


def deeper(model: RoutedLM, row: Row) -> list[int]:
    """The new tokens of a prompt that runs more layers than they do, step by step."""
    cache, ids, written = DynamicCache(config=model.backbone.base.config), torch.tensor([row.prompt]), []
    for step in range(row.limit):
        with torch.no_grad(), model.at(executed=[row.executed if step else row.prompt_executed]):
            logits = model.backbone.model(input_ids=ids, cache=cache, use_cache=True).logits
        written.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([written[-1:]])
    return written


def a_row(model: RoutedLM, draw: random.Random, longest: int = 24) -> Row:
    prompt = [draw.randrange(3, 259) for _ in range(draw.randint(1, longest))]
    sampler = Sampler(model.backbone.model, len(prompt))
    executed = draw.randint(model.geometry.always_on, LAYERS)
    prompt_executed = draw.choice((None, None, executed, LAYERS))
    return Row(prompt, executed, sampler, draw.randint(1, 14), prompt_executed=prompt_executed)


def play(model: RoutedLM, draw: random.Random, count: int, chunk: int, late: bool = False) -> list[Row]:
    """All rows, once each is done or has left: they come at random moments, and the layers of each step are checked."""
    decoder, coming, gone, there = Decoder(model, chunk, late), [a_row(model, draw) for _ in range(count)], [], []
    rows = list(coming)
    while coming or len(decoder):
        for _ in range(min(draw.choice((0, 0, 1, 1, 3)), len(coming))):
            there.append(coming.pop())
            decoder.add(there[-1])
        if there and draw.random() < 0.1:
            gone.append(draw.choice(there))
            decoder.remove(gone[-1:])
        for written in decoder.step():
            assert written.error is None
            executed, sinks = written.record.executed, written.record.sinks
            assert set(executed[~sinks].tolist()) <= {written.row.executed, written.row.prompt_executed}
            assert torch.equal(written.record.runs.sum(-1), executed)
    assert all(len(row.tokens) == row.limit or row in gone for row in rows)
    return rows


class PooledOnly(Fickle):
    """Scores that depend on the pooled states alone, and on their length too, which `Fickle` does not see."""

    def score(self, context: Context) -> torch.Tensor:
        return torch.sin(50 * context.pooled @ self.weight[: context.pooled.shape[-1]])


SETTINGS = [
    {},
    {"router": FickleGates},
    {"router": FickleGates, "reroute_every": 3},
    {"family": "gemma3"},
    {"policy": "zero"},
    {"family": "gemma2", "policy": "hole"},
    {"reroute_every": None, "prompt_plan": "shared"},
    {"sink_tokens": 0},
    {"sink_tokens": 0, "policy": "hole"},
    {"sink_tokens": 3, "router": PooledOnly},
    {"context_layer": 3, "policy": "hole", "family": "mistral-sliding"},
    {"bridges": True},
    {"bridges": True, "policy": "hole", "reroute_every": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_rows_that_come_and_go_write_what_they_write_alone(settings):
    model = routed_tiny(**settings)
    for seed in range(3):
        draw = random.Random(seed)
        rows = play(model, draw, 7, draw.choice((4, 16, 256)), late=seed != 1)
        assert [row.tokens for row in rows] == [alone(model, row)[: len(row.tokens)] for row in rows]


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("router", [Fickle, FickleGates])
def test_a_row_that_ran_every_layer_decides_when_it_gets_fewer(router, every):
    """As the scheduler does for latencies: other rows around it change nothing."""
    model, draw = routed_tiny(router=router, reroute_every=every), random.Random(11)
    for _ in range(3):
        prompt = [draw.randrange(3, 259) for _ in range(draw.randint(2, 20))]
        plans = []
        for others in (0, 2):
            decoder = Decoder(model)
            row = Row(prompt, LAYERS, Sampler(model.backbone.model, len(prompt)), 9)
            for _ in range(others):
                decoder.add(Row(prompt[::-1], 3, Sampler(model.backbone.model, len(prompt)), 9))
            decoder.add(row)
            runs = []
            while len(decoder):
                runs += [each.record.runs[0, -1].tolist() for each in decoder.step() if each.row is row]
                row.executed = 4 if len(row.tokens) >= 3 else LAYERS
            plans.append((row.tokens, runs))
        assert plans[0] == plans[1]
        assert [sum(each) for each in plans[0][1]][-6:] == [4] * 6


def test_sampling_draws_what_transformers_draws():
    model, prompt = routed_tiny(), list(range(3, 12))
    filtered = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.3}
    for late, options in itertools.product((False, True), (filtered, {"temperature": 1.3})):
        row = Row(prompt, 4, Sampler(model.backbone.model, len(prompt), seed=5, **options), 9)
        torch.manual_seed(5)
        expected = alone(model, row, do_sample=True, **options)
        decoder = Decoder(model, read_late=late)
        decoder.add(row)
        while len(decoder):
            decoder.step()
        assert row.tokens == expected


def test_a_row_of_one_token_joins_no_batch(monkeypatch):
    model, joins = routed_tiny(), []
    monkeypatch.setattr("buddy.engine.decode.join", lambda *given: joins.append(given) or join(*given))
    decoder = Decoder(model)
    long, short = (Row([5, 6, 7], 4, Sampler(model.backbone.model, 3), limit) for limit in (3, 1))
    decoder.add(long)
    decoder.step()
    decoder.add(short)
    while len(decoder):
        decoder.step()
    assert (len(long.tokens), len(short.tokens), len(joins)) == (3, 1, 1)
    assert short.tokens == alone(model, short)


class Spaced:
    """Decodes as SentencePiece tokenizers of Llama 2 and Mistral do: a text's first space is dropped."""

    words = ("▁I", "▁saw", "▁the", "▁cat", "s", "<end>")

    def decode(self, tokens, skip_special_tokens=False):
        words = [self.words[token] for token in tokens if not (skip_special_tokens and token == 5)]
        return "".join(words).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize(("before", "expected"), [([0, 1], " the cats"), ([], "the cats")])
def test_the_space_between_a_prompt_and_what_continues_it(before, expected):
    pieces = TextPieces(Spaced(), before)
    found = [pieces.add(token) for token in (2, 3, 4, 5)]
    assert "".join([*found, pieces.rest()]) == expected
    assert found[-1] == ""


@pytest.mark.parametrize("executed", [4, LAYERS])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("others", [0, 2])
def test_a_row_ends_at_the_tokens_that_end_it(late, executed, others):
    model = routed_tiny()
    row, *more = rows = [Row([5, 6, 7 + i], executed, Sampler(model.backbone.model, 3), 12) for i in range(1 + others)]
    expected = alone(model, row)
    row.ends = frozenset({expected[4]})
    decoder, given = Decoder(model, read_late=late), []
    for each in rows:
        decoder.add(each)
    while len(decoder):
        given += [(each.row, each.token, each.finish_reason) for each in decoder.step()]
    assert row.finish_reason == "stop"
    assert row.tokens == expected[: expected.index(expected[4]) + 1]
    assert [token for of, token, _ in given if of is row] == row.tokens
    assert [reason for of, _, reason in given if of is row][-2:] == [None, "stop"]
    assert [each.tokens for each in more] == [alone(model, each) for each in more]


class Faulty(Fickle):
    """Fails where a token with id 200 is read."""

    def score(self, context):
        if bool((context.tokens == 200).any()):
            raise ValueError("token 200")
        return super().score(context)


@pytest.mark.filterwarnings("ignore:A step of")
@pytest.mark.parametrize("late", [False, True])
def test_a_row_that_fails_ends_no_other(late):
    model = routed_tiny(router=Faulty)
    draw, decoder = random.Random(3), Decoder(model, read_late=late)
    rows = [a_row(model, draw) for _ in range(5)]
    for row in rows:
        row.prompt, row.limit = [token for token in row.prompt if token != 200] or [7], 12
        row.executed, row.prompt_executed = min(row.executed, LAYERS - 1), None
        decoder.add(row)
    failed, counted = [], Counter()

    def step():
        for each in decoder.step():
            counted[rows.index(each.row)] += len(each.executed)
            failed.extend([each.row] if each.error else [])

    step()
    step()
    rows[2].sampler = lambda *_: torch.tensor(200)
    while len(decoder):
        step()
    assert failed == [rows[2]]
    sinks = model.settings.sink_tokens
    for number in (0, 1, 3, 4):
        assert counted[number] == len(rows[number].prompt) + len(rows[number].tokens) - 1 - sinks, "each token once"
    for row in rows[:2] + rows[3:]:
        model.router.__class__ = Fickle
        expected = alone(model, row)
        assert 200 not in expected[:-1]
        assert row.tokens == expected


@pytest.mark.filterwarnings("ignore:.*rows are read again")
@pytest.mark.parametrize("late", [False, True])
def test_rows_that_cannot_join_are_read_again(late, monkeypatch):
    model, draw = routed_tiny(), random.Random(5)
    rows, decoder, calls, given = [a_row(model, draw) for _ in range(4)], Decoder(model, read_late=late), [], []

    def failing(*args):
        calls.append(args)
        if len(calls) in (2, 5):
            raise MemoryError
        return join(*args)

    monkeypatch.setattr("buddy.engine.decode.join", failing)
    for row in rows:
        decoder.add(row)
    while len(decoder):
        steps = decoder.step()
        assert not any(written.error for written in steps)
        chosen = [written.row for written in steps if written.token is not None]
        assert late or len(chosen) == len(set(chosen)), "one token a step"
        given += [(written.row, written.token) for written in steps if written.token is not None]
    assert len(calls) > 5
    assert [row.tokens for row in rows] == [alone(model, row) for row in rows]
    assert [[token for of, token in given if of is row] for row in rows] == [row.tokens for row in rows]


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [4, 6, 5]])
@pytest.mark.parametrize("executed", [4, LAYERS])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_waits_for_scores_alone(late, lengths, executed, temperature, monkeypatch):
    """The tokens of a step are copied to the host, and read when the next forward has begun."""
    model, seen, waited = routed_tiny(policy="fill"), [], []
    decoder = Decoder(model, read_late=late)
    rows = []
    for seed, length in enumerate(lengths):
        prompt = [5, 6, 7, 8, 9, seed][-length:]
        rows.append(Row(prompt, executed, Sampler(model.backbone.model, 4, temperature, seed), 99))
        decoder.add(rows[-1])
    for _ in range(3):
        decoder.step()
    for module in (decode, forward, hooks):
        monkeypatch.setattr(module, "to_host", lambda values: waited.append("scores") or to_host(values))
    for name in ("tolist", "cpu", "numpy"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda values, own=own: seen.append("read") or own(values))
    model.backbone.model.get_output_embeddings().register_forward_hook(lambda *_: seen.append("head"))
    with Waits() as waits:
        written = decoder.step()
    assert [len(each.executed) for each in written] == [1] * len(lengths)
    routes = executed < LAYERS
    assert seen == ["read"] * routes + ["head", "read"]
    assert waited == ["scores"] * routes
    assert waits.number == 0
    assert [row.unread for row in rows] == [late] * len(rows)


class Waits(TorchDispatchMode):
    """Counts the operations that wait for the device: a value as a Python number, and shapes that depend on values."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = args[1] if function is torch.ops.aten.index.Tensor else ()
        indexed = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.number += indexed or function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        return function(*args, **(kwargs or {}))
