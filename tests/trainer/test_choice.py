"""An algorithm has just the options that the settings say it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from feedback.spec import OPTIONS, TrainingSpec
from trainer.algorithms.choice import chosen

OTHER: dict[str, Any] = {
    "clip_low": 0.3, "clip_high": 0.4, "ratio_cap": 3.0, "ratio": "turn",
    "kl_base": 0.5, "episode_tokens": 99, "gamma": 0.9, "gae_lambda": 0.8, "value_clip": 0.3,
    "value_learning_rate": 1e-2, "value_steps": 7,
    "beta": 0.7, "reference": "base", "desirable_weight": 1.5,
    "undesirable_weight": 2.5, "min_reward": 0.8, "error_weight": 0.25,
}  # fmt: skip


def options(spec: TrainingSpec) -> dict[str, Any]:
    algorithm: Any = chosen(spec)
    return dataclasses.asdict(algorithm)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_algorithm(name: str) -> None:
    assert options(TrainingSpec.model_validate({"algorithm": name})) == OPTIONS[name]
    given = {option: OTHER[option] for option in OPTIONS[name]}
    assert options(TrainingSpec.model_validate({"algorithm": name, **given})) == given


def test_every_name_is_another_algorithm() -> None:
    kinds = {type(chosen(TrainingSpec.model_validate({"algorithm": name}))) for name in OPTIONS}
    assert len(kinds) == len(OPTIONS)
