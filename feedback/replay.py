"""Older successes of a policy, to be imitated once more against forgetting.

The one exception to "no episode is trained on twice", and only on an owner's word: what is read is
in state `trained`, stays there, and is no part of the claim. Which of them are worth it now is the
trainer's to judge.
"""

from __future__ import annotations

import random

from sqlalchemy import Connection, select

from feedback.rows import ITEM, RUN

RUNS = 8
"""Earlier batches that are drawn from, of the newest OF_LAST: reading them all would grow."""
OF_LAST = 200
SUCCESS = 0.5
"""A success has a reward above this."""


def older_successes(
    connection: Connection, policy: str, *, count: int, seed: int
) -> dict[str, float]:
    """At most `count` rewards by episode id; the same seed and record give the same draw."""
    rng = random.Random(seed)  # noqa: S311 - not a secret
    finished = (
        select(RUN.c.id)
        .where(RUN.c.policy == policy, RUN.c.state == "finished", RUN.c.version.is_not(None))
        .order_by(RUN.c.id.desc())
        .limit(OF_LAST)
    )
    runs = connection.execute(finished).scalars().all()
    drawn = rng.sample(runs, min(RUNS, len(runs)))
    rows = connection.execute(
        select(ITEM.c.episode_id, ITEM.c.reward)
        .where(ITEM.c.run_id.in_(drawn), ITEM.c.state == "trained", ITEM.c.reward > SUCCESS)
        .order_by(ITEM.c.episode_id)
    ).all()
    return {row.episode_id: row.reward for row in rng.sample(rows, min(count, len(rows)))}
