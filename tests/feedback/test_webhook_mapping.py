"""What a payload says: worked examples, everything that cannot be meant, and no other exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from feedback.webhooks.mapping import PayloadMapping, Statement, Unmappable, parse
from feedback.webhooks.spec import MappingSpec

PLAIN = {"episode_id": "metadata.episode", "value": "solved"}


def statements(rules: dict[str, Any], payload: Any) -> list[Statement]:
    return PayloadMapping(MappingSpec.model_validate(rules)).statements(payload)


def one(rules: dict[str, Any], **payload: Any) -> Statement:
    [statement] = statements(PLAIN | rules, {"metadata": {"episode": "ep_1"}, **payload})
    return statement


def test_a_whole_mapping() -> None:
    rules = {
        "when": "type == 'ticket.rated'",
        "metric": {"jmespath": "join('.', ['ticket', kind])"},
        "event_time": "at",
        "comment": "note",
    }
    said = one(
        rules,
        type="ticket.rated", kind="solved", solved=True, at="2023-11-14T22:13:20Z", note="thanks",
    )  # fmt: skip
    assert said == Statement("ep_1", "ticket.solved", 1.0, 1_700_000_000.0, "thanks")


@pytest.mark.parametrize(
    ("rules", "found", "expected"),
    [
        ({}, True, 1.0),
        ({}, 0, 0.0),
        ({}, -2.5, -2.5),
        ({"value": "to_number(solved)"}, "4", 4.0),
        ({"value": 1}, None, 1.0),
        ({"value": False}, None, 0.0),
        ({"values": {"resolved": 1, "reopened": False}}, "resolved", 1.0),
        ({"values": {"resolved": 1, "reopened": False}}, "reopened", 0.0),
        ({"values": {"withdrawn": None}}, "withdrawn", None),
    ],
)
def test_values(rules: dict[str, Any], found: Any, expected: float | None) -> None:
    said = one(rules, solved=found)
    assert (said.value, said.metric, said.event_time, said.comment) == (
        expected,
        "success",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("found", "unit", "expected"),
    [
        (1_700_000_000, "seconds", 1_700_000_000.0),
        (1_700_000_000_250, "milliseconds", 1_700_000_000.25),
        ("2023-11-14T23:13:20.5+01:00", "seconds", 1_700_000_000.5),
        ("2023-11-14T22:13:20Z", "milliseconds", 1_700_000_000.0),
    ],
)
def test_event_times(found: Any, unit: str, expected: float) -> None:
    rules = {"event_time": "at", "event_time_unit": unit}
    assert one(rules, solved=1, at=found).event_time == expected


def test_one_payload_may_say_many_things() -> None:
    rules = {
        "each": "results[?graded]",
        "episode_id": "item.episode",
        "value": "item.grade",
        "event_time": "payload.at",
    }
    results: list[dict[str, Any]] = [
        {"episode": "ep_1", "grade": 1, "graded": True},
        {"episode": "ep_2", "graded": False},
        {"episode": "ep_3", "grade": 0, "graded": True},
    ]
    said = statements(rules, {"at": 5, "results": results})
    assert said == [
        Statement("ep_1", "success", 1.0, 5.0, None),
        Statement("ep_3", "success", 0.0, 5.0, None),
    ]
    assert statements(rules, {"at": 5, "results": []}) == []
    results[0]["grade"] = "good"
    with pytest.raises(Unmappable, match="item 0: value is text") as caught:
        statements(rules, {"at": 5, "results": results})
    assert caught.value.param == "value"
    others: list[Any] = [{}, None, [{"graded": True}] * 1001]
    for other in others:
        with pytest.raises(Unmappable, match="each is"):
            statements(rules, {"results": other})


def test_every_target_and_kind_can_be_mapped() -> None:
    def said(rules: dict[str, Any], **payload: Any) -> Statement:
        [statement] = PayloadMapping(MappingSpec.model_validate(rules)).statements(payload)
        return statement

    task = said({"task_key": "ticket", "value": "ok"}, ticket="refund/1", ok=True)
    assert (task.episode_id, task.task_key, task.value, task.kind) == (
        None, "refund/1", 1.0, "value",
    )  # fmt: skip
    turn = said({"episode_id": "e", "turn": "n", "correction": "text"}, e="ep_1", n=2, text="Sir,")
    assert (turn.kind, turn.metric, turn.turn, turn.correction, turn.value) == (
        "correction", "correction", 2, "Sir,", None,
    )  # fmt: skip
    note = said({"episode_id": "e", "comment": "text"}, e="ep_1", text="rude")
    assert (note.kind, note.comment) == ("comment", "rude")
    pair: dict[str, Any] = {"better": "a", "worse": "b"}
    chosen = said(pair, a="ep_1", b="ep_2")
    assert (chosen.kind, chosen.episode_id, chosen.worse_id, chosen.value) == (
        "preference", "ep_1", "ep_2", 1.0,
    )  # fmt: skip
    words = pair | {"value": "state", "values": {"chosen": 1, "withdrawn": None}}
    assert said(words, a="ep_1", b="ep_2", state="chosen").value == 1.0
    assert said(words, a="ep_1", b="ep_2", state="withdrawn").value is None


@pytest.mark.parametrize(
    ("rules", "payload", "words"),
    [
        ({"episode_id": "e", "turn": "n", "value": 1}, {"e": "x", "n": 1.5}, "turn is a number"),
        ({"episode_id": "e", "turn": "n", "value": 1}, {"e": "x", "n": -1}, "turn is a number"),
        ({"episode_id": "e", "correction": "c"}, {"e": "x"}, "correction is missing"),
        ({"episode_id": "e", "correction": "c"}, {"e": "x", "c": "y" * 100_001}, "at most 100000"),
        ({"episode_id": "e", "comment": "c"}, {"e": "x"}, "comment is missing"),
        ({"better": "a", "worse": "b"}, {"a": "x"}, "worse is missing"),
    ],
)
def test_a_payload_without_what_its_kind_needs_gives_no_event(
    rules: dict[str, Any], payload: dict[str, Any], words: str
) -> None:
    with pytest.raises(Unmappable, match=words):
        PayloadMapping(MappingSpec.model_validate(rules)).statements(payload)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"value": 1}, "expected one of `episode_id`"),
        ({"episode_id": "e", "task_key": "t", "value": 1}, "expected one of `episode_id`"),
        ({"better": "a", "value": 1}, "belong together"),
        ({"better": "a", "worse": "b", "turn": "n"}, "no `correction` and no `turn`"),
        ({"episode_id": "e"}, "expected a `value`, a `correction` or a `comment`"),
        ({"episode_id": "e", "value": 1, "correction": "c"}, "not both"),
    ],
)
def test_a_mapping_that_contradicts_itself_is_refused(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MappingSpec.model_validate(rules)


@pytest.mark.parametrize("found", [None, False, "", [], {}])
def test_what_is_not_true_is_ignored_whatever_else_it_lacks(found: Any) -> None:
    assert statements(PLAIN | {"when": "go"}, {"go": found}) == []
    assert statements(PLAIN | {"when": "go"}, "no object") == []
    assert one({"when": "go"}, go=0, solved=1).value == 1.0, "JMESPath holds 0 for true"


@pytest.mark.parametrize(
    ("rules", "payload", "said"),
    [
        ({}, {"solved": None}, "value is missing"),
        ({}, {"solved": "yes"}, "value is text"),
        ({}, {"solved": [1]}, "value is a list"),
        ({}, {"solved": 1e300}, "value is 1e\\+300"),
        ({}, {"solved": 10**400}, "value is a number"),
        ({}, {"solved": float("inf")}, "value is inf"),
        ({"value": "to_number(solved)"}, {"solved": "nan"}, "value is nan"),
        ({"value": "ceil(solved)"}, {"solved": float("inf")}, "value: .* OverflowError"),
        ({"value": "abs(solved)"}, {"solved": "x"}, "value: .* JMESPathTypeError"),
        ({"values": {"a": 1, "b": 0}}, {"solved": "c"}, "value is 'c'; expected one of a, b"),
        ({"values": {"a": 1}}, {"solved": 1}, "value is a number; expected one of a"),
        ({"metric": {"jmespath": "m"}}, {"solved": 1, "m": "Ünfug"}, "metric is 'Ünfug'"),
        ({"metric": {"jmespath": "m"}}, {"solved": 1, "m": "a\n"}, "metric is 'a"),
        ({"metric": {"jmespath": "m"}}, {"solved": 1}, "metric is missing"),
        ({"event_time": "at"}, {"solved": 1}, "event_time is missing"),
        ({"event_time": "at"}, {"solved": 1, "at": True}, "event_time is a boolean"),
        ({"event_time": "at"}, {"solved": 1, "at": -1}, "event_time is a number"),
        ({"event_time": "at"}, {"solved": 1, "at": 1.7e12}, "expected Unix seconds"),
        ({"event_time": "at"}, {"solved": 1, "at": "2023-11-14T22:13:20"}, "with an offset"),
        ({"event_time": "at"}, {"solved": 1, "at": "0001-01-01T00:00:00+23:59"}, "event_time"),
        ({"event_time": "at"}, {"solved": 1, "at": "soon"}, "event_time is text"),
        ({"comment": "note"}, {"solved": 1, "note": 5}, "comment is a number"),
        ({"comment": "note"}, {"solved": 1, "note": "\ud800"}, "comment is text"),
        ({"episode_id": "id"}, {"solved": 1}, "episode_id is missing"),
        ({"episode_id": "id"}, {"solved": 1, "id": 7}, "episode_id is a number"),
        ({"episode_id": "id"}, {"solved": 1, "id": ""}, "episode_id is text of 0 characters"),
        ({"episode_id": "id"}, {"solved": 1, "id": "e" * 129}, "episode_id is text of 129"),
        ({"episode_id": "id"}, {"solved": 1, "id": "\ud800"}, "episode_id is text of 1"),
    ],
)
def test_what_cannot_be_meant_is_named(
    rules: dict[str, Any], payload: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unmappable, match=said):
        one(rules, **payload)


@pytest.mark.parametrize(
    "body",
    [b"", b"{nope", b"\xff\xfe", "[]".encode("utf-16"), b"\xef\xbb\xbf{}", b"payload=%7B%7D",
     b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b"1" + b"0" * 5000],
)  # fmt: skip
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(Unmappable, match="not JSON"):
        parse(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "at", "id"]), inner, max_size=4)
    ),
    max_leaves=12,
)
BUSY = {
    "when": "a || b > `1`",
    "each": "a || [@]",
    "episode_id": "item.id || sort_by(payload.a, &b)[0].id",
    "metric": {"jmespath": "join('', keys(item))"},
    "value": "ceil(item.a || sum(item.b))",
    "event_time": "to_number(max(item.at) || item.at)",
    "comment": "to_string(item) || reverse(item)",
}


@given(payload=JSON)
def test_any_json_gives_statements_or_says_why_not(payload: Any) -> None:
    mapping = PayloadMapping(MappingSpec.model_validate(BUSY))
    try:
        payload = parse(json.dumps(payload).encode())
        for said in mapping.statements(payload):
            assert said.value is not None
            assert abs(said.value) <= 1e15
    except Unmappable as error:
        assert len(str(error)) < 300
