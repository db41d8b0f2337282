"""What `/metrics` shows, in the text format of Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: by path and status.
        queue, rows: texts that wait, texts that are written.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "buddy"}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **common)
        self.queue = Gauge("queue", "Texts that wait for a row.", **common)
        self.rows = Gauge("rows", "Texts that are being written.", **common)
        self._written = Counter("written_tokens", "New tokens.", **common)
        self._tokens = Counter("tokens", "Routed tokens, of prompts too, by the layers of each.", ["budget"], **common)
        self._layers = Counter("layers", "Layers that they ran, by the layers of each token.", ["budget"], **common)
        self._first = Histogram("first_token_seconds", "From request to first token.", buckets=SECONDS, **common)
        self._between = Histogram("between_tokens_seconds", "From token to token.", buckets=SECONDS, **common)

    def step(self, executed: int, tokens: int) -> None:
        """Count tokens that ran so many layers each."""
        self._tokens.labels(executed).inc(tokens)
        self._layers.labels(executed).inc(executed * tokens)

    def token(self, since_request: float | None, since_token: float) -> None:
        """Count a new token: seconds since the request, for a text's first one, or since the token before."""
        self._written.inc()
        if since_request is None:
            self._between.observe(since_token)
        else:
            self._first.observe(since_request)

    def text(self) -> bytes:
        """All of them."""
        shown: bytes = generate_latest(self._registry)
        return shown
