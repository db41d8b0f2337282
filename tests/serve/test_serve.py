"""`buddy serve`, as its clients meet it: the openai package, plain HTTP, the command."""

import asyncio
import json
import math
import random
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from buddy.cli import app  # noqa: E402
from buddy.errors import BuddyError  # noqa: E402
from buddy.run import read_run  # noqa: E402
from buddy.serve.app import Limits  # noqa: E402
from buddy.serve.guard import ApiError, Guard, Metrics  # noqa: E402
from buddy.serve.scheduler import GenerationRequest, Scheduler  # noqa: E402
from buddy.serve.server import read_keys, serve  # noqa: E402
from tests.engine.reference import Fickle  # noqa: E402
from tests.serve.conftest import serving, tiny  # noqa: E402
from tests.small import fork_buddy, wait_until  # noqa: E402
from tests.tiny import tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.slow
PROMPT = "budget depth layer router"
BAD = tiny_tokenizer()("!").input_ids[0]
GREEDY = {"model": "buddy", "prompt": PROMPT, "temperature": 0, "max_tokens": 9}
CHAT = {"model": "buddy", "messages": [{"role": "user", "content": "plan"}], "temperature": 0, "max_tokens": 7}


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def command(finished, tmp_path):
    """The process of `buddy serve`, which answers by now, and its address."""
    with fork_buddy("serve", "--run", str(finished / "buddy"), "--port", "0", folder=tmp_path) as process:
        try:
            found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)))
            wait_until(lambda: answers_health(found[0]))
            yield process, found[0]
        finally:
            process.kill()


def post(address, path="completions", **body):
    return httpx.post(f"{address}/v1/{path}", json=body, timeout=60)


def events(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# What is written


@pytest.mark.parametrize("budget", ["1.0", "0.5", "4layers"])
def test_completions_equal_generate(client, alone, budget):
    expected = alone.generate(PROMPT, budget, max_new_tokens=9)
    whole = client.completions.create(**GREEDY, extra_body={"budget": budget})
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    parts = list(client.completions.create(**GREEDY, stream=True, extra_body={"budget": budget}))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"
    executed = alone.routed.executed_layers(budget)
    for usage in (whole.usage, parts[-1].usage):
        assert usage.executed_layers == {"min": executed, "mean": executed, "max": executed}
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 9)


def test_chat_equals_generate(client, alone):
    expected = alone.generate(CHAT["messages"], 0.5, max_new_tokens=7)
    request = CHAT | {"model": "buddy@0.5"}
    assert client.chat.completions.create(**request).choices[0].message.content == expected
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(**request, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[0].choices[0].delta.role == "assistant"
    assert (last.choices, last.usage.completion_tokens) == ([], 7)
    assert all(part.usage is None for part in parts)


def test_budgets_by_field_by_name_and_by_default(alone):
    with serving(tiny(), budget="3layers", budgets=["1", "0.5"]) as (address, _):
        assert [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]] == ["buddy", "buddy@1", "buddy@0.5"]
        for asked, executed in (({}, 3), ({"model": "buddy@4layers"}, 4), ({"model": "buddy@0.5", "budget": 1}, 6)):
            assert post(address, **(GREEDY | asked)).json()["usage"]["executed_layers"]["max"] == executed


def test_a_prompt_may_run_deeper(address):
    usage = post(address, **GREEDY, budget="3layers", prompt_budget=1).json()["usage"]
    assert (usage["executed_layers"]["min"], usage["executed_layers"]["max"]) == (3, 6)
    for wrong in ("7layers", "0.0001ms"):
        refused = post(address, **GREEDY, prompt_budget=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_budget")
    with serving(tiny(), prompt_budget=1) as (deep, _):
        for asked, executed in (({}, (3, 6)), ({"prompt_budget": 0.5}, (3, 3))):
            layers = post(deep, **GREEDY, budget="3layers", **asked).json()["usage"]["executed_layers"]
            assert (layers["min"], layers["max"]) == executed


def test_stop_strings_end_the_text_before_them(client, alone):
    text = alone.generate(PROMPT, max_new_tokens=9)
    stop = text[3:5]
    for stream in (False, True):
        found = client.completions.create(**GREEDY, stop=[stop, "never seen"], stream=stream)
        parts = list(found) if stream else [found]
        assert "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_a_token_that_ends_the_text_is_not_part_of_it(alone):
    model = tiny()
    prompt = torch.tensor([alone.encode(PROMPT)])
    ids = alone.routed.backbone.model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :].tolist()
    model.routed.backbone.model.generation_config.eos_token_id = ids[4]
    with serving(model) as (address, _):
        choice = post(address, **GREEDY).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == alone.routed.tokenizer.decode(ids[: ids.index(ids[4])])


