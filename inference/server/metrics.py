"""What happens, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...modeling.dispatch import Dispatch
from ..backends import LocalModels
from ..observer import Answered, Observer, Spent

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Local(Collector):
    """What local experts take, as it is when somebody asks."""

    def __init__(self, models: LocalModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        loads = self._models.loads
        yield CounterMetricFamily("expertoken_local_loads", "Local experts loaded into memory", value=loads)
        yield GaugeMetricFamily(
            "expertoken_local_bytes", "Weights of local experts in memory", value=self._models.taken
        )


class Metrics(Observer):
    """Counts what it is told, in a registry of its own.

    Args:
        models: local ones, whose memory is told; None where there are none.
    """

    def __init__(self, models: LocalModels | None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory among others
        if models is not None:
            self.registry.register(_Local(models))

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"expertoken_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"expertoken_{name}", what, labels, registry=self.registry, buckets=buckets)

        self.decisions = counter("decisions", "Decisions, by the candidate chosen", "expert")
        self.answers = counter("answers", "Answers that came to their end, by who gave it", "expert")
        self.failures = counter("failures", "Experts that failed, before or within an answer", "expert", "when")
        self.fallbacks = counter("fallbacks", "Answers by another expert than the one chosen", "chosen", "expert")
        self.hand_overs = counter("hand_overs", "Answers of self that an expert was called to go on with", "expert")
        self.skips = counter("skips", "Experts that were not asked, since they failed too often of late", "expert")
        self.turns_lost = counter("turns_lost", "Turns that nobody could answer to the end")
        self.tokens = counter("tokens", "Tokens, by who read or wrote them", "expert", "kind")
        self.cost = counter("cost_usd", "What answers cost, by the pool's prices", "expert")
        self.requests = counter("requests", "HTTP requests for an answer", "status")
        self.in_flight = Gauge("expertoken_in_flight", "Requests being answered", registry=self.registry)
        self.deciding = histogram("decision_seconds", "From the question to the decision, waiting included")
        self.batches = histogram("decision_batch", "Decisions made in one pass", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
        self.first = histogram("first_piece_seconds", "From the decision to the first piece", "expert")
        self.whole = histogram("answer_seconds", "From the decision to the end of the answer", "expert")

    def decided(self, dispatch: Dispatch, seconds: float, batch: int) -> None:
        """A decision was made."""
        self.decisions.labels(dispatch.expert).inc()
        self.deciding.observe(seconds)
        self.batches.observe(batch)

    def failed(self, expert: str, reason: str, *, begun: bool) -> None:
        """An expert failed."""
        self.failures.labels(expert, "within" if begun else "before").inc()

    def handed_over(self, expert: str) -> None:
        """Self stopped in its answer for an expert."""
        self.hand_overs.labels(expert).inc()

    def skipped(self, expert: str) -> None:
        """An expert was not asked."""
        self.skips.labels(expert).inc()

    def spent(self, part: Spent) -> None:
        """A candidate read and wrote."""
        self.tokens.labels(part.expert, "read").inc(part.prompt_tokens)
        self.tokens.labels(part.expert, "written").inc(part.completion_tokens)
        if part.cost:
            self.cost.labels(part.expert).inc(part.cost)

    def answered(self, answer: Answered) -> None:
        """An answer came to its end."""
        self.answers.labels(answer.expert).inc()
        if answer.expert != answer.chosen:
            self.fallbacks.labels(answer.chosen, answer.expert).inc()
        self.first.labels(answer.expert).observe(answer.first)
        self.whole.labels(answer.expert).observe(answer.seconds)

    def lost(self) -> None:
        """A turn ended without a whole answer."""
        self.turns_lost.inc()
