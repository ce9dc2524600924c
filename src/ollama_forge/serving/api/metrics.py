"""Metrics of one server for Prometheus; each server has its own registry."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ollama_forge.serving.api.telemetry import RequestRecord
from ollama_forge.serving.registry import ModelName, ModelRegistry
from ollama_forge.serving.requests import Done

_PREFIX = "ollama_forge"
_NS = 1e9
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of requests; gauges are read from the models when the metrics are fetched."""

    def __init__(self, models: ModelRegistry) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelGauges(models))
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("http_requests", "Requests by route and status", "method", "route", "status")
        self._answers = self._counter("answers", "Requests for generation by how they ended", "model", "outcome")
        # several answers (n) share one prompt, which these three count once
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts and of embedded texts", "model")
        self._cached_tokens = self._counter("prefix_cache_tokens", "Prompt tokens that were not computed", "model")
        self._cache_hits = self._counter("prefix_cache_hits", "Requests whose prompt was partly cached", "model")
        self._tokens = self._counter("generated_tokens", "Tokens of answers", "model")
        self._duration = self._histogram("request_duration_seconds", "Time of a request for a model", _SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "Time in the queue and on the prompt", _SECONDS)
        self._each = self._histogram("time_per_token_seconds", "Mean time of an answer's later tokens", _TOKEN_SECONDS)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", about, ("model",), buckets=buckets, registry=self._registry)

    def observe(self, record: RequestRecord, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended; one without a route counts as one of method and route ``other``."""
        self._requests.labels(method if route else "other", route or "other", str(status)).inc()
        if not record.model:
            return
        self._duration.labels(record.model).observe(seconds)
        self._prompt_tokens.labels(record.model).inc(record.prompt_tokens)
        self._cached_tokens.labels(record.model).inc(record.cached_tokens)
        self._cache_hits.labels(record.model).inc(record.cached_tokens > 0)
        if record.outcome:
            self._answers.labels(record.model, record.outcome).inc()
        for done in record.answers:
            self._observe_answer(record.model, done)

    def _observe_answer(self, model: str, done: Done) -> None:
        self._tokens.labels(model).inc(done.tokens)
        if done.tokens:
            self._first.labels(model).observe((done.load_ns + done.prompt_ns) / _NS)
        if done.tokens > 1:
            self._each.labels(model).observe(done.answer_ns / (done.tokens - 1) / _NS)

    def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their media type, in the format that an ``Accept`` header asks for."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _ModelGauges(Collector):
    """The present state of each model."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(f"{_PREFIX}_requests_waiting", "Requests that wait for a slot", labels=["model"])
        running = GaugeMetricFamily(f"{_PREFIX}_requests_running", "Requests that hold a slot", labels=["model"])
        healthy = GaugeMetricFamily(f"{_PREFIX}_model_healthy", "1 while the engine can answer", labels=["model"])
        for model in self._models.models:
            label = [ModelName.of(model).short]
            if model.is_loaded:
                waiting.add_metric(label, model.admission.waiting)
                running.add_metric(label, model.admission.running)
            healthy.add_metric(label, model.healthy)
        yield from (waiting, running, healthy)
