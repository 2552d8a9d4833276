"""What an owner declares about learning, in the agent's file: its reward and its training.

Shared by the server, which explains ("why not training yet?"), and the trainer, which obeys.
The computing is elsewhere: `feedback.reward` for rewards, `trainer` for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Unknown keys are errors: a misspelt limit must not pass silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MetricRange(Strict):
    """A metric's values, mapped linearly from [low, high] to [0, 1] (high may be below low)."""

    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low!r}; expected two different values")
        return self


class MetricSpec(MetricRange):
    """One outcome metric of the reward."""

    weight: float = Field(1.0, gt=0)
    required: bool = Field(True, description="The reward stays pending until this metric arrives.")
    turns: Literal["none", "mean", "sum"] = Field(
        "none", description="What words on single turns make, where none is on the whole episode."
    )
    missing: Literal["wait", "drop"] | float = Field(
        "wait",
        description="What it means if it never arrives: wait for ever, drop the episode, or a "
        "value that is taken for it.",
    )
    missing_after_seconds: float | None = Field(
        None, ge=0, description="How long after the episode's end it is given up."
    )

    @model_validator(mode="after")
    def _gives_up_at_some_time(self) -> Self:
        if (self.missing == "wait") != (self.missing_after_seconds is None):
            raise ValueError(
                f"missing is {self.missing!r} and missing_after_seconds "
                f"{self.missing_after_seconds!r}; 'wait' takes no time, all else needs one"
            )
        if self.missing != "wait" and not self.required:
            raise ValueError("missing is for required metrics; others are left out if they miss")
        return self


class CostSpec(Strict):
    """What an amount takes from the reward."""

    full: float = Field(gt=0, description="The amount, and more of it, that takes all of `weight`.")
    weight: float = Field(gt=0, le=1, description="The part of the reward that is taken then.")


class CostsSpec(Strict):
    """What an episode used up, in proportion; a failure earns nothing by being cheap."""

    tokens: CostSpec | None = Field(None, description="Sampled tokens.")
    turns: CostSpec | None = None
    seconds: CostSpec | None = Field(None, description="From the episode's begin to its end.")

    @model_validator(mode="after")
    def _leave_something(self) -> Self:
        total = sum(cost.weight for cost in (self.tokens, self.turns, self.seconds) if cost)
        if total > 1:
            raise ValueError(f"weights add up to {total:g}; expected 1 at most")
        return self


class GuardSpec(MetricRange):
    """A metric that a candidate or a canary must not worsen, part of the reward or not."""

    margin: float = Field(
        0.05, gt=0, lt=1, description="Loss that must not pass, on the scale of [0, 1]."
    )


class QuarantineSpec(Strict):
    """When a source's word on a metric stops counting until an owner has looked at it."""

    z: float = Field(5.0, gt=0, description="Robust z-score of its mean from which it deviates.")
    window: int = Field(200, ge=1, description="Its latest words that are looked at.")
    min_words: int = Field(30, ge=2, description="Fewer are no evidence.")


class TrustSpec(Strict):
    """How far any one source is believed."""

    max_source_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Largest part of a batch whose reward rests on one source, or one API key.",
    )
    quarantine: QuarantineSpec | None = Field(None, description="None: no source is suspected.")


class RewardSpec(Strict):
    """How events become one scalar in [0, 1], or pending."""

    metrics: dict[str, MetricSpec] = Field(default_factory=lambda: {"success": MetricSpec()})
    costs: CostsSpec = CostsSpec()
    guards: dict[str, GuardSpec] = Field(
        default_factory=dict, description="Metrics that a canary must not worsen."
    )
    maturity_seconds: float = Field(
        0.0, ge=0, description="Wait this long after an episode's end before its reward counts."
    )
    trust: TrustSpec = TrustSpec()


class GateSpec(Strict):
    """What a candidate must pass before any traffic."""

    max_norm: float = Field(
        0.5,
        gt=0,
        description="Largest change of a weight matrix, as a part of its own norm.",
    )
    parity: float = Field(0.05, gt=0, description="Largest |engine - trainer| logprob gap, nats.")
    episodes: int = Field(
        64,
        ge=0,
        description="Logged episodes on which the trainer's model is read; 0: none.",
    )
    max_kl: float = Field(
        1.0, gt=0, description="Largest mean divergence from the base model, nats a sampled token."
    )
    min_entropy: float = Field(0.0, ge=0, description="Lowest mean entropy, nats a sampled token.")
    max_entropy_rise: float = Field(
        1.0, gt=0, description="How far the mean entropy may be above the base model's, nats."
    )
    min_ess: float = Field(
        16.0, gt=1, description="Effective episodes from which the off-policy estimate may veto."
    )
    heldout: str | None = Field(
        None,
        description="Import path 'package.module:name' of held-out tasks; None skips the check.",
    )
    heldout_tasks: int = Field(48, ge=1)
    margin: float = Field(
        0.1, ge=0, le=1, description="How far below the incumbent's success a candidate may fall."
    )


