"""`make_app` behind Ray Serve: two replicas, of which one is killed under load."""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
httpx = pytest.importorskip("httpx")

from tests.serve.conftest import tiny  # noqa: E402
from tests.small import wait_until  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Ray leaves its daemons unwaited for.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PROMPT = "budget depth layer router"
REPLICAS, BATCH, CLIENTS = 2, 4, 6
PATIENCE = 240  # seconds for a replica to start on a busy machine


def build():
    """The application of one replica, made in its process, which /pid tells."""
    from buddy.serve.app import Limits, make_app

    app = make_app(tiny, limits=Limits(batch=BATCH))
    app.add_api_route("/pid", lambda: os.getpid())
    return app


@pytest.fixture(scope="module")
def address():
    import ray

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    before = signal.getsignal(signal.SIGTERM)  # which ray.init takes
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"num_replicas": REPLICAS, "max_ongoing_requests": BATCH, "ray_actor_options": {"num_cpus": 0.1}}
        serve.run(serve.deployment(serve.ingress(build)(), name="buddy", **options).bind())
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def ask(address: str, body: dict) -> tuple[str, dict]:
    """The text and the usage of one answer.

    Raises:
        httpx.HTTPError: there was no whole answer.
    """
    body = {"model": "buddy", "prompt": PROMPT, "temperature": 0, **body}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as answer:
        answer.raise_for_status()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    if body.get("stream") and lines.pop() != "[DONE]":
        raise httpx.ReadError("The stream has no end.")
    parts = [json.loads(line) for line in lines]
    return "".join(part["choices"][0]["text"] for part in parts), parts[-1]["usage"]


def replicas(address: str) -> set[int]:
    """The processes that answer."""
    return {httpx.get(f"{address}/pid", timeout=PATIENCE).json() for _ in range(20)}


def test_streams_come_in_pieces_and_equal_generate(address, alone):
    expected = alone.generate(PROMPT, "4layers", max_new_tokens=9)
    for stream in (False, True):
        text, usage = ask(address, {"budget": "4layers", "max_tokens": 9, "stream": stream})
        assert text == expected
        assert usage["executed_layers"] == {"min": 4, "mean": 4, "max": 4}
    body = {"model": "buddy", "prompt": PROMPT, "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=PATIENCE) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line]
    assert len(times) > 100
    assert times[-1] - times[0] > 0.05  # not all at the end


def test_a_killed_replica_loses_only_what_it_was_answering(address):
    done, failed, stop = [], [], threading.Event()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            layers = draw.randint(2, 6)
            body = {"budget": f"{layers}layers", "max_tokens": draw.randint(20, 120), "stream": draw.random() < 0.5}
            usage = None
            while usage is None and len(failed) < 50:  # asks again, as the openai client does
                began = time.monotonic()
                try:
                    _, usage = ask(address, body)
                except httpx.HTTPError as error:
                    failed.append((began, time.monotonic(), error))
            done.append((layers, usage["executed_layers"], usage["completion_tokens"] == body["max_tokens"]))

    wait_until(lambda: len(replicas(address)) == REPLICAS, PATIENCE)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, seed) for seed in range(CLIENTS)]
        try:
            wait_until(lambda: len(done) > 3 * CLIENTS, PATIENCE)
            first = replicas(address)
            killed = min(first)
            before = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            after, answered = time.monotonic() + 0.5, len(done)  # the process may take a moment to end
            wait_until(lambda: len(done) > answered + 3 * CLIENTS, PATIENCE)
            wait_until(lambda: len(replicas(address) - {killed}) == REPLICAS, PATIENCE)
        finally:
            stop.set()
        for each in clients:
            each.result()
    assert first - {killed} < replicas(address)
    assert len(failed) <= BATCH
    assert all(began < after and before < ended for began, ended, _ in failed), failed
    assert all(executed == {"min": layers, "mean": layers, "max": layers} for layers, executed, _ in done)
    assert all(whole for *_, whole in done)
