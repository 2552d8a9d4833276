"""The best version is never among those that may be deleted, whatever became of the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policy.release_state import Change, ReleaseEvent, fold
from policy.retention import disposable
from policy.types import AdapterRef

SUCCESSES = st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=2, max_size=12)


@given(successes=SUCCESSES, keep=st.integers(1, 3), rolled_back=st.booleans())
def test_the_best_one_stays(successes: list[float], keep: int, rolled_back: bool) -> None:
    changes = [
        change
        for version, _ in enumerate(successes, start=1)
        for change in (Change(version - 1, "retired"), Change(version, "live"))
    ]
    figures = dict(enumerate(successes, start=1))
    if rolled_back:
        changes += [Change(len(successes), "rolled_back"), Change(len(successes) - 1, "live")]
        del figures[len(successes)]
    events = [
        ReleaseEvent(
            at, AdapterRef("desk", version), state, "test", "", float(at),
            {"heldout": successes[version - 1]} if state == "live" else {},
        )
        for at, (version, state, _) in enumerate(changes, start=1)
    ]  # fmt: skip
    best = max(figures, key=lambda version: (figures[version], version))
    gone = disposable(events, fold("desk", changes), keep=keep, before=1e9)
    assert best not in gone
    assert len(gone) >= len(successes) - keep - 4, "and the others go"