class ShadowSpec(Strict):
    """How a canary answers copies of requests: its answers are logged and never served."""

    share: float = Field(
        0.05, gt=0, le=1, description="Part of other versions' new episodes that is copied."
    )
    max_concurrent: int = Field(
        1, ge=1, description="Copies at once; past it none is made, so that traffic goes first."
    )
    max_tokens: int = Field(256, ge=1, description="Longest answer to a copy.")
    max_failed: float = Field(
        0.05, ge=0, lt=1, description="Part of the copies that may fail before stage 0 is over."
    )


class CanarySpec(Strict):
    """How a candidate that passed the gate is tried on real traffic before it is live."""

    stages: tuple[float, ...] = Field(
        (0.05, 0.25, 1.0),
        description="Its share of new episodes, step by step; 1 means live, 0 copies only.",
    )
    shadow: ShadowSpec | None = Field(
        None, description="Also have it answer copies of requests, for nobody; None: no copies."
    )
    margin: float = Field(
        0.05, gt=0, lt=1, description="Loss of mean reward, over all traffic, that must not pass."
    )
    alpha: float = Field(
        0.025, gt=0, lt=0.5, description="Probability of a false rollback; of a false pass, too."
    )
    min_episodes: int = Field(
        50, ge=1, description="Outcomes of the canary at a stage before the next one."
    )

    @model_validator(mode="after")
    def _leads_up_to_live(self) -> Self:
        served = self.stages[1:] if self.stages[:1] == (0,) else self.stages
        rises = all(low < high for low, high in pairwise((0.0, *served)))
        if not served or served[-1] != 1 or served[0] < 0.01 or not rises:
            raise ValueError(
                f"stages are {list(self.stages)}; expected shares of 0.01 or more that rise to 1, "
                "such as [0.05, 0.25, 1], after a 0 for copies only"
            )
        if served != self.stages and self.shadow is None:
            raise ValueError("stages begin with 0, but no shadow is set: nothing would happen")
        return self

    def stage_after(self, share: float) -> float:
        """The next share; 1 after the last one, and for a share that the stages no longer name."""
        return next((stage for stage in self.stages if stage > share), 1.0)


def margin_before(margin: float, share: float) -> float:
    """The canary's loss that must be ruled out before it takes `share` of traffic: a small part may
    be risked on weaker evidence, so long as all traffic together loses no more than `margin`."""
    return min(1.0, margin / share)


class MissingSpec(Strict):
    """How outcomes that never arrive are made up for, by those that do."""

    after_seconds: float = Field(
        86_400.0, ge=0, description="An outcome that took longer than this is missing."
    )
    max_weight: float = Field(
        4.0, ge=1, description="Most episodes that one stands for, before the mean is taken out."
    )


AlgorithmName = Literal[
    "loop", "rloo", "grpo", "dr_grpo", "reinforce_pp", "spo", "cispo", "positive",
    "ppo", "kto", "dpo", "sft", "auto",
]  # fmt: skip

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "loop": {"clip_low": 0.1, "clip_high": 0.1, "ratio_cap": 2.0, "ratio": "token"},
    "rloo": {"ratio_cap": 2.0},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 2.0, "kl_base": 0.0},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 2.0, "episode_tokens": 256},
    "reinforce_pp": {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 2.0},
    "spo": {"clip_low": 0.2, "clip_high": 0.28, "ratio_cap": 2.0},
    "cispo": {"ratio_cap": 5.0},
    "positive": {},
    "ppo": {
        "clip_low": 0.2, "clip_high": 0.2, "ratio_cap": 2.0,
        "gamma": 1.0, "gae_lambda": 0.95, "value_clip": 0.2,
        "value_learning_rate": 1e-3, "value_steps": 32,
    },
    "kto": {
        "beta": 0.1, "reference": "start", "desirable_weight": 1.0, "undesirable_weight": 1.0,
    },
    "dpo": {"beta": 0.1, "reference": "start"},
    "sft": {"min_reward": 0.5, "error_weight": 0.0},
}  # fmt: skip
"""The options that each algorithm reads, and its defaults: its paper's, where that has them.

`auto` is none of them: whichever it turns out to be has its own defaults.
"""


