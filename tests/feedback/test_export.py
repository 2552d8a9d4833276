"""Reading the whole record: each episode once, in one order, with what is in force of it."""

from __future__ import annotations

import dataclasses

import pytest

from feedback import export
from feedback.export import ExportedEpisode, ExportQuery, pages
from feedback.rulings import Ruling
from feedback.spec import LearningSpec, RewardSpec
from feedback.store import Store
from tests.feedback.record_samples import episode, event, on_task, turn

SPEC = LearningSpec(policy="desk")


def read(store: Store, **asked: object) -> list[ExportedEpisode]:
    query = dataclasses.replace(ExportQuery(until=1000.0), **asked)  # type: ignore[arg-type]  # fields by name
    found = pages(store.database, query, lambda policy, agent: RewardSpec(), now=1000.0)
    return [one for page in found for one in page]


def ids(found: list[ExportedEpisode]) -> list[str]:
    return [one.episode.id for one in found]


@pytest.mark.parametrize(("episodes", "tokens"), [(256, 500_000), (2, 500_000), (256, 6)])
def test_every_episode_comes_once_by_tenant_begin_and_id(
    store: Store, monkeypatch: pytest.MonkeyPatch, episodes: int, tokens: int
) -> None:
    """Pages of all, of two, and of one: a page ends at its rows or at its tokens."""
    monkeypatch.setattr(export, "_EPISODES", episodes)
    monkeypatch.setattr(export, "_TOKENS", tokens)
    for id, tenant, began in (
        ("c", "default", 9.0), ("b", "default", 9.0), ("a", "default", 9.0),
        ("z", "acme", 50.0), ("y", "default", 3.0), ("x", "zeta", 1.0),
    ):  # fmt: skip
        store.begin(episode(id, tenant=tenant, started_at=began))
    assert ids(read(store)) == ["z", "y", "a", "b", "c", "x"]
    assert ids(read(store, since=9.0)) == ["z", "a", "b", "c"]
    assert ids(read(store, until=9.0)) == ["y", "x"]
    assert ids(read(store, tenant="default", policy="desk")) == ["y", "a", "b", "c"]
    assert read(store, tenant="nobody") == read(store, policy="other") == []


def test_what_is_in_force_comes_along(store: Store) -> None:
    """Turns as they were, words on the task with those on the episode, rewards by the rulings."""
    first = episode("first", turns=(turn(0), turn(1, (1, 2, 3, 4, 5, 9))), task_key="t")
    store.begin(first)
    store.begin(episode("later", started_at=500.0, ended_at=600.0, task_key="t"))
    store.begin(episode("open", started_at=700.0, ended_at=None, purpose="evaluation"))
    store.add_feedback(
        [
            event("1", "first", 0.5, at=60.0), event("2", "first", 1.0, source="forger"),
            on_task("3", "t", 0.25, at=550.0), event("4", "never", 1.0),
        ]
    )  # fmt: skip
    store.rule(
        Ruling("default", "desk", "forger", "success", "quarantined", "test", "odd", 1.0), after=0
    )
    store.readiness(SPEC, live_version=0)
    found = {one.episode.id: one for one in read(store)}
    assert found["first"].episode == first
    assert [said.event_id for said in found["first"].said] == ["1", "2"]
    assert [said.event_id for said in found["later"].said] == ["3"]
    assert (found["first"].reward.value, found["later"].reward.value) == (0.5, 0.25)
    assert found["open"].reward.value is None
    states = {id: one.training_state for id, one in found.items()}
    assert states == {"first": "ready", "later": "ready", "open": None}
