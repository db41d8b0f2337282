"""What rows of one batch have in common: a shared plan, and the layers that fit into a latency."""

import queue
import random
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from buddy.engine.decode import Decoder
from tests.serve.conftest import tiny

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from prometheus_client.parser import text_string_to_metric_families

from buddy.serve import scheduler as scheduler_module
from buddy.serve.guard import Metrics
from buddy.serve.scheduler import GenerationRequest, Scheduler


@contextmanager
def scheduling(model, metrics=None, **options):
    scheduler = Scheduler(lambda: model, metrics or Metrics(), **options)
    try:
        yield scheduler
    finally:
        scheduler.close()


def written(scheduler, *asked):
    """The plans of each text's new tokens, as lists of 0 and 1, for texts that begin at the same step."""
    pieces = [queue.SimpleQueue() for _ in asked]
    texts = [
        GenerationRequest(prompt, budget, limit, each.put, plans=True)
        for (prompt, budget, limit), each in zip(asked, pieces, strict=True)
    ]
    scheduler.submit(texts)
    found = []
    for each in pieces:
        plans = []
        while True:
            piece = each.get(timeout=60)
            assert piece.error is None
            plans.append([int(runs) for runs in piece.plan])
            if piece.finish_reason:
                break
        found.append(plans)
    return found


def prompts(count, length=12):
    draw = random.Random(3)
    return [[draw.randrange(3, 259) for _ in range(length)] for _ in range(count)]


def test_texts_of_one_batch_share_a_plan_and_run_the_best_of_it():
    first, second, third = prompts(3)
    with scheduling(tiny(), batch_plan="shared") as scheduler:
        few, same, more = written(scheduler, (first, "3layers", 12), (second, "3layers", 12), (third, "5layers", 12))
    for one, two, three in list(zip(few, same, more, strict=True))[1:]:  # prompts are read one by one
        assert one == two
        assert sum(one) == 3
        assert sum(three) == 5
        assert all(three[layer] for layer, runs in enumerate(one) if runs)


def test_with_a_plan_a_row_texts_do_not_depend_on_each_other():
    first, second = prompts(2)
    with scheduling(tiny(), batch_plan="row") as scheduler:
        (alone,) = written(scheduler, (first, "3layers", 12))
        beside, other = written(scheduler, (first, "3layers", 12), (second, "3layers", 12))
    assert alone == beside != other


@pytest.mark.parametrize(("over", "batch_plan"), [(1, "shared"), (16, "row")])
def test_budgets_in_the_mean_have_a_plan_for_each_row(over, batch_plan):
    model, (first, second) = tiny(), prompts(2)
    with model.routed.changed(mean_over=over):
        found = []
        for plan in (None, batch_plan):
            with scheduling(model, batch_plan=plan) as scheduler:
                found.append(written(scheduler, (first, "3layers", 12), (second, "3layers", 12)))
    assert found[0] == found[1]
    first, second = (plans[1:] for plans in found[0])  # prompts are read one by one
    assert (first == second) == (batch_plan == "shared")


def test_metrics_count_the_layers_of_each_token_of_a_mean():
    model, metrics, (prompt,) = tiny(), Metrics(), prompts(1, length=30)
    with model.routed.changed(mean_over=8):
        with scheduling(model, batch_plan="row", metrics=metrics) as scheduler:
            written(scheduler, (prompt, "3layers", 1))
        wanted = Counter(model.routed(torch.tensor([prompt]), executed=torch.tensor([3])).executed[0, 1:].tolist())
    families = {each.name: each.samples for each in text_string_to_metric_families(metrics.text().decode())}
    tokens = {int(each.labels["budget"]): each.value for each in families["buddy_tokens"] if "total" in each.name}
    assert len(wanted) > 1
    assert tokens == wanted


def answers(scheduler, *asked):
    """The pieces of each text, up to the one that ends it."""
    queues = [queue.SimpleQueue() for _ in asked]
    scheduler.submit(
        [GenerationRequest(*given, each.put, **more) for (*given, more), each in zip(asked, queues, strict=True)]
    )
    found = [[each.get(timeout=60)] for each in queues]
    for pieces, each in zip(found, queues, strict=True):
        while not (pieces[-1].finish_reason or pieces[-1].error):
            pieces.append(each.get(timeout=60))
    return found


