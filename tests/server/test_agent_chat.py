"""`agent:NAME` as a model: the official OpenAI client runs an agent and learns its episode."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.house import House

ASK: list[Any] = [{"role": "user", "content": 'CALL look_up {"order": 7}'}]


@pytest.fixture
def client(house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)


def test_a_completion_is_a_whole_run(client: openai.OpenAI, house: House) -> None:
    told = {"task_key": "look/1", "purpose": "practice", "episode_id": "chat-1", "who": "me"}
    answer = client.chat.completions.create(model="agent:desk", messages=ASK, metadata=told)
    assert answer.model == "desk@v0"
    assert answer.choices[0].finish_reason == "stop"
    assert "order 7 is sent" in (answer.choices[0].message.content or "")
    assert answer.metadata is not None
    assert answer.metadata["episode_id"] == "chat-1"

    episode = house.episode("chat-1")
    assert (episode["agent"], episode["task_key"], episode["purpose"], episode["metadata"]) == (
        "desk", "look/1", "practice", {"who": "me"},
    )  # fmt: skip
    assert [call["name"] for turn in episode["turns"] for call in turn["tool_calls"]] == ["look_up"]
    sampled = sum(len(turn["token_ids"]) for turn in episode["turns"])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sampled


def test_a_stream_says_what_the_completion_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="agent:desk", messages=ASK)
    chunks = list(
        client.chat.completions.create(
            model="agent:desk", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"model": "agent:nobody"}, "agent", 404),
        ({"messages": []}, "messages", 400),
        ({"n": 2}, "n", 400),
        ({"tools": [{"type": "function", "function": {"name": "look_up"}}]}, "tools", 400),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
            400,
        ),
        ({"metadata": {"purpose": "fun"}}, "purpose", 400),
        ({"metadata": {"pin": "other@v1"}}, "model", 404),
        ({"metadata": {"pin": "desk@v9"}}, "model", 404),
    ],
)
def test_what_an_agent_cannot_do_is_refused_in_openais_shape(
    client: openai.OpenAI, change: dict[str, Any], param: str, status: int
) -> None:
    body: dict[str, Any] = {"model": "agent:desk", "messages": ASK, **change}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**body)
    assert refused.value.status_code == status, refused.value.message
    assert refused.value.param == param


def test_agents_stand_among_the_models(client: openai.OpenAI) -> None:
    assert {"desk", "agent:desk"} <= {model.id for model in client.models.list()}
