"""Functions that the client runs: the official OpenAI client, streamed and not, and plain runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from policy.scripted import scripted_logprobs
from policy.types import AdapterRef
from server.agents.spec import AgentFileError, load_agents
from server.tools.base import ToolUnavailable
from server.tools.box import open_toolbox
from tests.server.house import House, running, scripted_parts, write_agent
from tests.server.run_house import Booking, agent_of, booking, plan, planning_engine, settings_for

WEIGH: Any = {
    "type": "function",
    "function": {
        "name": "weigh",
        "description": "Weigh a parcel.",
        "parameters": {
            "type": "object",
            "properties": {"parcel": {"type": "integer"}},
            "required": ["parcel"],
        },
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Booking]]:
    folder: Path = tmp_path_factory.mktemp("client")
    with booking() as (desk, url):
        write_agent(folder, agent_of(url))
        closed = agent_of(url, name="closed", client_tools=False)
        write_agent(folder, closed, "closed")
        brief = agent_of(url, name="brief", limits={"client_seconds": 0.3, "approval_seconds": 0.3})
        write_agent(folder, brief, "brief")
        scales = {"client": "weigh", **WEIGH["function"]}
        del scales["name"]
        weigher = json.loads(agent_of(url, name="weigher"))
        write_agent(
            folder, json.dumps({**weigher, "tools": [*weigher["tools"], scales]}), "weigher"
        )
        parts = scripted_parts(folder, engine=lambda base, settings: planning_engine())
        with running(settings_for(folder), parts) as house:
            yield house, desk


@pytest.fixture
def house(world: tuple[House, Booking]) -> House:
    return world[0]


@pytest.fixture
def client(house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)


def ask(*turns: Any) -> list[Any]:
    return [{"role": "user", "content": plan(*turns)}]


def check_truth(house: House, episode_id: str) -> None:
    """Every turn's ids and log-probabilities are the engine's, and each prompt is the last one, the
    sampled ids and more."""
    turns = house.episode(episode_id)["turns"]
    before: list[int] = []
    for turn in turns:
        prompt, sampled = turn["prompt_token_ids"], turn["token_ids"]
        assert prompt[: len(before)] == before
        assert len(prompt) > len(before)
        told = scripted_logprobs([*prompt, *sampled], AdapterRef("desk", 0))[len(prompt) - 1 :]
        assert turn["logprobs"] == pytest.approx(told, abs=1e-6)
        before = [*prompt, *sampled]


def test_a_chat_in_which_both_sides_have_tools(client: openai.OpenAI, house: House) -> None:
    messages = ask(
        [["look", {"n": 1}]], [["weigh", {"parcel": 7}], ["look", {"n": 2}]], "I see.",
    )  # fmt: skip
    first = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    [choice] = first.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weigh", {"parcel": 7})
    assert first.metadata is not None
    episode_id = first.metadata["episode_id"]
    assert house.http.get(f"/v1/runs/{episode_id}").json()["status"] == "requires_action"
    assert house.services.leases.held() == {}, "what waits holds no adapter"

    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "7 kg"}]
    last = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    assert last.metadata is not None
    assert last.metadata == {"episode_id": episode_id, "stop_reason": "finished"}
    assert (last.choices[0].finish_reason, last.choices[0].message.content) == ("stop", "I see.")
    episode = house.episode(episode_id)
    assert [[c["result"] for c in turn["tool_calls"]] for turn in episode["turns"]] == [
        ['{"did":"look 1"}'], ["7 kg", '{"did":"look 2"}'], [],
    ]  # fmt: skip
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(len(t["token_ids"]) for t in episode["turns"])
    check_truth(house, episode_id)

    # The answer was lost on the way, and the client asks again: nothing runs twice.
    again = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    assert again.choices[0].message.content == "I see."
    assert again.metadata == last.metadata
    assert len(house.episode(episode_id)["turns"]) == 3


def test_a_streamed_chat_says_the_same(client: openai.OpenAI, house: House) -> None:
    messages = ask([["weigh", {"parcel": 7}], ["weigh", {"parcel": 8}]])
    with client.chat.completions.stream(
        model="agent:desk", messages=messages, tools=[WEIGH], stream_options={"include_usage": True}
    ) as stream:
        first = stream.get_final_completion()
    [choice] = first.choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert calls is not None
    assert [json.loads(call.function.arguments) for call in calls] == [
        {"parcel": 7}, {"parcel": 8},
    ]  # fmt: skip
    messages.append(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call.model_dump(exclude_none=True) for call in calls],
        }
    )
    weights: list[Any] = [{"role": "tool", "tool_call_id": c.id, "content": "7 kg"} for c in calls]
    with pytest.raises(openai.BadRequestError, match="waits for the results of"):
        client.chat.completions.create(
            model="agent:desk", messages=[*messages, weights[0]], tools=[WEIGH]
        )
    with client.chat.completions.stream(
        model="agent:desk", messages=[*messages, *weights], tools=[WEIGH]
    ) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.content == "heard 7 kg"
    assert last.id == first.id
    check_truth(house, last.id.removeprefix("chatcmpl-"))


def test_what_else_the_client_says_is_heard(client: openai.OpenAI, house: House) -> None:
    messages = ask([["weigh", {"parcel": 7}]])
    first = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    calls = first.choices[0].message.tool_calls
    assert calls is not None
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": calls[0].id, "content": [{"type": "text", "text": "7"}]},
        {"role": "user", "content": "and be quick"},
    ]
    last = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    assert last.choices[0].message.content == "heard and be quick"
    assert last.id == first.id
    check_truth(house, last.id.removeprefix("chatcmpl-"))


def test_another_conversation_is_another_run(client: openai.OpenAI, house: House) -> None:
    messages = ask([["weigh", {"parcel": 7}]])
    first = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    calls = first.choices[0].message.tool_calls
    assert calls is not None
    answer: Any = {"role": "tool", "tool_call_id": calls[0].id, "content": "7 kg"}
    other = [*ask("x", "y"), first.choices[0].message, answer]
    reply = client.chat.completions.create(model="agent:desk", messages=other, tools=[WEIGH])
    assert reply.id != first.id
    run = house.http.get(f"/v1/runs/{first.id.removeprefix('chatcmpl-')}").json()
    assert run["status"] == "requires_action"


def test_calls_that_a_client_could_not_run_are_told_to_the_model(
    client: openai.OpenAI, house: House
) -> None:
    messages = ask([["weigh", {"parcel": "seven"}]], [["wiegh", {}]])
    reply = client.chat.completions.create(model="agent:desk", messages=messages, tools=[WEIGH])
    assert reply.choices[0].finish_reason == "stop"
    episode = house.episode(reply.id.removeprefix("chatcmpl-"))
    told = [call for turn in episode["turns"] for call in turn["tool_calls"]]
    assert [call["status"] for call in told] == ["invalid", "invalid"]
    assert "'seven' is not of type 'integer'" in told[0]["result"]
    assert "weigh" in told[1]["result"]


def test_a_run_by_its_own_routes(house: House) -> None:
    http = house.http
    body = {"input": plan([["weigh", {"parcel": 7}]], "so"), "tools": [WEIGH], "stream": True}
    with http.stream("POST", "/v1/agents/desk/runs", json=body) as answer:
        events = sse(answer.iter_lines())
    assert [name for name, _ in events if name != "turn.text.delta"] == [
        "run.started", "turn.sampled", "run.requires_action",
    ]  # fmt: skip
    paused = events[-1][1]
    assert (paused["status"], paused["stop_reason"]) == ("requires_action", None)
    [call] = paused["required_action"]["tool_calls"]
    assert (call["name"], call["arguments"], call["needs"]) == ("weigh", {"parcel": 7}, "output")
    assert paused["turns"][0]["tool_calls"][0]["status"] == "pending"

    where = f"/v1/runs/{paused['id']}/tool_outputs"
    output = {"tool_call_id": call["id"], "output": "7 kg"}
    wrong = http.post(where, json={"tool_outputs": [{**output, "tool_call_id": "call_0"}]})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "call_not_waiting")
    with http.stream("POST", where, json={"tool_outputs": [output], "stream": True}) as answer:
        events = sse(answer.iter_lines())
    name, ended = events[-1]
    assert (name, ended["status"], ended["output"]) == ("run.ended", "completed", "so")
    assert [call["result"] for turn in ended["turns"] for call in turn["tool_calls"]] == ["7 kg"]
    assert http.post(where, json={"tool_outputs": [output]}).json()["error"]["code"] == "run_ended"
    stored = http.get(f"/v1/runs/{paused['id']}").json()
    assert {key: stored[key] for key in ended} == ended, "the record tells the same"


def test_a_function_of_the_agents_file_waits_for_the_client_as_one_of_the_request_does(
    client: openai.OpenAI, house: House
) -> None:
    """Both at once, with a tool of the agent's own between them; and arguments are checked."""
    [agent] = [a for a in house.http.get("/v1/agents").json()["data"] if a["id"] == "weigher"]
    assert "weigh" in agent["tools"]
    messages = ask(
        [["weigh", {"parcel": "seven"}]],
        [["weigh", {"parcel": 7}], ["look", {"n": 3}], ["measure", {}]],
        "I see.",
    )
    tools: Any = [{"type": "function", "function": {"name": "measure"}}]
    first = client.chat.completions.create(model="agent:weigher", messages=messages, tools=tools)
    calls = first.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.name for call in calls if call.type == "function"] == ["weigh", "measure"]
    messages.append(first.choices[0].message)
    for call, said in zip(calls, ("7 kg", "9 cm"), strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    last = client.chat.completions.create(model="agent:weigher", messages=messages, tools=tools)
    assert last.choices[0].message.content == "I see."
    assert last.metadata is not None
    turns = house.episode(last.metadata["episode_id"])["turns"]
    assert [[call["status"] for call in turn["tool_calls"]] for turn in turns] == [
        ["invalid"], ["ok", "ok", "ok"], [],
    ]  # fmt: skip
    assert [call["result"] for call in turns[1]["tool_calls"]] == [
        "7 kg", '{"did":"look 3"}', "9 cm",
    ]  # fmt: skip
    check_truth(house, last.metadata["episode_id"])


def test_a_run_waits_for_a_function_of_the_agents_file(house: House) -> None:
    asked = {"input": plan([["weigh", {"parcel": 7}]]), "background": True}
    run_id = house.http.post("/v1/agents/weigher/runs", json=asked).json()["id"]
    where = f"/v1/runs/{run_id}"
    house.until(lambda: house.http.get(where).json()["status"] == "requires_action")
    [call] = house.http.get(where).json()["required_action"]["tool_calls"]
    assert (call["name"], call["needs"]) == ("weigh", "output")
    say = {"tool_outputs": [{"tool_call_id": call["id"], "output": "7 kg"}]}
    assert house.http.post(f"{where}/tool_outputs", json=say).status_code == 200
    house.until(lambda: house.http.get(where).json()["status"] == "completed")
    assert house.http.get(where).json()["output"] == "heard 7 kg"


def test_a_route_that_cannot_hand_the_calls_out_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="agent:weigher", input="hello")
    assert refused.value.code == "client_functions_unsupported"


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ([{"client": "look_up"}, {"python": "tests.server.house_tools:look_up"}], "two tools"),
        ([{"client": "weigh"}, {"client": "weigh"}], "two tools"),
        ([{"client": "weigh", "parameters": {"type": 7}}], "not valid JSON Schema"),
        ([{"client": "weigh it"}], "client: String should match"),
        ([{"client": "weigh", "retries": 2}], "retries: unknown key"),
    ],
)
def test_a_file_that_declares_it_wrongly_is_refused_at_the_start(
    tmp_path: Path, tools: list[Any], why: str
) -> None:
    write_agent(tmp_path, json.dumps({"name": "desk", "tools": tools}))
    with pytest.raises((AgentFileError, ToolUnavailable), match=why):
        asyncio.run(open_toolbox(load_agents(tmp_path / "agents")["desk"].tools))


