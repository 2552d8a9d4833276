"""The index over conversations: what extends what, and whom a caller gets."""

from __future__ import annotations

from server.conversations import Conversations, beginnings

ASKED = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}
AGAIN = {"role": "user", "content": "c"}


def test_a_beginning_is_all_that_was_said_up_to_there() -> None:
    three = beginnings([ASKED, SAID, AGAIN])
    assert three[:2] == beginnings([{**ASKED, "name": None}, SAID])
    assert three[2] != beginnings([SAID, ASKED, AGAIN])[2]
    assert beginnings([]) == ()


def test_the_longest_comes_first_then_the_youngest_and_only_the_callers_own() -> None:
    known = Conversations()
    one, two, three = beginnings([ASKED, SAID, AGAIN])
    known.put("long", "me", two)
    known.put("old", "me", one)
    known.put("young", "me", one)
    known.put("whole", "me", three)
    known.put("theirs", "you", two)
    assert list(known.begun_by("me", (one, two, three))) == [(2, "long"), (1, "young"), (1, "old")]
    known.put("old", "me", one)  # answered again
    assert list(known.begun_by("me", (one, two))) == [(1, "old"), (1, "young")]
    assert list(known.begun_by("me", (one,))) == []


def test_what_is_over_is_forgotten() -> None:
    known = Conversations()
    one, two = beginnings([ASKED, SAID])
    known.put("a", "me", one)
    known.put("a", "me", two)
    known.forget("a")
    known.forget("a")
    assert list(known.begun_by("me", (one, two, "x"))) == []
    assert not known._ids
    assert not known._places
