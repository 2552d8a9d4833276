"""The desk's held-out tasks, as the trainer's gate calls for them."""

from __future__ import annotations

from examples.desk.traffic import Owner, Traffic


class HeldOut:
    """Works held-out tasks through a Hone server with one adapter version pinned."""

    async def evaluate(self, base_url: str, model: str, tasks: int, seed: int) -> list[float]:
        """Success (0 or 1) of each task; the same seed draws the same tasks.

        Raises RuntimeError if a request failed: an unanswered task is no evidence about an adapter.
        """
        owner = Owner()
        traffic = Traffic(base_url, owner)
        try:
            outcomes = await traffic.evaluate(tasks, seed, model=model)
        finally:
            await traffic.aclose()
            await owner.aclose()
        failed = [outcome.error for outcome in outcomes if outcome.error is not None]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {tasks} held-out requests failed; first: {failed[0]}"
            )
        return [float(outcome.success) for outcome in outcomes]


HELDOUT = HeldOut()
