"""Five percent of forged feedback: what it does, and what is left of it under quarantine.

`python -m benchmarks.poisoning` has more houses, more forgers and seeds.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.miniature import build_actor
from benchmarks.poisoning import DEFENDED, House, learned
from feedback.spec import RewardSpec


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actor")
    build_actor(folder)
    return folder


def test_a_forger_among_twenty_is_silenced_and_its_harm_is_bounded(actor: Path) -> None:
    trusting = House(RewardSpec(), words=1, forgers=1, rng=random.Random(1))
    guarded = House(DEFENDED, words=1, forgers=1, rng=random.Random(1))
    learned(actor, trusting, versions=15, seed=1)
    success = learned(actor, guarded, versions=15, seed=1)
    assert guarded.unheard == {("source00", "success")}
    assert guarded.wrong < 0.75 * trusting.wrong
    assert success > 0.85


def test_of_three_judges_one_forger_changes_no_reward(actor: Path) -> None:
    house = House(RewardSpec(), words=3, forgers=1, rng=random.Random(1))
    assert learned(actor, house, versions=5, seed=1) > 0.6
    assert house.wrong == 0
