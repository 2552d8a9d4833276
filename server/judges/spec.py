"""A judge as its owner declares it, in the agent's file. Asking it is `server.judges.judge`'s."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from feedback.references import is_reference
from feedback.spec import Strict
from feedback.types import METRIC_PATTERN

JUDGE_PREFIX = "judge:"
"""Before a judge's name in the record. Nobody else may say it: `/v1/feedback` refuses it."""


def _reference(text: str) -> str:
    if not is_reference(text):
        raise ValueError("expected ${env:NAME} or ${file:PATH}: a secret has no place in this file")
    return text


class JudgeSpec(Strict):
    """A model that reads each finished episode and gives it a number."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")
    model: str = Field(min_length=1, max_length=200, description="As its server calls it.")
    base_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OpenAI-compatible, with /v1. None: this server itself.",
    )
    api_key: Annotated[str, AfterValidator(_reference)] | None = None
    instructions: str = Field(
        min_length=1,
        max_length=20_000,
        description="What is good, in words; the transcript follows.",
    )
    metric: str = Field("judged", pattern=METRIC_PATTERN)
    low: float = 0.0
    high: float = Field(10.0, description="The numbers that it may give: low to high.")
    per_minute: int = Field(60, ge=1, description="Most episodes judged in a minute.")
    attempts: int = Field(3, ge=1, description="After so many failures an episode is passed over.")
    timeout_seconds: float = Field(60.0, gt=0)
    may_judge_itself: bool = Field(
        False, description="Whether it may be the very policy that is judged."
    )

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; expected low below high")
        return self

    @property
    def source(self) -> str:
        """Its name in the record."""
        return JUDGE_PREFIX + self.name

    def is_one_of(self, names: set[str]) -> bool:
        """Whether it is asked of this server, as one of these agents or policies."""
        return self.base_url is None and self.model.removeprefix("agent:").split("@")[0] in names
