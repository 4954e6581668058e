"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
REQUEST_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "llamax_requests", "Requests by how they ended", ["outcome"], registry=registry
        )
        self._prompt = Counter("llamax_prompt_tokens", "Tokens of prompts", registry=registry)
        self._new = Counter("llamax_generated_tokens", "New tokens", registry=registry)
        self._active = Gauge("llamax_requests_active", "Requests in progress", registry=registry)
        self._waiting = Gauge("llamax_requests_waiting", "Requests that wait", registry=registry)
        self._first = Histogram(
            "llamax_time_to_first_token_seconds",
            "Time from a request to its first token",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._whole = Histogram(
            "llamax_request_seconds",
            "Time from a request to its last token",
            buckets=REQUEST_S,
            registry=registry,
        )

    def watch(self, active: Sized, waiting: Sized) -> None:
        """Show the lengths of these, the requests in progress and waiting, whenever asked."""
        self._active.set_function(lambda: len(active))
        self._waiting.set_function(lambda: len(waiting))

    def prefilled(self, tokens: int) -> None:
        """Count the tokens of prompts."""
        self._prompt.inc(tokens)

    def token(self, first: bool, seconds: float) -> None:
        """Count a new token; ``seconds``: since its request arrived."""
        self._new.inc()
        if first:
            self._first.observe(seconds)

    def ended(self, outcome: str, seconds: float | None = None) -> None:
        """Count a request: stop, eos, length, cancelled, failed or refused."""
        self._requests.labels(outcome).inc()
        if seconds is not None:
            self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)