def test_seeds_and_choices(client, alone):
    ask = {**GREEDY, "temperature": 0.9, "n": 3, "seed": 5, "extra_body": {"top_k": 50}}
    first, second = (client.completions.create(**ask) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert texts[0] == alone.generate(PROMPT, max_new_tokens=9, temperature=0.9, seed=5)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 27
    prompts = client.completions.create(**(GREEDY | {"prompt": [PROMPT, "plan"]}))
    assert [c.text for c in prompts.choices] == [alone.generate(p, max_new_tokens=9) for p in (PROMPT, "plan")]
    ids = alone.encode(PROMPT)
    assert client.completions.create(**(GREEDY | {"prompt": ids})).choices[0].text == prompts.choices[0].text


def test_logarithms_of_probabilities(client, alone):
    logits = alone.routed.dense(torch.tensor([alone.encode(PROMPT)]))[0, -1]
    expected, best = torch.log_softmax(logits, -1).max(-1)
    found = client.completions.create(**GREEDY, logprobs=2).choices[0].logprobs
    assert math.isclose(found.token_logprobs[0], expected.item(), abs_tol=1e-4)
    assert found.tokens[0] == alone.routed.tokenizer.decode([int(best)])
    for top in found.top_logprobs:
        assert 1 <= len(top) <= 2, "parts of characters have the same text"
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs, "greedy"
    choice = client.completions.create(**(GREEDY | {"max_tokens": 60, "temperature": 1.0}), logprobs=0).choices[0]
    offsets = choice.logprobs.text_offset
    assert offsets == sorted(offsets)
    absent = ("\ufffd", *alone.routed.tokenizer.all_special_tokens)  # parts of characters, and what no text shows
    placed = zip(choice.logprobs.tokens, offsets, strict=True)
    whole = [(word, at) for word, at in placed if not word.startswith(absent)]
    assert all(choice.text.startswith(word, at) for word, at in whole)
    assert len(whole) < 60, "the tiny model writes parts of characters"
    content = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 7
    assert all(each.top_logprobs[0].logprob == each.logprob for each in content)


def test_plans_on_request(address):
    plans = post(address, **GREEDY, budget="4layers", plans=True).json()["choices"][0]["plans"]
    assert len(plans) == 9
    assert {(len(plan), plan.count("1")) for plan in plans} == {(6, 4)}


# Many at the same time


def test_many_clients_get_what_each_would_get_alone(alone):
    """Random arrivals, budgets and lengths; some clients leave in the middle."""
    draw = random.Random(0)
    asked = [
        {
            "prompt": "".join(draw.choices("abcdefg ", k=draw.randint(1, 40))),
            "budget": f"{draw.randint(2, 6)}layers",
            "max_tokens": draw.randint(1, 20),
            "temperature": 0,
        }
        for _ in range(40)
    ]
    leaving, delays = [draw.random() < 0.2 for _ in asked], [draw.random() for _ in asked]

    def ask(number: int):
        time.sleep(delays[number])
        if not leaving[number]:
            return post(address, **asked[number])
        with httpx.stream("POST", f"{address}/v1/completions", json={**asked[number], "stream": True}) as response:
            next(response.iter_lines())

    with serving(tiny()) as (address, _), ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(asked))))
        wait_until(lambda: rows(address) == 0)
        metrics = httpx.get(f"{address}/metrics").text
    assert 'buddy_requests_total{path="/v1/completions",status="200"} 40.0' in metrics
    for request, answer in zip(asked, answers, strict=True):
        if answer is not None:
            expected = alone.generate(request["prompt"], request["budget"], max_new_tokens=request["max_tokens"])
            assert answer.json()["choices"][0]["text"] == expected
            layers = answer.json()["usage"]["executed_layers"]
            assert f"{layers['min']}layers" == f"{layers['max']}layers" == request["budget"] or not layers["max"]


def rows(address: str) -> float:
    """Rows of the running batch, as the metrics say."""
    return float(re.search(r"^buddy_rows (.+)$", httpx.get(f"{address}/metrics").text, re.M)[1])


class Slow(Fickle):
    def score(self, context):
        time.sleep(0.02)
        return super().score(context)


def test_a_client_that_leaves_frees_its_row_and_a_full_queue_refuses():
    long = {"prompt": PROMPT, "max_tokens": 400, "budget": 0.5}
    with serving(tiny(Slow), limits=Limits(batch=1, queue=1)) as (address, _):
        with httpx.stream("POST", f"{address}/v1/completions", json={**long, "stream": True}) as response:
            lines = response.iter_lines()  # kept, since the connection closes with it
            next(lines)
            wait_until(lambda: rows(address) == 1)
            waiting = threading.Thread(target=post, args=(address,), kwargs={**long, "max_tokens": 1})
            waiting.start()
            wait_until(lambda: "buddy_queue 1.0" in httpx.get(f"{address}/metrics").text)
            refused = post(address, **long)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            del lines
        waiting.join(timeout=5)  # the row was freed long before its 400 tokens
        assert not waiting.is_alive()
        client = httpx.Client(timeout=0.2)
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{address}/v1/completions", json=long)
        client.close()
        wait_until(lambda: rows(address) == 0, 2.0)


