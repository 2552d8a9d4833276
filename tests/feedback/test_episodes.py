"""Episodes and turns: what is read back is what was recorded, and disorder is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from sqlalchemy import select

from feedback.errors import (
    EpisodeEnded,
    EpisodeExists,
    EpisodeForeign,
    EpisodeMissing,
    TurnOutOfOrder,
)
from feedback.rows import TURN
from feedback.store import Store
from feedback.types import ToolCall, Turn
from tests.feedback.record_samples import episode, event, turn


def float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


def stored_prompt_ids(store: Store, id: str) -> list[int]:
    """How many ids of each turn's prompt are on disk."""
    with store.database.connect() as connection:
        query = select(TURN.c.prompt_ids).where(TURN.c.episode_id == id).order_by(TURN.c.index)
        return [len(packed) // 4 for packed in connection.scalars(query)]


def test_an_episode_is_read_back_exactly_and_prompts_are_stored_once(store: Store) -> None:
    call = ToolCall("c1", "find", {"name": "Zoë 🦊", "n": [1, None]}, "ok", '{"orders": []}', 0.25)
    first = Turn(
        0, (1, 2, 3), (4, 2**32 - 1), (float32(-0.1), float32(-1e-7)), "a \ud83e\udd8a",
        "stop", (call,), None, 51.5, 0.125,
    )  # fmt: skip
    first = replace(first, text="fox 🦊")
    extending = turn(1, prompt=(1, 2, 3, 4, 2**32 - 1, 9, 9))
    nothing_new = turn(2, prompt=(*extending.prompt_ids, *extending.token_ids))
    one_id_differs = turn(3, prompt=(8, *nothing_new.prompt_ids[1:], *nothing_new.token_ids, 7))
    shorter = replace(turn(4, prompt=(1,), logprobs=False), fault="malformed call")
    turns = (first, extending, nothing_new, one_id_differs, shorter)

    begun = replace(episode("e", ended_at=None, turns=()), metadata={"customer": "Zoë"})
    store.begin(begun)
    for each in turns:
        store.append_turn("e", each)
    store.end("e", "turn_limit", 60.0)

    expected = replace(begun, turns=turns, stop_reason="turn_limit", ended_at=60.0)
    assert store.episode("e") == expected
    assert stored_prompt_ids(store, "e") == [3, 2, 0, len(one_id_differs.prompt_ids), 1]


def test_what_no_database_holds_loses_no_turn(store: Store) -> None:
    """Lone surrogates, NUL, and a model's `NaN`; the escapes of JSON hold the former two."""
    call = ToolCall("c", "find", {"a\0": "\0\ud83e", "b": [float("nan"), 1.5]}, "ok", "\0")
    said = replace(turn(0), text="bad \ud83e and \0 end", fault="\0", tool_calls=(call,))
    store.begin(replace(episode("e", turns=(said,)), task_key="\0", metadata={"k": "\0"}))
    kept = store.episode("e")
    assert kept is not None
    assert (kept.task_key, kept.metadata) == ("\ufffd", {"k": "\0"})
    (found,) = kept.turns
    assert (found.text, found.fault) == ("bad ? and \ufffd end", "\ufffd")
    assert (found.token_ids, found.logprobs) == (said.token_ids, said.logprobs)
    assert found.tool_calls[0].arguments == {"a\0": "\0\ud83e", "b": [None, 1.5]}
    assert found.tool_calls[0].result == "\0"


@pytest.mark.parametrize("name", ["id", "tenant", "policy", "agent"])
def test_a_name_that_no_database_holds_is_refused(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*without NUL"):
        store.begin(replace(episode("e"), **{name: "a\0"}))  # type: ignore[arg-type]  # all are text
    assert store.episode("a\0") is None
    assert store.episodes() == []


def test_disorder_is_refused_and_changes_nothing(store: Store) -> None:
    store.begin(episode("e", ended_at=None))
    before = store.episode("e")
    with pytest.raises(EpisodeExists):
        store.begin(episode("e"))
    with pytest.raises(EpisodeForeign):
        store.begin(episode("e", tenant="other"))
    with pytest.raises(EpisodeMissing):
        store.append_turn("unknown", turn(0))
    with pytest.raises(TurnOutOfOrder, match="expected 1"):
        store.append_turn("e", replace(turn(0), started_at=1.0))
    with pytest.raises(TurnOutOfOrder, match="expected 1"):
        store.append_turn("e", turn(2))
    with pytest.raises(ValueError, match="2 token ids and 1 logprobs"):
        store.append_turn("e", replace(turn(1), logprobs=(-1.0,)))
    with pytest.raises(ValueError, match="finite"):
        store.append_turn("e", replace(turn(1), logprobs=(-1.0, float("-inf"))))
    with pytest.raises(ValueError, match="token ids"):
        store.append_turn("e", turn(1, prompt=(-1,)))
    assert store.episode("e") == before
    store.end("e", "finished", 60.0)
    with pytest.raises(EpisodeEnded, match="finished"):
        store.append_turn("e", turn(1))
    with pytest.raises(EpisodeEnded):
        store.end("e", "cancelled", 61.0)


def test_the_last_turn_may_be_said_again_and_no_other(store: Store) -> None:
    """As by a writer whose commit got no answer."""
    store.begin(episode("e", ended_at=None))
    second = replace(turn(1), text="NUL \0 in it")
    for _ in range(3):
        store.append_turn("e", second)
    for other in (
        turn(0),
        replace(second, text="else"),
        replace(second, token_ids=(4, 6)),
        replace(second, prompt_ids=(1, 2, 4)),
    ):
        with pytest.raises(TurnOutOfOrder, match="expected 2"):
            store.append_turn("e", other)
    kept = store.episode("e")
    assert kept is not None
    assert [t.index for t in kept.turns] == [0, 1]
    assert store.episodes()[0].n_tokens == 4


def test_lists_are_newest_first_filtered_and_paged(store: Store) -> None:
    for i in range(5):
        store.begin(episode(f"e{i}", started_at=float(i // 2), version=i % 2))
    store.begin(episode("foreign", tenant="other", started_at=9.0))
    store.add_feedback([event("a", "e4", 0.0), event("b", "e4", 0.5, source="human")])

    first = store.episodes(limit=2)
    assert [e.id for e in first] == ["e4", "e3"]
    assert first[0].feedback == {"success": 0.25}
    assert (first[0].n_turns, first[0].n_tokens) == (1, 2)
    rest = store.episodes(limit=9, before="e3")
    assert [e.id for e in rest] == ["e2", "e1", "e0"]
    assert [e.id for e in store.episodes(version=1)] == ["e3", "e1"]
    assert store.episodes(policy="other") == []
    assert store.episodes(tenant="other")[0].id == "foreign"
    assert store.episode("foreign") is None
    with pytest.raises(EpisodeMissing):
        store.episodes(before="foreign")
