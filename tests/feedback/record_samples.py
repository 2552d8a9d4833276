"""Small episodes, turns and events for the tests of the record."""

from __future__ import annotations

from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Purpose, Turn


def turn(
    index: int,
    prompt: tuple[int, ...] = (1, 2, 3),
    sampled: tuple[int, ...] = (4, 5),
    logprobs: bool = True,
) -> Turn:
    said = tuple(-0.25 * (i + 1) for i in range(len(sampled))) if logprobs else None
    return Turn(index, prompt, sampled, said, "text", "stop")


def episode(
    id: str,
    *,
    version: int = 0,
    ended_at: float | None = 100.0,
    turns: tuple[Turn, ...] | None = None,
    purpose: Purpose = "live",
    tenant: str = "default",
    policy: str = "desk",
    started_at: float = 50.0,
    task_key: str | None = None,
) -> Episode:
    """Finished with one trainable turn unless told otherwise; `ended_at=None` leaves it running."""
    return Episode(
        id=id,
        policy=policy,
        version=version,
        task_key=task_key or f"refund/{id}",
        started_at=started_at,
        tenant=tenant,
        purpose=purpose,
        turns=(turn(0),) if turns is None else turns,
        stop_reason=None if ended_at is None else "finished",
        ended_at=ended_at,
    )


def event(
    event_id: str,
    episode_id: str = "e",
    value: float | None = 1.0,
    *,
    metric: str = "success",
    source: str = "api",
    at: float = 10.0,
    tenant: str = "default",
    received_at: float = 11.0,
    turn: int | None = None,
) -> FeedbackEvent:
    return FeedbackEvent(
        event_id, source, episode_id, metric, value, at, received_at, tenant=tenant, turn=turn
    )


def on_task(
    event_id: str,
    task_key: str,
    value: float | None = 1.0,
    *,
    at: float = 10.0,
    source: str = "api",
    tenant: str = "default",
) -> FeedbackEvent:
    return FeedbackEvent(
        event_id, source, None, "success", value, at, 11.0, tenant=tenant, task_key=task_key
    )


def preferred(
    event_id: str, better: str, worse: str, value: float | None = 1.0, *, at: float = 10.0
) -> FeedbackEvent:
    return FeedbackEvent(
        event_id, "api", better, "preference", value, at, 11.0, kind="preference", worse_id=worse
    )


def corrected(
    event_id: str, text: str | None, *, turn: int | None = None, at: float = 10.0
) -> FeedbackEvent:
    return FeedbackEvent(
        event_id, "api", "e", "correction", None, at, 11.0,
        kind="correction", correction=text, turn=turn,
    )  # fmt: skip


def judged(
    store: Store, id: str, value: float = 1.0, *, version: int = 0, ended_at: float = 100.0
) -> None:
    """A finished episode with its outcome."""
    store.begin(episode(id, version=version, ended_at=ended_at))
    store.add_feedback([event(f"outcome-{id}", id, value)])
