"""Any body gets an answer that is not the server's failure."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx")

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD = {
    "model": st.sampled_from(["buddy", "buddy@0.5", "buddy@3layers", "buddy@", "buddy@-1", "other"]),
    "prompt": st.text(max_size=30)
    | st.lists(st.integers(-2, 300), max_size=5)
    | st.lists(st.text(max_size=9), max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.text(max_size=9), "content": st.text(max_size=20) | ANY}), max_size=3
    ),
    "budget": st.sampled_from(
        ["0.5", 1, 0.75, "4layers", "9layers", "-3ms", "auto:", "auto:auto\ud800", "auto", "", "nan", 1e309, -1]
    ),
    "prompt_budget": st.sampled_from(["0.5", 1, "9layers"]),
    "max_tokens": st.integers(-1, 4) | st.just(10**6),
    "max_completion_tokens": st.integers(0, 4),
    "temperature": st.floats(0, 2) | st.sampled_from([1e-300, -1, 3]),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 400),
    "n": st.integers(0, 3),
    "seed": st.integers(-(2**64), 2**64),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "plans": st.booleans(),
    "echo": st.booleans(),
}


@st.composite
def bodies(draw) -> bytes:
    """Mostly good values of known fields, some of any kind; sometimes not even an object."""
    fields = {key: good | ANY if draw(st.integers(0, 9)) == 0 else good for key, good in GOOD.items()}
    body = draw(st.fixed_dictionaries({}, optional=fields))
    body = {"prompt": "plan", "messages": [{"role": "user", "content": "plan"}], "max_tokens": 3, **body}
    text = json.dumps(draw(ANY) if draw(st.integers(0, 19)) == 0 else body)
    return text.encode()[: draw(st.sampled_from([None, None, None, len(text) // 2]))]


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies(), path=st.sampled_from(["completions", "chat/completions"]))
def test_no_body_makes_the_server_fail(address, body, path):
    answer = httpx.post(f"{address}/v1/{path}", content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    else:
        assert '"error"' not in answer.text
