"""The Prometheus metrics that are counted as things happen, and who is told of what.

Every label has few values: configured names, closed sets, or the first few that were seen. What is
read from the server's state at a scrape is in `readings`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feedback.events import Receipt
from feedback.removal import Pruned
from feedback.training import TrainingRun
from feedback.types import Episode, FeedbackEvent, Turn
from policy.releases import ReleaseEvent
from policy.types import AdapterRef
from server.pauses import Ended, Proof
from server.tools.breaker import Breaker
from server.tools.names import unique

OTHER = "other"
"""Instead of a label's value that is not one of the few."""
MOST_SOURCES = 32
LONGEST_LABEL = 120
"""Characters: a source may be a long command, or an address."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A registry of its own, so that two servers in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tools: frozenset[str] = frozenset()
        self._sources: set[str] = set()
        self._episodes_begun = self._counter(
            "hone_episodes_begun", "Episodes that began.", "policy", "agent", "purpose"
        )
        self._episodes_ended = self._counter(
            "hone_episodes_ended", "Episodes that ended.",
            "policy", "agent", "purpose", "stop_reason",
        )  # fmt: skip
        self._episode_seconds = self._histogram(
            "hone_episode_seconds", "From an episode's start to its end.", "policy", "agent"
        )
        self._turns = self._counter("hone_turns", "Turns on record.", "policy", "agent")
        self._prompt_tokens = self._counter(
            "hone_prompt_tokens", "Prompt tokens of all turns.", "policy", "agent"
        )
        self._sampled_tokens = self._counter(
            "hone_sampled_tokens", "Sampled tokens of all turns.", "policy", "agent"
        )
        self._tool_calls = self._counter(
            "hone_tool_calls", "Tool calls of agents.", "tool", "status"
        )
        self._tool_seconds = self._histogram(
            "hone_tool_seconds", "From a tool's call to its answer.", "tool"
        )
        self._tool_retries = self._counter(
            "hone_tool_retries", "Attempts at tool calls after the first.", "tool"
        )
        self._feedback = self._counter(
            "hone_feedback_events", "Feedback events received.", "source", "status"
        )
        self._loads = self._counter(
            "hone_adapter_loads", "Adapters given to the engine.", "policy", "outcome"
        )
        self._load_seconds = self._histogram(
            "hone_adapter_load_seconds", "To load an adapter and to probe it.", "policy"
        )
        self._unloads = self._counter(
            "hone_adapter_unloads", "Adapters taken from the engine.", "policy"
        )
        self._unload_seconds = self._histogram(
            "hone_adapter_unload_seconds", "To unload an adapter.", "policy"
        )
        self._swaps = self._counter(
            "hone_adapter_swaps", "Changes of what new episodes take.", "policy"
        )
        self._swap_seconds = self._histogram(
            "hone_adapter_swap_seconds", "To follow a change of the live version.", "policy"
        )
        self._runs = self._counter(
            "hone_training_runs", "Training runs that are over.", "policy", "outcome"
        )
        self._run_seconds = Gauge(
            "hone_training_last_run_seconds", "Of the last training run.", ["policy"],
            registry=self.registry,
        )  # fmt: skip
        self._releases = self._counter(
            "hone_release_events", "What happened to versions.", "policy", "state"
        )
        self._requests = self._counter(
            "hone_http_requests", "HTTP requests answered.", "route", "method", "status"
        )
        self._request_seconds = self._histogram(
            "hone_http_request_seconds", "To the end of the answer.", "route", "method"
        )

        self._pause_seconds = self._histogram(
            "hone_serving_pause_seconds", "How long serving stood still for the trainer.", "ended"
        )
        self._wake_proofs = self._counter(
            "hone_wake_proofs", "Proofs of the engine after a pause.", "outcome"
        )

        self._limit_fallbacks = self._counter(
            "hone_limit_fallbacks", "Counts for limits that Redis missed."
        )

        self._pruned = self._counter("hone_pruned", "Deleted from the record, being old.", "what")

    def pruned(self, done: Pruned) -> None:
        """A batch was deleted."""
        self._pruned.labels("episodes").inc(done.episodes.total())
        self._pruned.labels("feedback").inc(done.feedback)
        self._pruned.labels("parked_feedback").inc(done.parked)

    def limit_fell_back(self) -> None:
        """A process counted for a limit by itself."""
        self._limit_fallbacks.inc()

    def know_tools(self, names: Collection[str]) -> None:
        """The tools that have a label value; a model may call anything."""
        self._tools = frozenset(names)

    def know_breakers(self, breakers: Mapping[str, Sequence[Breaker]]) -> None:
        """Of each agent's sources of tools; they are read at every scrape."""
        self.registry.register(BreakerReadings(breakers))

    # server.telemetry.watch.Watcher

    def begun(self, episode: Episode) -> None:
        self._episodes_begun.labels(*_whose(episode), episode.purpose).inc()

    def recorded(self, episode: Episode, turn: Turn) -> None:
        whose = _whose(episode)
        self._turns.labels(*whose).inc()
        self._prompt_tokens.labels(*whose).inc(len(turn.prompt_ids))
        self._sampled_tokens.labels(*whose).inc(len(turn.token_ids))
        for call in turn.tool_calls:
            tool = call.name if call.name in self._tools else OTHER
            self._tool_calls.labels(tool, call.status).inc()
            self._tool_seconds.labels(tool).observe(call.seconds)
            if call.attempts > 1:
                self._tool_retries.labels(tool).inc(call.attempts - 1)

    def ended(self, episode: Episode, stop_reason: str, ended_at: float) -> None:
        whose = _whose(episode)
        self._episodes_ended.labels(*whose, episode.purpose, stop_reason).inc()
        self._episode_seconds.labels(*whose).observe(max(0.0, ended_at - episode.started_at))

    def judged(self, event: FeedbackEvent, receipt: Receipt) -> None:
        source = event.source
        if source not in self._sources:
            if len(self._sources) < MOST_SOURCES:
                self._sources.add(source)
            else:
                source = OTHER
        status = "parked" if receipt.parked and receipt.status == "recorded" else receipt.status
        self._feedback.labels(source, status).inc()

    def trained(self, run: TrainingRun) -> None:
        self._runs.labels(run.policy, run_outcome(run)).inc()
        if run.finished_at is not None:
            self._run_seconds.labels(run.policy).set(run.finished_at - run.started_at)

    def released(self, event: ReleaseEvent) -> None:
        self._releases.labels(event.ref.policy, event.state).inc()

    # server.release_controller.AdapterWatcher

    def loaded(self, ref: AdapterRef, seconds: float, *, refused: bool) -> None:
        self._loads.labels(ref.policy, "refused" if refused else "loaded").inc()
        self._load_seconds.labels(ref.policy).observe(seconds)

    def unloaded(self, ref: AdapterRef, seconds: float) -> None:
        self._unloads.labels(ref.policy).inc()
        self._unload_seconds.labels(ref.policy).observe(seconds)

    def swapped(self, ref: AdapterRef, seconds: float) -> None:
        self._swaps.labels(ref.policy).inc()
        self._swap_seconds.labels(ref.policy).observe(seconds)

    # server.pauses.PauseWatcher

    def paused(self, seconds: float, ended: Ended) -> None:
        self._pause_seconds.labels(ended).observe(seconds)

    def woken(self, proof: Proof) -> None:
        self._wake_proofs.labels(proof).inc()

    # server.telemetry.http

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, status).inc()
        self._request_seconds.labels(route, method).observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS)


