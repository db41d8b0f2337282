"""What `/metrics` shows, in the text format of Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: by path and status.
        queue, rows: texts that wait, texts that are written.
        written: new tokens.
        first, between: seconds from a request to its first token, and from token to token.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "buddy"}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **common)
        self.queue = Gauge("queue", "Texts that wait for a row.", **common)
        self.rows = Gauge("rows", "Texts that are being written.", **common)
        self.written = Counter("written_tokens", "New tokens.", **common)
        self._tokens = Counter("tokens", "Routed tokens, of prompts too, by the layers of each.", ["budget"], **common)
        self._layers = Counter("layers", "Layers that they ran, by the layers of each token.", ["budget"], **common)
        self.first = Histogram("first_token_seconds", "From request to first token.", buckets=SECONDS, **common)
        self.between = Histogram("between_tokens_seconds", "From token to token.", buckets=SECONDS, **common)

    def step(self, executed: int, tokens: int) -> None:
        """Count tokens that ran so many layers each."""
        self._tokens.labels(executed).inc(tokens)
        self._layers.labels(executed).inc(executed * tokens)

    def text(self) -> bytes:
        """All of them."""
        shown: bytes = generate_latest(self._registry)
        return shown
