"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kv_gym.serving.conversations import Conversations


class Metrics:
    """Counters and gauges of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kv_gym_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kv_gym_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
            return Histogram(f"kv_gym_{name}_seconds", text, registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests by route and HTTP status.", "route", "status")
        self.interrupted = counter("interrupted_replies", "Replies that were not completed, by reason.", "reason")
        self.tokens_read = counter("tokens_read", "Tokens of prompts that were read.")
        self.tokens_reused = counter("tokens_reused", "Tokens of prompts that a cache had read before.")
        self.tokens_generated = counter("tokens_generated", "Tokens of replies.")
        self.evicted_slots = counter("evicted_slots", "Slots (one token of one KV head) that were evicted.")
        self.alarms = counter("alarms", "Alarms of the guard.")
        self.reading = seconds("first_token", "From the start of a generation to its first token.")
        self.generating = seconds("generation", "Of whole generations, reading included, without the wait before.")
        self.tokens_per_second = gauge("tokens_per_second", "Of the latest reply, reading left out.")
        self.waiting = gauge("waiting_requests", "Requests that wait for the model or are served by it.")
        self._slots = gauge("slots", "Slots that the conversations in memory hold.")
        self._bytes = gauge("cache_bytes", "Bytes of the conversations' caches.", "place")
        self._conversations = gauge("conversations", "Conversations that are remembered.", "place")

    def show(self, conversations: Conversations) -> None:
        """Take over what the conversations hold now."""
        in_memory, parked = conversations.counts
        self._slots.set(conversations.slots)
        for place, nbytes, number in (
            ("memory", conversations.nbytes, in_memory),
            ("disk", conversations.parked_nbytes, parked),
        ):
            self._bytes.labels(place).set(nbytes)
            self._conversations.labels(place).set(number)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