def test_a_client_that_does_not_come_back_ends_the_run(house: House) -> None:
    body = {"input": plan([["weigh", {"parcel": 7}]]), "tools": [WEIGH]}
    paused = house.http.post("/v1/agents/brief/runs", json=body).json()
    where = f"/v1/runs/{paused['id']}"
    house.until(lambda: house.http.get(where).json()["status"] == "incomplete")
    run = house.http.get(where).json()
    assert run["stop_reason"] == "idle"
    assert run["turns"][0]["tool_calls"][0]["result"] == "not finished: the run ended"


@pytest.mark.parametrize(
    ("agent", "tools", "code"),
    [
        ("weigher", [WEIGH], "invalid_tools"),
        ("closed", [WEIGH], "client_tools_refused"),
        ("desk", [WEIGH, WEIGH], "invalid_tools"),
        ("desk", [{"type": "function", "function": {"name": "look"}}], "invalid_tools"),
        ("desk", [{"type": "function", "function": {"name": "x", "parameters": {"type": 7}}}],
         "invalid_tools"),
        ("desk", [{"type": "function"}], "invalid_value"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("background", [False, True])
def test_functions_that_cannot_be_offered_are_refused(
    house: House, agent: str, tools: list[Any], code: str, background: bool
) -> None:
    body = {"input": plan("x"), "tools": tools, "background": background}
    answer = house.http.post(f"/v1/agents/{agent}/runs", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def sse(lines: Iterator[str]) -> list[tuple[str, Any]]:
    """(event, data)"""
    events: list[tuple[str, Any]] = []
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: {"):
            events.append((name, json.loads(line[6:])))
    return events