def test_a_long_prompt_is_encoded_beside_other_requests(monkeypatch):
    model, begun, others = tiny(), threading.Event(), threading.Event()
    encode = model.encode

    def slow(prompt):
        if "long" in prompt:
            begun.set()
            assert others.wait(20)
        return encode(prompt)

    monkeypatch.setattr(model, "encode", slow)
    with serving(model) as (address, _), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, address, **GREEDY | {"prompt": "long"})
        assert begun.wait(20)
        assert post(address, **GREEDY | {"prompt": "short"}).status_code == 200
        others.set()
        assert answer.result().status_code == 200


def test_a_text_that_is_written_or_waits_too_long_ends():
    slow = {"prompt": PROMPT, "max_tokens": 400, "budget": 0.5}
    with serving(tiny(Slow), limits=Limits(batch=1, seconds=0.4)) as (address, _), ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: post(address, **slow), range(3)))
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(504, "timeout")] * 3


class Faulty(Fickle):
    """Fails where an exclamation mark is read."""

    def score(self, context):
        if bool((context.tokens == BAD).any()):
            raise ValueError("a defect")
        return super().score(context)


def test_a_text_that_fails_ends_no_other(alone):
    model = tiny(Faulty)
    with serving(model) as (address, _), ThreadPoolExecutor(6) as pool:
        prompts = ["plan", "one! two", "router", "!", "layer"]
        answers = list(pool.map(lambda p: post(address, **GREEDY | {"prompt": p, "budget": 0.5}), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        if "!" in prompt:
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        else:
            assert answer.json()["choices"][0]["text"] == alone.generate(prompt, 0.5, max_new_tokens=9)


def test_an_unexpected_error_is_answered_and_counted(monkeypatch):
    with serving(tiny()) as (address, _):
        monkeypatch.setattr("buddy.serve.app.Server.named", lambda *_: 1 / 0)
        answer = post(address, **GREEDY)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert 'status="500"} 1.0' in httpx.get(f"{address}/metrics").text


# What is refused


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": ["x"] * 200}, "prompt"),
        ({"budget": "half"}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": "7layers"}, "budget"),
        ({"budget": "auto"}, "budget"),
        ({"budget": "15ms"}, "budget"),
        ({"budget": "1" * 200 + "ms"}, "budget"),
        ({"prompt": ["x"] * 100, "n": 16}, "n"),
        ({"model": "buddy@0"}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"seed": 0.5}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
    ],
)
def test_bad_values_name_their_field(address, change, field):
    answer = post(address, **(GREEDY | change))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages", [[], "hello", [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]]
)
def test_bad_messages(address, messages):
    answer = post(address, "chat/completions", **(CHAT | {"messages": messages}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stop": ["x"] * 17}, "16"),
        ({"prompt": [5, "a"]}, "integer"),
        ({"prompt": [[]]}, "at least 1"),
    ],
)
def test_of_the_types_of_a_field_the_nearest_is_named(address, change, named):
    assert named in post(address, **(GREEDY | change)).json()["error"]["message"]


def test_a_part_that_is_no_text_is_named(address):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "'text'" in post(address, "chat/completions", **(CHAT | {"messages": image})).json()["error"]["message"]