class BreakerReadings(Collector):
    """Where the circuit breakers stand."""

    def __init__(self, breakers: Mapping[str, Sequence[Breaker]]) -> None:
        self._of_agents = breakers

    def collect(self) -> Iterator[Metric]:
        labels = ["agent", "source"]
        state = GaugeMetricFamily(
            "hone_tool_breaker_state",
            "Whether a source of tools is called: 0 as usual, 1 on trial, 2 not.",
            labels=labels,
        )
        openings = CounterMetricFamily(
            "hone_tool_breaker_openings", "Times a source of tools was given up.", labels=labels
        )
        for agent, breakers in self._of_agents.items():
            taken: set[str] = set()
            for breaker in breakers:
                whose = [agent, unique(breaker.source[:LONGEST_LABEL], taken)]
                state.add_metric(whose, ("closed", "half_open", "open").index(breaker.state))
                openings.add_metric(whose, breaker.openings)
        yield state
        yield openings


def run_outcome(run: TrainingRun) -> str:
    """published, no_signal, failed (the run's figures say why) or abandoned."""
    if run.state != "finished":
        return "abandoned"
    if run.version is not None:
        return "published"
    return "no_signal" if run.figures.get("outcome") == "no_signal" else "failed"


def _whose(episode: Episode) -> tuple[str, str]:
    return episode.policy, episode.agent or ""
