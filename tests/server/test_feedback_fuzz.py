"""Whatever is posted to `/v1/feedback`: never a 5xx, and nothing recorded that was refused."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.server.house import House

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ODD: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["\ud800", "\x00", "x" * 5000, 10**400, 2**63, -(2**63), 1e308, "1e5", "nan"])
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.none())
)  # fmt: skip
FIELDS = st.sampled_from(
    ["task_key", "better", "worse", "correction", "episode_id", "value",
     "metric", "event_id", "source", "event_time", "turn", "comment",
     "events", "\ud800", "\x00", "x" * 200]
)  # fmt: skip
GOOD = {"episode_id": "ep_fuzz", "value": 1}
EVENT = st.dictionaries(FIELDS | st.text(max_size=4), ODD, max_size=4)


@FUZZ
@given(odd=EVENT, times=st.integers(0, 3), content_type=st.sampled_from(["json", "text", ""]))
@example(odd={"\ud800": 1}, times=0, content_type="json")
@example(odd={"\ud800": 1}, times=1, content_type="json")
@example(odd={"x" * 100_000: 1}, times=0, content_type="json")
def test_no_json_is_a_5xx(
    shared_house: House, odd: dict[str, Any], times: int, content_type: str
) -> None:
    said: Any = {**GOOD, **odd}
    if times:
        said = {"events": [said] * times}
    answer = shared_house.http.post(
        "/v1/feedback",
        content=json.dumps(said).encode(),
        headers={
            "content-type": {"json": "application/json", "text": "text/plain"}.get(content_type, "")
        },
    )
    assert answer.status_code in (200, 400, 409), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000


@FUZZ
@given(raw=st.binary(max_size=60))
def test_no_bytes_are_a_5xx(shared_house: House, raw: bytes) -> None:
    for body in (raw, b'{"episode_id": "ep_fuzz", "value": ' + raw + b"}"):
        answer = shared_house.http.post(
            "/v1/feedback", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code in (200, 400), answer.text
