"""No operation of the serving and training paths reads a whole table: the record grows for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy import event as hooks

from feedback.export import ExportQuery, pages
from feedback.outcomes import Copies
from feedback.pruning import Pruning
from feedback.run_store import RunStore
from feedback.runs import Decision
from feedback.spec import LearningSpec, MissingSpec, RewardSpec, TrainingSpec
from feedback.store import Store
from policy.releases import Releases
from tests.feedback.record_samples import episode, event, judged, on_task, turn
from tests.feedback.run_samples import paused

SPEC = LearningSpec(policy="desk", training=TrainingSpec(min_episodes=1))


@pytest.fixture
def statements(store: Store) -> dict[str, Any]:
    """Every SELECT, UPDATE and DELETE that ran, with its parameters."""
    seen: dict[str, Any] = {}

    def remember(
        _connection: Connection, _cursor: object, statement: str, parameters: Any, *rest: Any
    ) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            seen[statement] = parameters[0] if rest[-1] else parameters

    hooks.listen(store.database, "before_cursor_execute", remember)
    return seen


def test_every_query_uses_an_index(store: Store, statements: dict[str, Any]) -> None:
    store.begin(episode("e", ended_at=None))
    store.append_turn("e", turn(1))
    store.end("e", "finished", 10.0)
    judged(store, "f")
    store.add_feedback([event("x", "e"), event("x", "e", source="other")])
    store.feedback("e")
    store.episode("e")
    store.episodes(policy="desk", before="e")
    store.episodes(limit=1)
    _runs(store)
    store.readiness(SPEC, live_version=0)
    store.readiness(
        SPEC.model_copy(update={"reward": RewardSpec(maturity_seconds=1.0)}), live_version=0
    )
    missing = SPEC.training.model_copy(update={"missing": MissingSpec(after_seconds=1.0)})
    assert store.arrivals(SPEC.model_copy(update={"training": missing}), live_version=0)
    claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=1.0)
    assert claim is not None
    store.abandon(claim, "again")
    claim = store.claim(SPEC, live_version=0, owner="a", lease_seconds=1.0)
    assert claim is not None
    store.renew(claim, lease_seconds=1.0)
    store.update_run(claim, "training", {})
    store.finish(claim, version=1, figures={})
    store.older_successes(claim, 5)
    assert len(store.outcomes(SPEC, (0, 1), since=0.0)) == 2
    assert {item.episode.id for item in store.trained_on("desk", 1, limit=9)} == {"e", "f"}
    assert store.held_aside(SPEC, 0, limit=9) == []
    assert store.copies("desk", 1, since=0.0) == Copies(made=0, failed=0)

    store.add_feedback([event("never", "never"), on_task("nor", "this"), on_task("e", "refund/e")])
    everything = ExportQuery(until=1e9)
    assert list(pages(store.database, everything, lambda policy, agent: RewardSpec(), now=1e9))
    kept: dict[str, Any] = {"keep_days": 1.0, "keep_parked_days": 1.0}
    pruning = Pruning(store, Releases(store.database), {"desk": SPEC}, **kept)
    assert list(pruning.batches(1e9, is_trial=True))
    assert list(pruning.batches(1e9))

    assert len(statements) > 25
    with store.database.connect() as connection:
        for statement, parameters in statements.items():
            whole = _READ_WHOLE[connection.dialect.name](connection, statement, parameters)
            assert not whole & {
                "episode",
                "turn",
                "feedback",
                "training_item",
                "agent_run",
                "agent_call",
            }, statement


def _runs(store: Store) -> None:
    runs = RunStore(store.database, "a")
    for id in ("r", "s", "t"):
        paused(store, id, "a", "client", "approval")
    runs.run("r", "default")
    runs.state("r")
    runs.waiting("default", 1)
    runs.run_of_calls(["r_0"], "default")
    runs.decide("r", "default", [Decision("r_1", True, "ann")], 1.0)
    runs.supply("r", "default", {"r_0": "x"}, [{"role": "user", "content": "y"}])
    runs.cancel("s", "default", 1.0)
    runs.late(101.0)
    runs.give_up_waiting("t", 101.0)
    runs.orphans(1.0)
    runs.unowned()
    runs.owned()
    runs.adopt("r", "a", 2.0)
    runs.cancel_requests()
    runs.is_pinned("desk", 0)
    for id, due_at, _ in runs.untold(1e9):
        runs.begin_telling(id, due_at, 2e9)
        runs.told(id)


def _sqlite(connection: Connection, statement: str, parameters: Any) -> set[str]:
    plan = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, parameters)
    steps = [row[-1].split() for row in plan]
    return {step[1] for step in steps if step[0] == "SCAN"}


def _postgres(connection: Connection, statement: str, parameters: Any) -> set[str]:
    """It would read tables as small as these whole: only if it must is what counts."""
    connection.exec_driver_sql("SET enable_seqscan = off")
    plan = connection.exec_driver_sql("EXPLAIN (FORMAT JSON) " + statement, parameters).scalar_one()
    return set(_unconditional(plan[0]["Plan"]))


def _unconditional(node: dict[str, Any]) -> Iterator[str]:
    """Tables that are read in this part of a plan without a condition on an index."""
    if "Scan" in node["Node Type"] and not node.keys() & {"Index Cond", "Recheck Cond"}:
        yield node.get("Relation Name", "")  # a bitmap of an index names no table
    for child in node.get("Plans", ()):
        yield from _unconditional(child)


_READ_WHOLE = {"sqlite": _sqlite, "postgresql": _postgres}
"""Which tables a statement reads from one end to the other, by dialect."""
