"""What `/v1/training` tells: the trainer's process, pauses, and each policy's way to an update.

Where it comes from is `server.routes.training`'s to know.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from server.pauses import Ended
from server.wire import BodyOut, Figures

PolicyStateName = Literal["off", "down", "training", "canary", "pinned", "triggered", "waiting"]


class NoTrainerOut(BodyOut):
    """This server runs no trainer."""

    enabled: Literal[False] = False
    alive: Literal[False] = False


class TrainerOut(BodyOut):
    """The trainer's process, which this server keeps running."""

    enabled: Literal[True] = True
    alive: bool = Field(description="Whether it runs now.")
    pid: int | None = Field(description="Null while it does not run.")
    restarts: int = Field(description="Since the server started.")
    last_exit: int | None = Field(
        description="Exit status of the last run that ended by itself; negative: the signal that "
        "ended it; null: none did."
    )
    started_at: float | None = Field(
        description="Of the present run, or the last one, Unix seconds; null: none began yet."
    )


class PausesOut(BodyOut):
    """Pauses of serving for the trainer. Counts are since this server started."""

    enabled: bool = Field(description="Whether `trainer.share` is `pause`.")
    paused: bool = Field(description="Serving stands still now.")
    fault: str | None = Field(
        description="Why the engine is not to be trusted since its last pause; null: it is."
    )
    count: int = Field(description="How many there were.")
    seconds: float = Field(description="Of all together.")
    longest_seconds: float = Field(description="Of the longest one.")


class CountsOut(BodyOut):
    """A policy's live and practice episodes, by what keeps them from being trained on."""

    ready: int = Field(description="Nothing does: they wait for enough others.")
    waiting_for_outcome: int = Field(description="They ended, and a metric has not come.")
    immature: int = Field(description="They are inside the maturity window.")
    running: int = Field(description="They have not ended.")
    claimed: int = Field(description="A run under way has them.")
    trained: int = Field(description="They were used.")
    held_back: int = Field(
        description="Too much of a batch would rest on one source's word, or on one key's."
    )
    late: int = Field(description="They were used, and more was said since: the next run is told.")
    dropped: dict[str, int] = Field(
        description="They never will be, by reason: no_turns, no_logprobs, no_outcome, stale, "
        "expired."
    )


class TrainingRunOut(BodyOut):
    """A batch that the trainer claimed, and what came of it."""

    id: int = Field(description="The same when the batch is claimed again.")
    policy: str = Field(description="Its name.")
    owner: str = Field(description="The trainer that claimed it.")
    fence: int = Field(description="Of the claim: every one of a policy has a higher one.")
    state: str = Field(
        description="claimed, then what the trainer reports, then finished or abandoned."
    )
    live_version: int = Field(description="What was live when it was claimed.")
    version: int | None = Field(description="That it published; null: none, or none yet.")
    n_episodes: int = Field(description="Of the batch.")
    lease_expires_at: float = Field(
        description="Unix seconds: past it, another trainer may take it over."
    )
    started_at: float = Field(description="Unix seconds.")
    finished_at: float | None = Field(description="Unix seconds; null until it ends.")
    dropped: dict[str, int] = Field(
        description="Episodes that were dropped since the claim before, by reason."
    )
    figures: Figures = Field(
        description="What it measured, by name; `outcome` says why nothing was published."
    )
    reason: str | None = Field(description="Why it was abandoned.")


class PolicyTrainingOut(BodyOut):
    """Whether a policy is learning, and if not, why not yet."""

    policy: str = Field(description="Its name.")
    live: str = Field(description="The version that is live, `policy@vN`.")
    state: PolicyStateName = Field(
        description="off: this server runs no trainer; down: it ended, and is started again; "
        "training; canary: a trial goes on; pinned: nothing replaces what is live; triggered: the "
        "next batch is there; waiting: it is not."
    )
    why: str = Field(description="For people.")
    next_trigger: str = Field(description="What has to happen first, for people.")
    counts: CountsOut
    runs: list[TrainingRunOut] = Field(description="The last ten, newest first.")


class TrainingOut(BodyOut):
    """The trainer, and the policies of the caller's agents."""

    object: Literal["training"] = "training"
    trainer: TrainerOut | NoTrainerOut = Field(description="Whether this server runs one.")
    pauses: PausesOut
    policies: list[PolicyTrainingOut] = Field(description="By name.")


class PausedOut(TypedDict):
    """The first line of a pause: serving stands still."""

    object: Literal["training.pause"]
    state: Literal["paused"]
    seconds: Annotated[float, Field(description="That are left of `trainer.pause_seconds`.")]


class PauseOverOut(TypedDict):
    """The last line of a pause: serving goes on."""

    object: Literal["training.pause"]
    state: Literal["over"]
    ended: Annotated[
        Ended | None,
        Field(
            description="released: who held it let go; deadline: its time was up; needed: the "
            "engine was; stopped: the server stops."
        ),
    ]
