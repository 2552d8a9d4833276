"""The whole path from episodes to a better policy, without a server: it really learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.miniature import EPISODES, build_actor
from benchmarks.miniature_learner import Learner, spec_with
from feedback.spec import OPTIONS

GROUP_SIZES = {"dpo": (6,), "kto": (1,), "sft": (1,), "ppo": (6,)}
"""Rewards make no pairs of singles; the others do not look at groups."""


@pytest.fixture(scope="module")
def actor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actor")
    build_actor(folder)
    return folder


@pytest.mark.parametrize("group_size", [1, 6])
def test_success_rises(actor_folder: Path, group_size: int) -> None:
    learner = Learner(actor_folder, spec_with({}), group_size=group_size, seed=group_size)
    before = learner.success()
    for version in learner.versions(30):
        credits = version.credits
        tasks = credits.singles if group_size == 1 else credits.groups
        assert tasks == EPISODES // group_size
    after = learner.success()
    assert 0.25 < before < 0.55
    assert after > 0.85, (before, after)


@pytest.mark.parametrize(
    "options",
    [
        *({"algorithm": name} for name in OPTIONS if name != "loop"),
        {"ratio": "turn"},
        {"ratio": "trajectory"},
        {"algorithm": "grpo", "kl_base": 0.04},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_every_algorithm_learns(actor_folder: Path, options: dict[str, object]) -> None:
    for group_size in GROUP_SIZES.get(str(options.get("algorithm")), (1, 6)):
        learner = Learner(actor_folder, spec_with(options), group_size=group_size, seed=group_size)
        for _ in learner.versions(20):
            pass
        assert learner.success() > 0.8