def test_a_stop_string_before_the_limit_ends_no_other_text(monkeypatch):
    """Where tokens are read late, the step that gives the token before the limit also gives the last one."""
    first, second = prompts(2)
    drawn = {"temperature": 1.0, "seed": 3}
    with scheduling(tiny(), batch_plan="row") as scheduler:
        (pieces,) = answers(scheduler, (first, "3layers", 12, drawn))
    texts = [piece.text for piece in pieces]
    number = next(n for n in range(1, 11) if texts[n].strip() and texts[n] not in "".join(texts[:n]))
    monkeypatch.setattr(scheduler_module, "Decoder", partial(Decoder, read_late=True))
    with scheduling(tiny(), batch_plan="row") as scheduler:
        stopped, other = answers(
            scheduler, (first, "3layers", number + 2, drawn | {"stops": [texts[number]]}), (second, "3layers", 12, {})
        )
    assert stopped[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in stopped) == "".join(texts[:number])
    assert other[-1].finish_reason == "length"


def test_a_text_that_cannot_begin_ends_no_other(monkeypatch):
    first, second = prompts(2)
    pieces_of = scheduler_module.TextPieces

    def failing(tokenizer, tokens):
        if list(tokens) == first:
            raise ValueError("its text cannot be decoded")
        return pieces_of(tokenizer, tokens)

    monkeypatch.setattr(scheduler_module, "TextPieces", failing)
    with scheduling(tiny()) as scheduler:
        answers = queue.SimpleQueue()
        text = GenerationRequest(first, "3layers", 4, answers.put)
        other = queue.SimpleQueue()
        scheduler.submit([text, GenerationRequest(second, "3layers", 4, other.put)])
        assert isinstance(answers.get(timeout=60).error, ValueError)
        assert [other.get(timeout=60).error for _ in range(4)] == [None] * 4


@pytest.fixture
def clock(monkeypatch):
    """A step takes as many milliseconds as its longest row has layers, twice that with more rows, times `speed`."""
    clock = SimpleNamespace(now=0.0, speed=1.0)
    step = Decoder.step

    def timed(decoder):
        counts = [row.executed for batch in decoder._batches.values() for row in batch.owners]
        clock.now += 1e-3 * clock.speed * max(counts, default=0) * (1 + (len(counts) > 1))
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", timed)
    times = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock.now)
    monkeypatch.setattr(scheduler_module, "time", times)
    return clock


def with_table():
    model = tiny()
    model.routed.table = lambda _, texts=1: {k: k * (1.0 if texts == 1 else 2.0) for k in range(2, 7)}
    return model


def test_a_latency_buys_fewer_layers_beside_other_texts(clock):
    first, *others = prompts(4)
    with scheduling(with_table(), batch=4) as scheduler:
        plans, *_ = written(scheduler, (first, "6ms", 40), *((prompt, "3layers", 5) for prompt in others))
        counts = [sum(plan) for plan in plans]
        assert counts[1:4] == [3, 3, 3]  # four rows: 2 ms per layer
        assert counts[-1] == 6  # alone: 1 ms per layer
        assert counts[1:] == sorted(counts[1:])
        hurried, *_ = written(scheduler, (first, "3ms", 5), *((prompt, "3layers", 9) for prompt in others))
        assert [sum(plan) for plan in hurried[1:]] == [2] * 4  # the fewest where none fits


def test_a_latency_holds_on_a_machine_that_has_become_slower(clock):
    clock.speed = 1.9
    with scheduling(with_table()) as scheduler:
        (plans,) = written(scheduler, (prompts(1)[0], "6ms", 60))
        counts = [sum(plan) for plan in plans]
        assert counts[1] == 6
        assert counts[-1] == 3  # 1.9 ms per layer
        clock.speed = 1.0
        (plans,) = written(scheduler, (prompts(1)[0], "6ms", 60))
        assert sum(plans[-1]) > 4
