"""/metrics in Prometheus' format. What vLLM counts too has vLLM's names, so that its dashboards work; ours begin with
zsaa. Of several replicas each sample says whose it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from zsaa.serve.lane import Job, Lane

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)


class Metrics:
    """Of one replica. lanes: by the name of the model that each has."""

    def __init__(self, lanes: dict[str, Lane]):
        self.registry, self.lanes = CollectorRegistry(), lanes

        def of(kind, name: str, about: str, *labels: str, **options):
            return kind(name, about, ("model_name", *labels), registry=self.registry, **options)

        self.running = of(Gauge, "vllm:num_requests_running", "Requests in a batch that runs.")
        self.waiting = of(Gauge, "vllm:num_requests_waiting", "Requests that wait for a batch.")
        self.ttft = of(Histogram, "vllm:time_to_first_token_seconds", "Until the first token.", buckets=SECONDS)
        self.whole = of(Histogram, "vllm:e2e_request_latency_seconds", "Until the last token.", buckets=SECONDS)
        self.prompt = of(Counter, "vllm:prompt_tokens", "Tokens of prompts, of answered requests.")
        self.written = of(Counter, "vllm:generation_tokens", "Tokens written, of answered requests.")
        self.ended = of(Counter, "vllm:request_success", "Answered requests.", "finished_reason")
        self.alpha = of(Gauge, "zsaa:alpha", "The alpha of a batch that starts now.")
        self.floor = of(Gauge, "zsaa:alpha_floor", "The least alpha that the controller may choose.")
        self.macs = of(Counter, "zsaa:prefill_macs", "Multiply-accumulates of prefills, at the alpha that was given.")
        self.stock = of(Counter, "zsaa:prefill_macs_stock", "What the same prefills would have cost at alpha = 1.")
        self.share = of(Gauge, "zsaa:requests_below_one_ratio", "Share of answered requests with alpha below 1.")
        self.refused = of(Counter, "zsaa:requests_refused", "Requests that were told to come again (429).")
        for name in lanes:
            self.refused.labels(name)

    def first(self, name: str, seconds: float) -> None:
        self.ttft.labels(name).observe(seconds)

    def last(self, name: str, job: Job, seconds: float, reason: str) -> None:
        self.whole.labels(name).observe(seconds)
        self.prompt.labels(name).inc(len(job.wish.ids))
        self.written.labels(name).inc(job.tokens)
        self.ended.labels(name, reason).inc()
        self.macs.labels(name).inc(job.spent[0])
        self.stock.labels(name).inc(job.spent[1])

    def text(self) -> str:
        for name, lane in self.lanes.items():
            live = lane.live()
            for gauge, value in ((self.running, "running"), (self.waiting, "waiting"), (self.alpha, "alpha")):
                gauge.labels(name).set(live[value])
            self.floor.labels(name).set(live["floor"])
            self.share.labels(name).set(live["pruned"] / max(1, live["answered"]))
        return generate_latest(self.registry).decode()


class _Merged:
    def __init__(self, texts: Sequence[tuple[str, str]]):
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self.texts:
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        return families.values()


def merged(texts: Sequence[tuple[str, str]]) -> str:
    """One page of the pages of several replicas, (name of the replica, its page) each."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry).decode()
