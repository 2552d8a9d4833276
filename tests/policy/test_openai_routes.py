"""vLLM's OpenAI routes on our app: the official client, a real socket, and what is reported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from policy.generation import Generation, generation_owner
from policy.types import Adapter, AdapterRef

if TYPE_CHECKING:
    from policy.vllm_engine import VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASK: list[Any] = [{"role": "user", "content": "Where is order 8231?"}]
CANCEL: Any = {
    "type": "function",
    "function": {
        "name": "cancel",
        "parameters": {
            "type": "object",
            "properties": {"order": {"type": "integer", "minimum": 10, "maximum": 99}},
            "required": ["order"],
        },
    },
}


class OwnerFromHeader:
    """What a server does to learn whose a generation is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers") or ())
        generation_owner.set(headers.get(b"x-episode", b"").decode() or None)
        await self.app(scope, receive, send)


@dataclass
class Site:
    """The running app, a client of it, and what it reported so far."""

    engine: VllmEngine
    client: openai.AsyncOpenAI
    url: str
    ref: AdapterRef
    reports: list[Generation] = field(default_factory=list)

    async def reported(self, count: int) -> list[Generation]:
        for _ in range(200):
            if len(self.reports) >= count:
                break
            await asyncio.sleep(0.02)
        assert len(self.reports) == count
        return self.reports


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def running_site(
    vllm_engine: VllmEngine, make_adapter: Callable[..., Adapter]
) -> AsyncIterator[Site]:
    from policy.vllm_engine import attach_openai_routes

    adapter = make_adapter(50)
    await vllm_engine.load(adapter)
    app = FastAPI()
    app.add_middleware(OwnerFromHeader)
    reports: list[Generation] = []
    attach_openai_routes(
        app,
        vllm_engine,
        base_name="tiny",
        on_generation=reports.append,
        served=lambda: ["desk", "support-agent"],
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield Site(vllm_engine, client, url, adapter.ref, reports)
    server.should_exit = True
    await serving
    await vllm_engine.unload(adapter.ref)


@pytest.fixture
def site(running_site: Site) -> Site:
    running_site.reports.clear()
    return running_site


async def assert_scored(site: Site, report: Generation) -> None:
    """The reported logprobs are those of the reported ids under the reported adapter."""
    scores = await site.engine.score(
        [*report.prompt_ids, *report.token_ids], adapter=report.adapter
    )
    sampled = scores[len(report.prompt_ids) - 1 :]
    assert len(report.logprobs) == len(report.token_ids) > 0
    assert max(abs(a - b) for a, b in zip(report.logprobs, sampled, strict=True)) < 1e-4


async def test_a_plain_chat_reports_what_it_returned(site: Site) -> None:
    reply = await site.client.chat.completions.create(
        model=str(site.ref),
        messages=ASK,
        max_tokens=12,
        seed=1,
        extra_body={"return_token_ids": True},
        extra_headers={"X-Request-Id": "r-1", "X-Episode": "ep-7"},
    )
    [report] = await site.reported(1)
    extra: Any = reply.choices[0]
    assert list(report.token_ids) == extra.token_ids
    assert list(report.prompt_ids) == reply.model_dump()["prompt_token_ids"]
    assert reply.choices[0].logprobs is None
    assert report.text == reply.choices[0].message.content
    assert (report.adapter, report.owner, report.index) == (site.ref, "ep-7", 0)
    assert report.request_id == reply.id == "chatcmpl-r-1"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(report.token_ids) == 12
    assert (report.stop_reason, reply.choices[0].finish_reason) == ("length", "length")
    assert (report.sampling.temperature, report.sampling.max_tokens) == (1.0, 12)
    assert 0 < report.seconds < 30
    await assert_scored(site, report)


async def test_a_streamed_chat_reports_what_it_streamed(site: Site) -> None:
    stream = await site.client.chat.completions.create(
        model=str(site.ref),
        messages=ASK,
        max_tokens=12,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = [chunk async for chunk in stream]
    choices: list[Any] = [choice for chunk in chunks for choice in chunk.choices]
    [report] = await site.reported(1)
    assert [i for c in choices for i in getattr(c, "token_ids", None) or []] == list(
        report.token_ids
    )
    assert "".join(c.delta.content or "" for c in choices) == report.text
    assert all(c.logprobs is None for c in choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    await assert_scored(site, report)


async def test_the_base_answers_under_its_name_and_as_version_0(site: Site) -> None:
    for model in ("tiny", "desk@v0"):
        await site.client.chat.completions.create(
            model=model, messages=ASK, max_tokens=6, temperature=0
        )
    await site.client.chat.completions.create(
        model=str(site.ref), messages=ASK, max_tokens=6, temperature=0
    )
    base, version_0, adapted = await site.reported(3)
    assert base.token_ids == version_0.token_ids != adapted.token_ids
    assert base.adapter == version_0.adapter == AdapterRef("tiny", 0)
    assert base.sampling.temperature == 0
    await assert_scored(site, base)


async def test_completions_report_every_choice_of_every_prompt(site: Site) -> None:
    reply = await site.client.completions.create(
        model="tiny", prompt=["one", "two"], n=2, max_tokens=5, seed=2
    )
    reports = await site.reported(4)
    assert len(reply.choices) == 4
    assert sorted(choice.text for choice in reply.choices) == sorted(r.text for r in reports)
    assert sorted(r.index for r in reports) == [0, 0, 1, 1]
    assert all(choice.logprobs is None for choice in reply.choices)
    for report in reports:
        await assert_scored(site, report)


async def test_a_client_that_asks_for_logprobs_gets_them(site: Site) -> None:
    reply = await site.client.chat.completions.create(
        model=str(site.ref), messages=ASK, max_tokens=5, logprobs=True, top_logprobs=2
    )
    [report] = await site.reported(1)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [item.logprob for item in logprobs.content] == pytest.approx(list(report.logprobs))
    assert len(logprobs.content[0].top_logprobs) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_hermes_tool_calls_are_parsed(site: Site, stream: bool) -> None:
    said = '<tool_call>\n{"name": "cancel", "arguments": {"order": 42}}\n</tool_call>'
    asked: dict[str, Any] = {
        "model": str(site.ref),
        "messages": ASK,
        "tools": [CANCEL],
        "max_tokens": 100,
        # A random model says nothing useful: the grammar makes it say one call.
        "extra_body": {"structured_outputs": {"choice": [said]}},
    }
    if stream:
        name, arguments = "", ""
        async for chunk in await site.client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                for part in choice.delta.tool_calls or []:
                    name += part.function.name or ""
                    arguments += part.function.arguments or ""
    else:
        reply = await site.client.chat.completions.create(**asked)
        [call] = reply.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert reply.choices[0].finish_reason == "tool_calls"
    assert (name, json.loads(arguments)) == ("cancel", {"order": 42})
    [report] = await site.reported(1)
    assert report.text == said


async def test_a_client_that_hangs_up_is_reported_as_aborted(site: Site) -> None:
    stream = await site.client.chat.completions.create(
        model=str(site.ref), messages=ASK, max_tokens=400, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 4:
            break
    await stream.close()
    [report] = await site.reported(1)
    assert report.stop_reason == "abort"
    assert 3 <= len(report.token_ids) == len(report.logprobs) < 400


async def test_a_plain_call_that_hangs_up_is_reported_without_tokens(site: Site) -> None:
    with pytest.raises(openai.APITimeoutError):
        await site.client.chat.completions.create(
            model=str(site.ref), messages=ASK, max_tokens=400, timeout=0.2,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    [report] = await site.reported(1)
    assert (report.stop_reason, report.token_ids) == ("abort", ())
    assert await site.engine.healthy()


async def test_models_lists_the_base_adapters_and_served_names(site: Site) -> None:
    models = await site.client.models.list()
    assert [model.id for model in models.data] == ["tiny", "desk@v50", "desk", "support-agent"]
    assert str(site.engine.client.model_config.model) not in models.model_dump_json()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "desk@v999"}, 404),
        ({"model": "nobody"}, 404),
        ({"messages": "not a list"}, 400),
        ({"temperature": -1}, 400),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400),
        ({"max_tokens": 100_000}, 400),
    ],
)
async def test_bad_requests_are_answered_in_openais_shape(
    site: Site, change: dict[str, Any], status: int
) -> None:
    body = {"model": str(site.ref), "messages": ASK, "max_tokens": 4, "stop": ["e"]} | change
    async with httpx.AsyncClient() as http:
        reply = await http.post(f"{site.url}/chat/completions", json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["message"] and error["type"] and error["code"] == status
    assert not site.reports


async def test_malformed_json_is_answered_in_openais_shape(site: Site) -> None:
    async with httpx.AsyncClient(headers={"content-type": "application/json"}) as http:
        reply = await http.post(f"{site.url}/chat/completions", content=b"{not json")
    assert reply.status_code == 400
    assert "JSON" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "bent_by"),
    [
        ({"temperature": 0.7}, None),
        ({"top_p": 0.9}, "top_p"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "a structured output"),
    ],
)
async def test_the_report_says_what_bent_the_distribution(
    site: Site, asked: dict[str, Any], bent_by: str | None
) -> None:
    await site.client.chat.completions.create(
        model=str(site.ref), messages=ASK, max_tokens=4, **asked
    )
    [report] = await site.reported(1)
    assert report.sampling.bent_by == bent_by
