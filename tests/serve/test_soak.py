"""64 clients, 2000 requests: every good one is answered at exactly its K with what it writes alone; memory is flat."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")

from tests.serve.conftest import serving, tiny  # noqa: E402
from tests.serve.test_serve import rows  # noqa: E402
from tests.small import wait_until  # noqa: E402

CLIENTS, REQUESTS = 64, 2000
BAD = [
    {"prompt": ""},
    {"budget": "7layers"},
    {"temperature": "hot"},
    {"model": "other"},
    {"n": 0},
    {"prompt": "x" * 600},
]


def resident() -> int:
    """KiB of memory of this process, in which the server runs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.slow
@pytest.mark.soak
def test_many_clients_for_a_long_time(alone):
    from buddy.serve.app import Limits

    draw = random.Random(0)
    good = [
        {
            "prompt": "".join(draw.choices("abcdefg ", k=draw.choice((1, 5, 30, 200)))),
            "budget": f"{draw.randint(2, 6)}layers",
            "max_tokens": draw.randint(1, 24),
            "temperature": 0,
        }
        for _ in range(100)
    ]
    kinds = draw.choices(["good", "leaves", "bad"], [8, 1, 1], k=REQUESTS)
    asked = [draw.choice(BAD if kind == "bad" else good) for kind in kinds]

    def ask(kind: str, body: dict, address: str) -> tuple[int, str, dict]:
        if kind == "leaves":
            with httpx.stream("POST", address, json={**body, "stream": True}, timeout=120) as answer:
                next(answer.iter_lines())
            return 0, "", {}
        answer = httpx.post(address, json={"prompt": "plan", **body}, timeout=120)
        if answer.status_code != 200:
            return answer.status_code, answer.json()["error"]["type"], {}
        found = answer.json()
        return 200, found["choices"][0]["text"], found["usage"]["executed_layers"]

    sizes, answers = [], []
    with serving(tiny(), limits=Limits(batch=16, queue=CLIENTS)) as (url, _), ThreadPoolExecutor(CLIENTS) as pool:
        for first in range(0, REQUESTS, REQUESTS // 8):
            part = slice(first, first + REQUESTS // 8)
            each = [f"{url}/v1/completions"] * (REQUESTS // 8)
            answers += pool.map(ask, kinds[part], asked[part], each)
            wait_until(lambda: rows(url) == 0)
            sizes.append(resident())
        assert httpx.get(f"{url}/health").status_code == 200
    expected = {
        id(body): alone.generate(body["prompt"], body["budget"], max_new_tokens=body["max_tokens"]) for body in good
    }
    for kind, body, (status, text, layers) in zip(kinds, asked, answers, strict=True):
        if kind == "bad":
            assert (status, text) in {(400, "invalid_request_error"), (404, "invalid_request_error")}
        elif kind == "good":
            assert (status, text) == (200, expected[id(body)])
            assert {f"{layers['min']}layers", f"{layers['max']}layers"} <= {body["budget"], "0layers"}
    print("MiB after each eighth:", [size // 1024 for size in sizes])
    assert sizes[-1] < 1.1 * sizes[1]
