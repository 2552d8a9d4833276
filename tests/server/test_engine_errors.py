"""An engine that fails while it streams: the official client reads the error in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from policy.engine import Engine, EngineDead
from policy.generation import OnGeneration
from tests.server.house import House, running, scripted_parts, settings_in, write_agent

DELTA = {
    "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "desk@v0",
    "choices": [{"index": 0, "delta": {"content": 'data: {"error"'}, "finish_reason": None}],
}  # fmt: skip
DEAD = {
    "message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500,
}  # fmt: skip
LONG = {
    "message": "This model's maximum context length is 8 tokens", "type": "BadRequestError",
    "param": "input_tokens", "code": 400,
}  # fmt: skip


def failing_routes(
    app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration
) -> None:
    """vLLM's chat route when the engine fails after one piece, event by event."""

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        error = LONG if body["messages"][0]["content"] == "long" else DEAD
        events = [json.dumps(DELTA), json.dumps({"error": error}), "[DONE]"]
        return StreamingResponse(
            (f"data: {event}\n\n" for event in events), media_type="text/event-stream"
        )


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    write_agent(tmp_path)
    parts = scripted_parts(tmp_path, openai_routes=failing_routes)
    with running(settings_in(tmp_path), parts) as house:
        yield house


@pytest.mark.parametrize(
    ("said", "type", "code", "param"),
    [
        ("hi", "server_error", "engine_unavailable", None),
        ("long", "invalid_request_error", "context_length_exceeded", "input_tokens"),
    ],
)
def test_an_error_within_a_stream(
    house: House, said: str, type: str, code: str, param: str | None
) -> None:
    client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="desk", messages=[{"role": "user", "content": said}], stream=True
    )
    first = next(stream)
    assert first.choices[0].delta.content == 'data: {"error"', "what succeeds passes untouched"
    with pytest.raises(openai.APIError) as failed:
        next(stream)
    assert (failed.value.type, failed.value.code, failed.value.param) == (type, code, param)


def test_the_stream_goes_on_to_its_end_mark(house: House) -> None:
    answer = house.chat("desk", [{"role": "user", "content": "hi"}], stream=True)
    *_, error, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == DEAD["message"]


CREATED = {
    "type": "response.created", "sequence_number": 0,
    "response": {"id": "resp_1", "object": "response", "status": "in_progress", "output": []},
}  # fmt: skip


def broken_responses(
    app: FastAPI, engine: Engine, base_name: str, on_generation: OnGeneration
) -> None:
    """vLLM's responses route when its engine dies after the first event: nothing catches it."""

    @app.post("/v1/responses")
    async def respond(body: dict[str, Any]) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield f"event: response.created\ndata: {json.dumps(CREATED)}\n\n"
            raise EngineDead("the engine is gone")

        return StreamingResponse(events(), media_type="text/event-stream")


def test_a_stream_of_responses_ends_with_an_event(tmp_path: Path) -> None:
    write_agent(tmp_path)
    parts = scripted_parts(tmp_path, openai_routes=broken_responses)
    with running(settings_in(tmp_path), parts) as house:
        client = openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)
        created, failed = client.responses.create(model="desk", input="hi", stream=True)
    assert created.type == "response.created"
    assert failed.type == "error"
    assert (failed.code, failed.sequence_number) == ("engine_unavailable", 1)
    assert "engine is gone" in failed.message
