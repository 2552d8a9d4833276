"""`algorithm: auto`: the rule, line by line, and what is counted for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from feedback.spec import AlgorithmName, GateSpec, TrainingSpec
from feedback.training import RewardedEpisode
from feedback.types import Episode
from trainer.algorithms.auto import Contents, contents_of, fitting, settled
from trainer.algorithms.choice import chosen

MakeEpisode = Callable[..., Episode]


@pytest.mark.parametrize(
    ("contents", "algorithm"),
    [
        # A pair for every two episodes; fewer are not what decides.
        (Contents(0, 0, True, 0.0, pairs=3), "dpo"),
        (Contents(200, 5, True, 0.0, pairs=100), "dpo"),
        (Contents(200, 5, True, 0.0, pairs=99), "loop"),
        # Stale through and through, whatever else.
        (Contents(200, 5, True, 3.0), "positive"),
        (Contents(10, 0, True, 3.0), "positive"),
        (Contents(200, 5, True, 2.0), "loop"),
        # Few thumbs, none comparable with another.
        (Contents(31, 0, True, 0.0), "kto"),
        (Contents(31, 1, True, 0.0), "loop"),
        (Contents(31, 0, False, 0.0), "loop"),
        (Contents(32, 0, True, 0.0), "loop"),
    ],
)
def test_the_first_line_that_holds(contents: Contents, algorithm: AlgorithmName) -> None:
    assert fitting(contents) == algorithm


def test_what_a_batch_holds(episode: MakeEpisode) -> None:
    items = [
        RewardedEpisode(episode("a", [], task_key="t", version=3), 1.0),
        RewardedEpisode(episode("b", [], task_key="t", version=3), 0.0),
        RewardedEpisode(episode("c", [], task_key="t", version=5), 1.0),  # another version
        RewardedEpisode(episode("d", [], task_key="u", version=9), 1.0),
        RewardedEpisode(episode("e", [], task_key="u", version=9), 1.0),  # no spread
    ]
    found = contents_of(items, live_version=7, pairs=2)
    assert found == Contents(5, 1, True, staleness=2.0, pairs=2)
    assert not contents_of([*items, RewardedEpisode(items[0].episode, 0.5)], live_version=7).binary
    assert contents_of([], live_version=7) == Contents(0, 0, True, 0.0)


def test_what_the_owner_names_stands_and_auto_takes_the_founds_defaults() -> None:
    named = TrainingSpec(algorithm="grpo")
    assert settled(named, Contents(0, 0, True, 0.0, pairs=1)) is named
    auto = TrainingSpec(algorithm="auto", learning_rate=1e-3, gate=GateSpec(parity=0.2))
    found = settled(auto, Contents(10, 0, True, 0.0))
    assert (found.algorithm, found.beta, found.learning_rate) == ("kto", 0.1, 1e-3)
    assert found.gate.parity == 0.2
    loop = settled(auto, Contents(200, 0, True, 0.0))
    assert chosen(loop) == chosen(TrainingSpec())


def test_auto_reads_no_algorithms_options() -> None:
    with pytest.raises(ValidationError, match="'auto' does not read clip_low"):
        TrainingSpec(algorithm="auto", clip_low=0.2)
