"""Metrics for Prometheus."""

import heapq
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...modeling.dispatch import Dispatch
from ..answering import AnsweringModel
from ..observer import Answered, Observer, Spent
from ..reply import Reply

_RECENT = 1000  # newest decisions, whose shares are compared with the calibration's
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _State(Collector):
    """State of local experts, endpoints and circuit breakers at the time of a scrape."""

    def __init__(self, model: Callable[[], AnsweringModel]) -> None:
        self._current = model

    @property
    def _model(self) -> AnsweringModel:
        return self._current()

    def describe(self) -> list[Metric]:
        return []  # without it the registry collects once when it registers, before a model exists

    def collect(self) -> Iterator[Metric]:
        alone = GaugeMetricFamily(
            "expertoken_left_alone", "1 for an expert that failed too often recently", labels=["expert"]
        )
        left = set(self._model.left_alone)
        for name in self._model.pool.names:
            alone.add_metric([name], float(name in left))
        yield alone
        retries = CounterMetricFamily("expertoken_retries", "Retried requests to endpoints", labels=["expert"])
        for name, backend in self._model.opened.items():
            if backend.retries is not None:
                retries.add_metric([name], backend.retries)
        yield retries
        up = GaugeMetricFamily("expertoken_address_up", "1 for an address that answers", labels=["expert", "address"])
        for name, backend in self._model.opened.items():
            for address, answers in backend.addresses_up.items():
                up.add_metric([name, address], float(answers))
        yield up
        if (models := self._model.local_models) is not None:
            yield CounterMetricFamily(
                "expertoken_local_loads", "Loads of local experts into memory", value=models.loads
            )
            yield GaugeMetricFamily(
                "expertoken_local_bytes", "Bytes of local experts' weights in memory", value=models.taken
            )


class _Drift(Collector):
    """Distance between the newest decisions' shares and the shares on the calibration's prompts."""

    def __init__(self, model: Callable[[], AnsweringModel], recent: deque[str]) -> None:
        self._model, self._recent = model, recent

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        told = "Half the sum of absolute differences between recent and calibrated shares of decisions, 0 to 1"
        calibrated, recent = self._model().calibrated_shares, Counts(self._recent)
        if calibrated and (total := recent.total()):
            names = {*calibrated, *recent}
            apart = sum(abs(recent[name] / total - calibrated.get(name, 0.0)) for name in names) / 2
            yield GaugeMetricFamily("expertoken_share_drift", told, value=apart)


class Metrics(Observer):
    """Observer that counts events in a registry of its own.

    Args:
        model: Function that returns the model whose answers are counted. A reload replaces the model.
    """

    def __init__(self, model: Callable[[], AnsweringModel]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory of the process, among others
        self.registry.register(_State(model))

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"expertoken_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"expertoken_{name}", what, labels, registry=self.registry, buckets=buckets)

        self.decisions = counter("decisions", "Decisions, by chosen candidate", "expert")
        self.answers = counter("answers", "Complete answers, by expert", "expert")
        self.failures = counter(
            "failures", "Failures of experts: before an answer, within it, or a refusal", "expert", "when"
        )
        self.fallbacks = counter("fallbacks", "Answers by another expert than the chosen one", "chosen", "expert")
        self.hand_overs = counter("hand_overs", "Answers of self that were handed over to an expert", "expert")
        self.skips = counter("skips", "Skips of experts that failed too often recently", "expert")
        self.turns_lost = counter("turns_lost", "Turns without a complete answer")
        self.tokens = counter("tokens", "Tokens read and written, by expert", "expert", "kind")
        self.cost = counter("cost_usd", "Cost of answers in USD, by the pool's prices", "expert")
        self.requests = counter("requests", "HTTP requests for an answer", "status")
        self.client_requests = counter("client_requests", "Answered requests, by client of the API key", "client")
        self.client_tokens = counter("client_tokens", "Tokens of answers, by client of the API key", "client", "kind")
        self.client_cost = counter("client_cost_usd", "Cost of answers in USD, by client of the API key", "client")
        self.judgements = counter("feedback", "Judgements of answers", "expert")
        self.judged_scores = counter("feedback_score", "Sum of the judgements' scores", "expert")
        self.sessions = counter(
            "session_turns", "Turns of continued conversations, by whether the expert changed", "switched"
        )
        self.margins = histogram("decision_margin", "Probability of the first candidate minus the next one's",
                                 buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0))  # fmt: skip
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self.registry.register(_Drift(model, self._recent))
        self.in_flight = Gauge("expertoken_in_flight", "In-flight requests", registry=self.registry)
        self.deciding = histogram("decision_seconds", "Seconds from a request to its decision, queue included")
        self.batches = histogram(
            "decision_batch", "Decisions made in one forward pass", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.first = histogram("first_piece_seconds", "Seconds from the decision to the first piece", "expert")
        self.whole = histogram("answer_seconds", "Seconds from the decision to the end of the answer", "expert")

    def decided(self, dispatch: Dispatch, seconds: float, batch: int) -> None:
        """Count a decision."""
        self.decisions.labels(dispatch.expert).inc()
        ordered = heapq.nlargest(2, dispatch.probabilities.values())
        self.margins.observe(ordered[0] - ordered[1] if len(ordered) > 1 else 1.0)
        self._recent.append(dispatch.expert)
        self.deciding.observe(seconds)
        self.batches.observe(batch)

    def failed(self, expert: str, reason: str, *, begun: bool, refused: bool = False) -> None:
        """Count a failure of an expert."""
        self.failures.labels(expert, "refused" if refused else "within" if begun else "before").inc()

    def handed_over(self, expert: str) -> None:
        """Count an answer that self handed over to an expert."""
        self.hand_overs.labels(expert).inc()

    def skipped(self, expert: str) -> None:
        """Count a skipped expert."""
        self.skips.labels(expert).inc()

    def spent(self, part: Spent) -> None:
        """Count a candidate's tokens and their cost."""
        self.tokens.labels(part.expert, "read").inc(part.prompt_tokens)
        self.tokens.labels(part.expert, "written").inc(part.completion_tokens)
        if part.cost:
            self.cost.labels(part.expert).inc(part.cost)

    def answered(self, answer: Answered) -> None:
        """Count a complete answer and its times."""
        self.answers.labels(answer.expert).inc()
        if answer.expert != answer.chosen:
            self.fallbacks.labels(answer.chosen, answer.expert).inc()
        self.first.labels(answer.expert).observe(answer.first)
        self.whole.labels(answer.expert).observe(answer.seconds)

    def went_on(self, last: str, chosen: str) -> None:
        """Count a turn of a continued conversation."""
        self.sessions.labels("yes" if chosen != last else "no").inc()

    def judged(self, expert: str, score: float) -> None:
        """Count a judgement of an answer."""
        self.judgements.labels(expert).inc()
        self.judged_scores.labels(expert).inc(score)

    def used(self, client: str, replies: Iterable[Reply]) -> None:
        """Count a client's request with its tokens and cost."""
        self.client_requests.labels(client).inc()
        for reply in replies:
            self.client_tokens.labels(client, "read").inc(reply.prompt_tokens)
            self.client_tokens.labels(client, "written").inc(reply.completion_tokens)
            self.client_cost.labels(client).inc(reply.cost or 0.0)

    def lost(self) -> None:
        """Count a turn that ended without a complete answer."""
        self.turns_lost.inc()