def test_the_default_limit_is_one_that_the_server_allows():
    model = tiny()
    model.routed.tokenizer.chat_template = None
    with serving(model, limits=Limits(tokens=3)) as (address, _):
        asked = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
        assert post(address, **asked).json()["usage"]["completion_tokens"] == 3
        assert post(address, **asked, max_tokens=4).json()["error"]["param"] == "max_tokens"
        answer = post(address, "chat/completions", **CHAT)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_clients_raise_their_own_errors(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**(GREEDY | {"model": "gpt"}))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**CHAT, tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 9999]
)
def test_bodies_that_are_no_request(address, body):
    answer = httpx.post(f"{address}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_large_bodies_and_other_paths(address):
    def pieces():
        for _ in range(6):
            yield b" " * 2**20

    for content in (b" " * (5 * 2**20), pieces()):
        with suppress(httpx.WriteError):  # the server hangs up before the rest is sent
            assert httpx.post(f"{address}/v1/completions", content=content).status_code == 413
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{address}/v1/completions").status_code == 405
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_api_keys():
    with serving(tiny(), keys=["one", "two"]) as (address, _):
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401), ("onee", 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status
        for header in ("bearer one", "BEARER  two", "one"):
            assert httpx.get(f"{address}/v1/models", headers={"Authorization": header}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200


def test_api_keys_of_an_app_within_another():
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    outer = FastAPI()
    with serving(tiny(), keys=["one"]) as (_, app):
        outer.mount("/llm", app)
        client = TestClient(outer)
        assert client.get("/llm/v1/models").status_code == 401
        assert client.get("/llm/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200


def test_long_names_and_stop_strings_take_no_time(address):
    long = ({"model": "buddy@" + "1" * 100_000}, {"budget": "1" * 100_000}, {"stop": "x" * 500_000})
    assert [post(address, **GREEDY | each).status_code for each in long] == [404, 400, 200]


# The command


def test_the_command_serves_finishes_and_exits_0(command):
    process, address = command
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, address, prompt=PROMPT, max_tokens=300, temperature=0, budget=0.5)
        wait_until(lambda: rows(address) == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert answer.result().json()["choices"][0]["finish_reason"] in ("length", "stop")


def test_texts_that_may_begin_at_once_do_not_fill_the_queue():
    scheduler = Scheduler(lambda: tiny(Slow), Metrics(), batch=8, queue=2)
    try:
        texts = [GenerationRequest([5, 6, 7], 0.5, 400, lambda _: None) for _ in range(11)]
        with scheduler._changed:  # no step begins meanwhile
            scheduler.submit(texts[:8])
            scheduler.submit(texts[8:10])
            with pytest.raises(ApiError, match="Too many requests"):
                scheduler.submit(texts[10:])
    finally:
        scheduler.close()


def test_ctrl_c_while_the_model_loads_ends_the_thread(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("buddy.serve.scheduler.Future.result", interrupted)
    before = threading.enumerate()
    with pytest.raises(KeyboardInterrupt):
        Scheduler(tiny, Metrics())
    assert "buddy-decode" not in {thread.name for thread in threading.enumerate() if thread not in before}


def test_a_second_ctrl_c_stops_at_once(command):
    process, address = command
    with ThreadPoolExecutor(1) as pool:
        pool.submit(post, address, prompt=PROMPT, max_tokens=300, n=8)  # fails when the server is gone
        wait_until(lambda: rows(address) > 0)
        process.send_signal(signal.SIGINT)
        next(line for line in process.stderr if "Ctrl-C" in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("started", [False, True])
def test_a_request_that_a_stopping_server_cancels_is_503(started):
    sent = []

    async def cancelled(scope, receive, send):
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    asyncio.run(Guard(cancelled, Metrics())(scope, None, send))
    assert sent[0]["status"] == (200 if started else 503)
    assert len(sent) == (1 if started else 2)


def answers_health(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "half"},
        {"budget": "auto"},
        {"prompt_budget": "auto"},
        {"api_key_file": Path("missing.txt")},
        {"host": "256.1.1.1"},
        {"host": "a..b"},
    ],
    ids=str,
)
def test_what_the_command_refuses(finished, options):
    with pytest.raises(BuddyError):
        serve(finished / "buddy", **{"port": 0, **options})


def test_a_taken_port_an_empty_key_file_and_a_missing_extra(finished, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BuddyError, match="--port"):
        serve(finished / "buddy", port=taken.getsockname()[1])
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(BuddyError):
        read_keys(tmp_path / "keys")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(BuddyError, match="extra `serve`"):
        serve(finished / "buddy")


def test_the_page_names_no_other_host(address):
    page = httpx.get(address)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import", page.text)


def test_every_option_of_the_command_reaches_the_server(finished, tmp_path, monkeypatch):
    made, closed = [], []
    server = SimpleNamespace(state=SimpleNamespace(scheduler=SimpleNamespace(close=lambda: closed.append(True))))
    monkeypatch.setattr("buddy.serve.app.make_app", lambda *given: made.append(given) or server)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "keys").write_text("\ufeffone\n\ntwo\n", "utf-8")
    words = "--budget 0.5 --prompt-budget 1.0 --host 127.0.0.1 --port 0 --batch-size 3 --batch-plan row --queue 5"
    words += " --max-tokens 7 --seconds 9 --dtype bfloat16 --api-key-file"
    folder, keys = str(finished / "buddy"), str(tmp_path / "keys")
    result = CliRunner().invoke(app, ["serve", "--run", folder, *words.split(), keys])
    assert result.exit_code == 0, result.output
    assert closed
    load, *rest = made[0]
    limits = Limits(batch=3, queue=5, tokens=7, seconds=9.0)
    assert rest == ["0.5", read_run(finished / "buddy").recipe.budgets, limits, ["one", "two"], "row", "1.0"]
    assert load().routed.backbone.dtype == torch.bfloat16
