"""Prometheus metrics: vLLM's names where the meaning is the same, Trimtab's own where it is not. Times in seconds.

`trimtab_predicted_seconds` stands beside `trimtab_measured_seconds` for the same requests, so a dashboard can divide one
by the other. Labels hold model ids (techniques included), never users or texts.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.serve.client import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SOON = (
    0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004, 0.0045, 0.005, 0.006, 0.008,
    0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """Counters and histograms of one server.

    Args:
        engine: whose statistics are shown too; None where there is none.
    """

    def __init__(self, engine: Engine | None) -> None:
        self.registry = registry = CollectorRegistry()
        model = ["model_name"]
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to first token.", model, buckets=_LONG, registry=registry
        )
        self.between = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between tokens, by the engine's clock.",
            model,
            buckets=_SHORT,
            registry=registry,
        )
        self.delay = Histogram(
            "trimtab_stream_delay_seconds",
            "From the engine's token to the write into the client's socket.",
            model,
            buckets=_SOON,
            registry=registry,
        )
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", model, buckets=_LONG, registry=registry
        )
        self.queued = Histogram(
            "vllm:request_queue_time_seconds", "In the engine's queue.", model, buckets=_LONG, registry=registry
        )
        self.prompt = Counter("vllm:prompt_tokens", "Prompt tokens of finished requests.", model, registry=registry)
        self.generated = Counter("vllm:generation_tokens", "New tokens.", model, registry=registry)
        self.success = Counter(
            "vllm:request_success", "Finished choices.", [*model, "finished_reason"], registry=registry
        )
        kind = [*model, "quantity"]
        self.predicted = Histogram(
            "trimtab_predicted_seconds",
            "Predicted when the request left the queue.",
            kind,
            buckets=_LONG,
            registry=registry,
        )
        self.measured = Histogram(
            "trimtab_measured_seconds",
            "Measured, of requests that had a prediction.",
            kind,
            buckets=_LONG,
            registry=registry,
        )
        self.rejected = Counter(
            "trimtab_requests_rejected", "Answers of 400 and above.", ["status", "code"], registry=registry
        )
        self.http = Counter("trimtab_http_requests", "Answers.", ["route", "status"], registry=registry)
        if engine is not None:
            registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engine and its supervisor say, read when asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing is registered by name before there is an engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Gauges of now, counters over all engines of this server."""
        engine, stats, before = self._engine, self._engine.stats, self._engine.before
        # The batch and the cache belong to all model ids together; the label names the default one.
        model = next(iter(engine.models.values())).id if engine.models else ""
        used = stats.kv_used_bytes / stats.kv_bytes if stats.kv_bytes else 0.0
        for name, told, value in (
            ("vllm:num_requests_running", "Requests in the batch.", stats.running),
            ("vllm:num_requests_waiting", "Requests in the queue.", max(stats.waiting, engine.waiting)),
            ("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(name, told, labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        yield GaugeMetricFamily("trimtab_requests_paused", "Requests whose reader is slow.", stats.paused)
        yield GaugeMetricFamily(
            "trimtab_engine_up", "1 while the engine takes requests.", float(engine.state == "ready")
        )
        yield CounterMetricFamily("trimtab_engine_restarts", "Times the engine was started again.", engine.restarts)
        for name, field, told in _COUNTERS:
            counter = CounterMetricFamily(name, told, labels=["model_name"])
            counter.add_metric([model], getattr(stats, field) + getattr(before, field))
            yield counter
        cancelled = CounterMetricFamily("trimtab_requests_cancelled", "Cancelled, by reason.", labels=["reason"])
        for reason, count in engine.cancelled.items():
            cancelled.add_metric([reason], count)
        yield cancelled


_COUNTERS = (
    ("vllm:prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("vllm:prefix_cache_hits", "prefix_hits", "Prompt tokens found there."),
    ("vllm:num_preemptions", "preemptions", "Requests that lost their cache and were computed again."),
    ("trimtab_steps", "steps", "Steps of the engine."),
    ("trimtab_step_seconds", "step_s", "Time in steps, measured."),
    ("trimtab_predicted_step_seconds", "predicted_step_s", "Time in the same steps, predicted."),
    ("trimtab_busy_seconds", "busy_s", "Time in turns of the engine's loop that ran a step."),
    ("trimtab_pass_seconds", "pass_s", "The part of it in passes through models."),
    ("trimtab_native_seconds", "native_s", "The part of that in native code."),
    ("trimtab_energy_joules", "energy_j", "Estimated energy."),
)
