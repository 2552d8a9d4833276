"""What a scrape reads from the server's present state: versions, leases, what training waits for.

Reads what `/v1/training` reads, by the same bounded queries, and nothing while nobody scrapes.
Blocks on the database: call it in a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.services import Services
from server.telemetry.metrics import Metrics

_UNBOUNDED = frozenset({"vllm:lora_requests_info"})
"""vLLM's families whose labels name adapter versions: a new series for every mix that ever ran."""
_COUNTED = ("ready", "waiting_for_outcome", "immature", "running", "claimed", "trained")


def exposition(metrics: Metrics, services: Services) -> bytes:
    """Prometheus' text: what was counted, what stands now, and what vLLM and Python report."""
    parts = (metrics.registry, Readings(services), _Process())
    return b"".join(generate_latest(part) for part in parts)


class _Process(Collector):
    """Python's own metrics and vLLM's, which it puts into the process-wide registry."""

    def collect(self) -> Iterator[Metric]:
        return (family for family in REGISTRY.collect() if family.name not in _UNBOUNDED)


class Readings(Collector):
    """One scrape's view of the services."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        yield self._live()
        yield self._leases()
        yield self._resident()
        yield from self._training()
        yield from self._trainer()
        yield from self._pauses()

    def _live(self) -> Metric:
        live = GaugeMetricFamily(
            "hone_live_version", "What new episodes take; 0 is the base model.", labels=["policy"]
        )
        for policy in self._services.routing.policies:
            live.add_metric([policy], self._services.controller.live(policy).version)
        return live

    def _leases(self) -> Metric:
        held = GaugeMetricFamily(
            "hone_adapter_leases", "Requests and runs that use an adapter.", labels=["policy"]
        )
        counts = dict.fromkeys(self._services.routing.policies, 0)
        for ref, count in self._services.leases.held().items():
            counts[ref.policy] = counts.get(ref.policy, 0) + count
        for policy, count in counts.items():
            held.add_metric([policy], count)
        return held

    def _resident(self) -> Metric:
        resident = GaugeMetricFamily(
            "hone_adapters_resident", "Versions that the engine holds.", labels=["policy"]
        )
        counts = Counter(ref.policy for ref in self._services.controller.resident)
        for policy, count in counts.items():
            resident.add_metric([policy], count)
        return resident

    def _training(self) -> Iterator[Metric]:
        episodes = GaugeMetricFamily(
            "hone_training_episodes",
            "Live and practice episodes by where they stand.",
            labels=["policy", "state"],
        )
        dropped = GaugeMetricFamily(
            "hone_training_dropped_episodes", "Never trained on, and why.",
            labels=["policy", "reason"],
        )  # fmt: skip
        for policy in {agent.spec.policy for agent in self._services.agents.values()}:
            spec, released = self._services.learning(policy), self._services.releases.state(policy)
            readiness = self._services.store.readiness(
                spec,
                live_version=released.live.version,
                oldest_version=released.live_before(spec.training.max_staleness),
            )
            for state in _COUNTED:
                episodes.add_metric([policy, state], getattr(readiness, state))
            for reason, count in readiness.dropped.items():
                dropped.add_metric([policy, reason], count)
        yield episodes
        yield dropped

    def _trainer(self) -> Iterator[Metric]:
        if (trainer := self._services.trainer) is None:
            return
        state = trainer.state
        yield GaugeMetricFamily(
            "hone_trainer_up", "Whether the trainer's process runs.", value=state.alive
        )
        yield CounterMetricFamily(
            "hone_trainer_restarts", "How often it was started again.", value=state.restarts
        )

    def _pauses(self) -> Iterator[Metric]:
        pauses = self._services.pauses
        if not pauses.enabled:
            return
        yield GaugeMetricFamily(
            "hone_serving_paused", "Whether serving stands still for the trainer.",
            value=pauses.paused,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "hone_serving_longest_pause_seconds", "The longest pause so far.",
            value=pauses.figures.longest_seconds,
        )  # fmt: skip
