"""What a server counts, for Prometheus. Times are in seconds, sizes in bytes, all since the start.

Times and endings of requests are noted here as they come; the engine's own numbers are read when
somebody asks. The registry belongs to one app, so that two in a process do not mix.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from deltamoe.engine import EngineStats, Result

__all__ = ["Metrics"]

_WAITS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_STEPS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Metrics:
    """Counters, gauges and histograms of one app.

    Args:
        stats: reads the engine's numbers.
        kept_bytes: of the texts on the shelf.
    """

    def __init__(self, stats: Callable[[], EngineStats], kept_bytes: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._choices = Counter(
            "deltamoe_choices",
            "Choices finished, by why they ended.",
            ["reason"],
            registry=self._registry,
        )
        self._answers = Counter(
            "deltamoe_http_answers",
            "HTTP requests, by the status they were answered with; 0 is a client that left.",
            ["status"],
            registry=self._registry,
        )
        self._queued = self._histogram("queue", "Until a prompt's reading began.", _WAITS)
        self._first = self._histogram("first_token", "Until the first token.", _WAITS)
        self._next = self._histogram("next_token", "From a token to the next, its mean.", _STEPS)
        self._total = self._histogram("request", "Until a request was finished.", _WAITS)
        self._registry.register(_EngineNumbers(stats, kept_bytes))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"deltamoe_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def finished(self, result: Result) -> None:
        """Count a request that was answered."""
        timings = result.timings
        for choice in result.choices:
            self._choices.labels(choice.finish_reason).inc()
        self._queued.observe(timings.queued_s)
        self._first.observe(timings.first_token_s)
        self._total.observe(timings.total_s)
        longest = max((len(choice.ids) for choice in result.choices), default=0)
        if longest > 1:
            self._next.observe((timings.total_s - timings.first_token_s) / (longest - 1))

    def answered(self, status: int) -> None:
        """Count an HTTP request."""
        self._answers.labels(str(status)).inc()

    def exposition(self) -> tuple[bytes, str]:
        """Everything as text, and the text's media type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


class _EngineNumbers:
    """The engine's counters and gauges under the names Prometheus knows them by."""

    def __init__(self, stats: Callable[[], EngineStats], kept_bytes: Callable[[], int]) -> None:
        self._stats = stats
        self._kept_bytes = kept_bytes

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        stats = self._stats()
        for name, text, value in (
            ("requests_waiting", "Requests and sequences that wait.", stats.num_waiting),
            ("sequences_running", "Sequences with a place.", stats.num_running),
            ("sequences_prefilling", "Of these, reading their prompt.", stats.num_prefilling),
            ("snapshots", "States kept for reuse.", stats.num_snapshots),
        ):
            yield GaugeMetricFamily(f"deltamoe_{name}", text, value)
        memory = GaugeMetricFamily(
            "deltamoe_memory_bytes", "Bytes of states, by what they are for.", labels=["kind"]
        )
        memory.add_metric(["running"], stats.state_bytes)
        memory.add_metric(["cache"], stats.cache_bytes)
        memory.add_metric(["kept"], self._kept_bytes())
        yield memory
        counters = stats.counters
        for name, text, number in (
            ("steps", "Steps of the engine's loop.", counters.num_steps),
            ("prompt_tokens", "Tokens of prompts read.", counters.num_prompt_tokens),
            ("generated_tokens", "Tokens drawn.", counters.num_generated_tokens),
            ("cached_tokens", "Of prompts, not read thanks to reuse.", counters.num_cached_tokens),
            ("replayed_tokens", "Of prompts, known and read.", counters.num_replayed_tokens),
            ("preemptions", "Sequences that gave way.", counters.num_preemptions),
            ("rebuilt_sequences", "Read again from the start.", counters.num_rebuilt),
            ("audits", "Answers computed again.", counters.num_audits),
            ("audit_mismatches", "Of these, not the same.", counters.num_audit_mismatches),
            ("evicted_snapshots", "Kept states that made room.", stats.num_evicted),
            ("cancelled_requests", "Ended by their clients.", counters.num_cancelled),
            ("failed_requests", "Ended by an error.", counters.num_failed),
        ):
            yield CounterMetricFamily(f"deltamoe_{name}", text, value=number)
        spent = CounterMetricFamily(
            "deltamoe_engine_seconds", "Time the engine spent.", labels=["phase"]
        )
        spent.add_metric(["prefill"], counters.prefill_s)
        spent.add_metric(["decode"], counters.decode_s)
        spent.add_metric(["sample"], counters.sample_s)
        yield spent
        load = CounterMetricFamily(
            "deltamoe_expert_tokens",
            "Tokens that each expert was given.",
            labels=["layer", "expert"],
        )
        for layer, experts in enumerate(stats.expert_counts):
            for expert, count in enumerate(experts):
                load.add_metric([str(layer), str(expert)], count)
        yield load
