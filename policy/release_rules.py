"""Which release events may follow which: what each act appends, or why it is refused.

Pure functions of the state that the events add up to. `policy.releases` reads that state and
writes down what these say, as one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from policy.release_errors import LivePinned, NothingToRollBack, NotPromotable, ReleaseConflict
from policy.release_state import Change, ReleaseState, ReleaseStateName
from policy.types import AdapterRef

WRITTEN_BY_RECORD = ("candidate", "loaded", "rejected", "deleted")
"""What is recorded as it is; promotions, trials, rollbacks and pins lead to the rest."""
_BEFORE: Mapping[str, frozenset[str | None]] = MappingProxyType(
    {
        "candidate": frozenset({None}),
        "loaded": frozenset({"candidate"}),
        "rejected": frozenset({None, "candidate", "loaded", "canary", "retired", "rolled_back"}),
        "deleted": frozenset({"retired", "rejected", "rolled_back"}),
        "live": frozenset({"loaded", "canary", "retired", "rolled_back"}),
    }
)


def check_expected(now: ReleaseState, live: int | None, sequence: int | None) -> None:
    """Raises ReleaseConflict if another version is live, or anything came after that event."""
    if live is not None and now.live.version != live:
        raise ReleaseConflict(
            f"{now.live} is live; expected {AdapterRef(now.policy, live)}; another promotion "
            "or rollback came first"
        )
    if sequence is not None and now.sequence != sequence:
        raise ReleaseConflict(
            f"{now.policy!r} has {now.sequence} release events; expected {sequence}; somebody "
            "else came first"
        )


def recorded(now: ReleaseState, version: int, state: ReleaseStateName) -> Change:
    """One of WRITTEN_BY_RECORD. Raises ReleaseConflict."""
    before = now.states.get(version)
    if state == "deleted" and version in now.pinned:
        raise ReleaseConflict(f"{AdapterRef(now.policy, version)} is pinned; it stays on disk")
    if before not in _BEFORE[state]:
        raise ReleaseConflict(
            f"{AdapterRef(now.policy, version)} is {before or 'unknown'!r}, which {state!r} cannot "
            "follow; a live version is first replaced by promote or rollback"
        )
    return Change(version, state)


def tried_out(now: ReleaseState, ref: AdapterRef, share: float, *, automatic: bool) -> Change:
    """Raises LivePinned, NotPromotable or ReleaseConflict."""
    _check_free(now, automatic)
    if now.canary is None and now.states.get(ref.version) != "loaded":
        raise NotPromotable(
            f"{ref} is {now.states.get(ref.version, 'unknown')!r}; only a loaded version "
            "can become a canary"
        )
    if now.canary is not None and (now.canary.ref != ref or now.canary.share >= share):
        raise ReleaseConflict(
            f"{now.canary.ref} is on trial with a share of {now.canary.share:g}; expected "
            f"no other, or less than {share:g}"
        )
    return Change(ref.version, "canary", share)


def promoted(now: ReleaseState, ref: AdapterRef, *, automatic: bool) -> tuple[Change, ...]:
    """Nothing if `ref` is live already. Raises LivePinned or NotPromotable."""
    if now.live == ref:
        return ()
    _check_free(now, automatic)
    state = now.states.get(ref.version)
    if not ref.is_base and state not in _BEFORE["live"]:
        raise NotPromotable(
            f"{ref} is {state or 'unknown'!r}; only a loaded version, a canary, or one "
            "that was live before, can become live"
        )
    ended = () if now.canary is None or now.canary.ref == ref else _taken_back(now)
    return (*ended, Change(now.live.version, "retired"), Change(ref.version, "live"))


def rolled_back(
    now: ReleaseState, changes: Sequence[Change], to: int | None
) -> tuple[AdapterRef, tuple[Change, ...]]:
    """What is live then, and how. `changes` are all so far; `now` is their sum.

    Raises NothingToRollBack or ReleaseConflict.
    """
    if now.canary is not None and to is None:
        return now.live, _taken_back(now)
    target = _checked_target(now, to, changes)
    steps = (Change(now.live.version, "rolled_back"), Change(target.version, "live"))
    return target, (*_taken_back(now), *steps)


def pinned(now: ReleaseState, ref: AdapterRef, *, pinned: bool) -> tuple[Change, ...]:
    """Nothing if that is so already. Raises ReleaseConflict."""
    if now.states.get(ref.version, "deleted") == "deleted" or ref.is_base:
        raise ReleaseConflict(
            f"{ref} cannot be pinned; expected one of the versions "
            f"{[v for v, name in sorted(now.states.items()) if v and name != 'deleted']}"
        )
    if (ref.version in now.pinned) == pinned:
        return ()
    return (Change(ref.version, "pinned" if pinned else "unpinned"),)


def _taken_back(now: ReleaseState) -> tuple[Change, ...]:
    return () if now.canary is None else (Change(now.canary.ref.version, "rolled_back"),)


def _check_free(now: ReleaseState, automatic: bool) -> None:
    if automatic and now.is_frozen:
        raise LivePinned(f"{now.live} is live and pinned; nothing replaces it by itself")


def _checked_target(now: ReleaseState, to: int | None, changes: Sequence[Change]) -> AdapterRef:
    """Where a rollback of the live version leads."""
    if now.live.is_base:
        raise NothingToRollBack(
            f"policy {now.policy!r} serves its base model, {now.live}; nothing is below it"
        )
    target = now.previous if to is None else AdapterRef(now.policy, to)
    if target == now.live or not _was_live(now, target, changes):
        raise ReleaseConflict(
            f"cannot roll {now.live} back to {target}, which is "
            f"{now.states.get(target.version, 'unknown')!r}; expected version 0 or one "
            f"that was live before, such as {now.previous}"
        )
    return target


def _was_live(now: ReleaseState, ref: AdapterRef, changes: Sequence[Change]) -> bool:
    """And may be again. A canary that was taken back is 'rolled_back' too, but never was live."""
    if ref.is_base:
        return True
    over = now.states.get(ref.version) in ("retired", "rolled_back")
    return over and any(c.version == ref.version and c.state == "live" for c in changes)
