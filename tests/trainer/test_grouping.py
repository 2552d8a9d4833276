"""Groups, singles and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from feedback.types import Episode, Turn
from trainer.algorithms.loop import Loop
from trainer.baseline import Baseline
from trainer.grouping import credit

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Episode]

LOOP = Loop(0.1, 0.1, 2.0)


@dataclass(frozen=True)
class Item:
    episode: Episode
    reward: float


def test_groups_by_task_and_version_and_singles_by_baseline(
    episode: MakeEpisode, turn: MakeTurn
) -> None:
    turns = [turn([1, 2], [3])]
    rewards = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    items = [Item(episode(id, turns, task_key="t/1", version=3), r) for id, r in rewards.items()]
    items.append(Item(episode("e", turns, task_key="t/1", version=2), 1.0))  # another version
    items.append(Item(episode("f", turns, task_key="u/1", version=3), 0.0))
    baseline = Baseline(decay=0.5, shrinkage=2.0)
    baseline.commit([("t/1", 1.0)])

    credits = credit(items, LOOP, baseline)

    # v('') = (1 + 1) / 3 = 2/3, v(t) = (1 + 4/3) / 3 = 7/9, v(t/1) = (1 + 14/9) / 3 = 23/27
    advantages = {c.episode.id: c.advantage for c in credits.credited}
    assert advantages == pytest.approx(
        {"a": 2 / 3, "b": -2 / 3, "c": -2 / 3, "d": 2 / 3, "e": 4 / 27, "f": -2 / 3}
    )
    assert (credits.groups, credits.singles, credits.dropped) == (1, 2, {})
    assert credit(items[::-1], LOOP, baseline) == credits


def test_what_cannot_teach_is_dropped_and_counted(episode: MakeEpisode, turn: MakeTurn) -> None:
    good = turn([1], [2, 3])
    silent = replace(good, logprobs=None)
    items = [
        Item(episode("a", [good], task_key="same"), 1.0),
        Item(episode("b", [good], task_key="same"), 1.0),
        Item(episode("c", [good, silent], task_key="x"), 1.0),
        Item(episode("d", [turn([1], [])], task_key="y"), 1.0),
        Item(episode("e", [good], task_key="z", temperature=0.0), 1.0),
        Item(episode("f", [good], task_key="half"), 0.505),
    ]
    credits = credit(items, LOOP, Baseline())
    assert credits.credited == ()
    assert credits.dropped == {
        "no_signal": 3, "no_logprobs": 1, "no_sampled_tokens": 1, "greedy": 1,
    }  # fmt: skip


def test_untrainable_episodes_still_count_in_their_group(
    episode: MakeEpisode, turn: MakeTurn
) -> None:
    good = turn([1], [2])
    items = [
        Item(episode("a", [good]), 1.0),
        Item(episode("b", [replace(good, logprobs=None)]), 0.0),
    ]
    credits = credit(items, LOOP, Baseline())
    assert [(c.episode.id, c.advantage) for c in credits.credited] == [("a", 1.0)]
