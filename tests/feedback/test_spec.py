"""Training options: each algorithm's own defaults, and nothing that it would ignore."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from feedback.spec import OPTIONS, AlgorithmName, LearningSpec, TrainingSpec


def test_every_algorithm_has_its_options_and_every_option_a_field() -> None:
    assert set(get_args(AlgorithmName)) == {*OPTIONS, "auto"}
    for options in OPTIONS.values():
        assert options.keys() <= TrainingSpec.model_fields.keys()


def test_loop_is_the_default_and_the_fields_show_its_options() -> None:
    assert TrainingSpec() == TrainingSpec(algorithm="loop")
    for option, value in OPTIONS["loop"].items():
        assert TrainingSpec.model_fields[option].default == value


def test_defaults_are_the_algorithms_own_and_can_be_set() -> None:
    spec = TrainingSpec.model_validate({"algorithm": "spo", "clip_low": 0.1})
    assert (spec.clip_low, spec.clip_high, spec.ratio_cap) == (0.1, 0.28, 2.0)
    again = TrainingSpec.model_validate(spec.model_dump(exclude_unset=True))
    assert again == spec
    assert LearningSpec(policy="desk", training=spec).training is spec


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"algorithm": "rloo", "clip_low": 0.1, "ratio": "turn"},
            "'rloo' does not read clip_low, ratio; .* 'rloo' reads ratio_cap",
        ),
        ({"kl_base": 0.1}, "'loop' does not read kl_base"),
        ({"algorithm": "positive", "ratio_cap": 2}, "'positive' reads none of these"),
        ({"algorithm": "a2c"}, "algorithm\n.*'loop', 'rloo'"),
        ({"algorithm": "dpo", "mask_off_policy": 0.1}, "'dpo' does not read mask_off_policy"),
        ({"algorithm": "ppo", "ratio_cap": 1.1}, "expected more than 1 \\+ clip_high, .* 1.2"),
        ({"algorithm": ["loop"]}, "algorithm\n"),
        ({"algorithm": "grpo", "ratio_cap": 1.2}, "expected more than 1 \\+ clip_high, .* 1.2"),
        ({"ratio": "episode"}, "ratio\n.*'token', 'turn' or 'trajectory'"),
        ("loop", "valid dictionary"),
    ],
)
def test_what_an_algorithm_would_ignore_is_refused(given: Any, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainingSpec.model_validate(given)


def test_a_cap_below_a_clip_that_is_not_read_is_fine() -> None:
    assert TrainingSpec(algorithm="rloo", ratio_cap=1.0).ratio_cap == 1.0
