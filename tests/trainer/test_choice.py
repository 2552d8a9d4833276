"""An algorithm has just the options that the settings say it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from feedback.spec import OPTIONS, TrainingSpec
from trainer.algorithms.choice import chosen

OTHER: dict[str, Any] = {
    "clip_low": 0.3, "clip_high": 0.4, "ratio_cap": 3.0, "ratio": "turn",
    "kl_base": 0.5, "episode_tokens": 99,
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