class TrainingSpec(Strict):
    """When and how the adapter line is trained."""

    enabled: bool = True
    algorithm: AlgorithmName = Field("loop", description="See docs/algorithms.md.")
    min_episodes: int = Field(128, ge=1, description="Matured episodes that trigger an update.")
    max_episodes: int = Field(
        512, ge=1, description="Most episodes taken by one update, the freshest first."
    )
    max_wait_seconds: float | None = Field(
        None, gt=0, description="Train on fewer once the oldest matured episode waited this long."
    )
    max_staleness: int = Field(
        4, ge=0, description="Drop episodes sampled more than this many live versions ago."
    )
    epochs: int = Field(1, ge=1)
    minibatch_episodes: int = Field(32, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    clip_low: float = Field(0.1, gt=0, description="The clip's epsilon below 1.")
    clip_high: float = Field(0.1, gt=0, description="The clip's epsilon above 1.")
    ratio_cap: float = Field(
        2.0, ge=1, description="Largest weight of a gradient, whatever its ratio."
    )
    ratio: Literal["token", "turn", "trajectory"] = Field(
        "token", description="What LOOP takes one ratio of."
    )
    kl_base: float = Field(
        0.0, ge=0, description="Weight of the divergence from the base model: GRPO's beta."
    )
    episode_tokens: int = Field(
        256, ge=1, description="Dr. GRPO's constant in place of an episode's sampled tokens."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="PPO's discount of a turn.")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="PPO: 0 trusts the value head, 1 the outcome."
    )
    value_clip: float = Field(0.2, gt=0, description="PPO: farthest that one update moves a value.")
    value_learning_rate: float = Field(1e-3, gt=0, description="Of PPO's value head.")
    value_steps: int = Field(
        32, ge=1, description="PPO: the value head's optimizer steps an update."
    )
    beta: float = Field(
        0.1, gt=0, description="DPO and KTO: how dear it is to leave the reference policy."
    )
    reference: Literal["start", "base"] = Field(
        "start", description="DPO and KTO: the version that an update starts from, or the base."
    )
    desirable_weight: float = Field(1.0, gt=0, description="KTO: what a good episode weighs.")
    undesirable_weight: float = Field(1.0, gt=0, description="KTO: what a bad episode weighs.")
    min_reward: float = Field(
        0.5, gt=0, le=1, description="SFT: the reward that makes an episode a demonstration."
    )
    error_weight: float = Field(
        0.0, ge=0, le=1, description="SFT: what the tokens of turns that were errors weigh."
    )
    curriculum: bool = Field(
        False, description="Weigh tasks by p (1 - p), p being how often they are expected to end "
        "well: neither the solved nor the hopeless first.",
    )  # fmt: skip
    missing: MissingSpec | None = Field(
        None, description="Weigh episodes by how seldom the like of them get an outcome."
    )
    replay: float = Field(
        0.0, ge=0, lt=1, description="Share of an update's samples that are successes of earlier "
        "batches, imitated once more against forgetting.",
    )  # fmt: skip
    mask_off_policy: float | None = Field(
        None,
        ge=0,
        description="Leave out the blame of episodes whose tokens are this many nats less likely "
        "now than when sampled, in the mean; None: of none.",
    )
    max_engine_gap: float = Field(
        0.5,
        gt=0,
        description="Refuse an update if engine and trainer differ by more, nats a token.",
    )
    max_grad_norm: float = Field(1.0, gt=0)
    kl_stop: float = Field(
        20.0, gt=0, description="Stop an update when a trajectory's KL passes it."
    )
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    gate: GateSpec = GateSpec()
    canary: CanarySpec | None = Field(
        None,
        description="Try what passed the gate on a share of traffic first; None: live at once.",
    )

    @model_validator(mode="before")
    @classmethod
    def _takes_the_algorithms_options(cls, given: Any) -> Any:
        """Fill in its defaults; refuse what it would ignore."""
        name = given.get("algorithm", "loop") if isinstance(given, Mapping) else None
        if not isinstance(name, str) or name not in (*OPTIONS, "auto"):
            return given  # the field's own check says what is wrong
        own = OPTIONS.get(name, {})
        known = {option for options in OPTIONS.values() for option in options}
        ignored = sorted((known - own.keys()) & given.keys())
        if ignored:
            raise ValueError(
                f"algorithm {name!r} does not read {', '.join(ignored)}; remove it, or choose an "
                f"algorithm that does; {name!r} reads {', '.join(own) or 'none of these'}"
            )
        return {**own, **given}

    @model_validator(mode="after")
    def _caps_above_the_clip(self) -> Self:
        if "clip_high" in OPTIONS.get(self.algorithm, {}) and self.ratio_cap <= 1 + self.clip_high:
            raise ValueError(
                f"ratio_cap is {self.ratio_cap:g}; expected more than 1 + clip_high, which is "
                f"{1 + self.clip_high:g}"
            )
        return self

    @model_validator(mode="after")
    def _masks_where_there_is_blame(self) -> Self:
        blames = "ratio_cap" in OPTIONS.get(self.algorithm, {"ratio_cap": None})
        if self.mask_off_policy is not None and not blames:
            raise ValueError(
                f"algorithm {self.algorithm!r} does not read mask_off_policy: it takes no ratio; "
                "remove it, or choose an algorithm that does"
            )
        return self


class LearningSpec(Strict):
    """The part of an agent's file that the trainer reads."""

    policy: str = Field(pattern=r"^[a-z][a-z0-9._-]{0,62}$")
    reward: RewardSpec = RewardSpec()
    training: TrainingSpec = TrainingSpec()
