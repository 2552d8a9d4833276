"""The OpenAI routes of a remote vLLM server, on our app, with each generation reported.

The remote is asked to tell ids and log-probabilities; what the client did not ask for is taken out
again. Its responses route tells neither as they come: responses are made of its chats.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from policy.engine import EngineError
from policy.generation import GenerationRecorder, OnGeneration
from policy.remote_engine import NEUTRAL, RemoteRefused, RemoteVllm, events, stop_reason
from policy.remote_response_events import ResponseEvents
from policy.remote_responses import Json, NotInChat, chat_of, response_of
from policy.types import AdapterRef, Sampling

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
_BENDS = {
    "top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "repetition_penalty": 1, "min_tokens": 0, "logit_bias": {}, "bad_words": [],
    "allowed_token_ids": [], "vllm_xargs": {}, "use_beam_search": False,
}  # fmt: skip
"""Parameters that bend a distribution, and what leaves it alone."""
Decode = Callable[[Sequence[int]], str]


def attach_remote_routes(
    app: FastAPI,
    engine: RemoteVllm,
    *,
    base_name: str,
    on_generation: OnGeneration,
    decode: Decode,
) -> None:
    """Mount the routes on `app`, with the same promises as `vllm_engine.attach_openai_routes`.

    `decode` gives the text of sampled ids as the policy's own format reads it.
    """

    async def answered(path: str, body: Json, shown: _Shown) -> Response:
        ref = _ref_of(body["model"], base_name)
        told = _Forwarded(path, body, ref, on_generation, decode)
        async with AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(engine.answer(path, told.asked, ref))
            except RemoteRefused as error:
                told.forget()
                return Response(error.body, error.status, media_type="application/json")
            if body.get("stream"):
                # The connection lives as long as the stream does.
                lines = shown.stream(told.pieces(answer, stack.pop_all()))
                return StreamingResponse(lines, media_type="text/event-stream")
            return JSONResponse(shown.whole(told.whole(await answer.json())))

    async def forward(request: Request) -> Response:
        return await answered(request.url.path, await request.json(), _Shown())

    async def respond(request: Request) -> Response:
        body = await request.json()
        try:
            chat = chat_of(body)
        except NotInChat as error:
            told = {"type": "invalid_request_error", "code": "unsupported_by_engine"}
            said = {"message": str(error), "param": error.param, **told}
            return JSONResponse({"error": said}, status_code=400)
        return await answered(CHAT, chat, _ShownAsResponse(body))

    for path, route in ((CHAT, forward), (COMPLETIONS, forward), (RESPONSES, respond)):
        app.router.routes.append(Route(path, route, methods=["POST"], name=f"openai:{path}"))


class _Shown:
    """How the client sees an answer: as the remote told it."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer

    async def stream(self, pieces: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield b"data: " + json.dumps(piece).encode() + b"\n\n"
        except EngineError as error:
            told = {"message": str(error), "type": "server_error", "param": None, "code": 500}
            yield b"data: " + json.dumps({"error": told}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


class _ShownAsResponse(_Shown):
    """A chat's answer, as the response to `body`. What breaks a stream off is raised."""

    def __init__(self, body: Json) -> None:
        self._body = body

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        return response_of(self._body, answer)

    async def stream(self, pieces: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
        events = ResponseEvents(self._body)
        for event in events.begin():
            yield event
        async with aclosing(pieces):
            async for piece in pieces:
                for event in events.piece(piece):
                    yield event
        for event in events.end():
            yield event


class _Forwarded:
    """One request on its way: what is asked of the remote, and what is told to the client."""

    def __init__(
        self,
        path: str,
        body: Mapping[str, Any],
        adapter: AdapterRef,
        on_generation: OnGeneration,
        decode: Decode,
    ) -> None:
        self._is_chat = path == CHAT
        self._body = body
        self._on_generation = on_generation
        self._decode = decode
        self._n = body["n"] if isinstance(body.get("n"), int) and body["n"] > 0 else 1
        kind = "chatcmpl" if self._is_chat else "cmpl"
        name, sampling = f"{kind}-{secrets.token_hex(16)}", _sampling(body)
        self._recorders = [
            GenerationRecorder(f"{name}-{prompt}", adapter, sampling, self._n)
            for prompt in range(1 if self._is_chat else _prompts(body.get("prompt")))
        ]

    @property
    def asked(self) -> dict[str, Any]:
        """The client's request, with nothing left to the remote's defaults."""
        said = {key: value for key, value in self._body.items() if value is not None}
        told: dict[str, Any] = {"return_token_ids": True}
        if self._is_chat:
            told["logprobs"] = True
        elif "logprobs" not in said:
            told["logprobs"] = 0
        return {**NEUTRAL, **said, **told}

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer as the client sees it; its generations are reported."""
        for choice in answer["choices"]:
            self._add(answer, choice)
        self._report()
        return self._shown(answer)

    async def pieces(
        self, answer: aiohttp.ClientResponse, connection: AsyncExitStack
    ) -> AsyncGenerator[dict[str, Any]]:
        """The same for each event; one that only told ids is not for the client. Raises
        EngineError if the remote breaks off."""
        try:
            async with connection, aclosing(events(answer)) as pieces:
                async for piece in pieces:
                    for choice in piece["choices"]:
                        self._add(piece, choice)
                    shown = self._shown(piece)
                    if not shown["choices"] or any(map(_says, shown["choices"])):
                        yield shown
        finally:
            self._report()

    def forget(self) -> None:
        """The remote refused: there is nothing to report."""
        self._recorders.clear()

    def _add(self, piece: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        prompt, index = (0, choice["index"]) if self._is_chat else divmod(choice["index"], self._n)
        recorder = self._recorders[prompt]
        recorder.prompt((piece if self._is_chat else choice).get("prompt_token_ids") or ())
        token_ids = choice.get("token_ids") or ()
        told = choice.get("logprobs") or {}
        logprobs = told.get("token_logprobs") or [
            row["logprob"] for row in told.get("content") or ()
        ]
        logprobs = (
            logprobs[-len(token_ids) :] if token_ids else []
        )  # an echo tells the prompt's too
        if len(logprobs) != len(token_ids):
            logprobs = [math.nan] * len(token_ids)  # the record says that they are not known
        recorder.add(index, token_ids, logprobs, "", stop_reason(choice.get("finish_reason")))

    def _report(self) -> None:
        for recorder in self._recorders:
            recorder.report(self._on_generation, self._decode)
        self._recorders.clear()

    def _shown(self, piece: dict[str, Any]) -> dict[str, Any]:
        """Without what only we asked for."""
        piece["model"] = self._body["model"]
        wants_ids = bool(self._body.get("return_token_ids"))
        wants_logprobs = self._body.get("logprobs") not in (None, False)
        for part in (piece, *piece["choices"]):
            if not wants_ids:
                part.pop("prompt_token_ids", None)
                part.pop("token_ids", None)
        for choice in piece["choices"]:
            if not wants_logprobs:
                choice["logprobs"] = None
        return piece


def _ref_of(model: str, base_name: str) -> AdapterRef:
    """Of a name as `server.routing` gives them; version 0 of anything is the base."""
    ref = AdapterRef(base_name, 0) if model == base_name else AdapterRef.parse(model)
    return AdapterRef(base_name, 0) if ref.is_base else ref


def _says(choice: Mapping[str, Any]) -> bool:
    said = [choice.get("text"), choice.get("finish_reason"), choice.get("token_ids")]
    return any((*said, choice["logprobs"], *(choice.get("delta") or {}).values()))


def _prompts(prompt: object) -> int:
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return len(prompt) if several and isinstance(prompt, list) else 1


def _sampling(body: Mapping[str, Any]) -> Sampling:
    """As the request says it; what is wrong in it, the remote refuses."""
    stop = body.get("stop") or ()
    temperature = body.get("temperature")
    is_number = isinstance(temperature, int | float)
    return Sampling(
        temperature=float(temperature) if is_number and temperature is not None else 1.0,
        top_p=body.get("top_p") or 1.0,
        max_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (),
        seed=body.get("seed"),
        bent_by=_bent_by(body),
    )


def _bent_by(body: Mapping[str, Any]) -> str | None:
    """What besides temperature shapes the distribution; a grammar the remote makes of tools."""
    for name, neutral in _BENDS.items():
        if body.get(name) not in (None, neutral):
            return name
    is_text = (body.get("response_format") or {"type": "text"}) == {"type": "text"}
    has_grammar = not is_text or body.get("structured_outputs") or _is_forced(body)
    return "a structured output" if has_grammar else None


def _is_forced(body: Mapping[str, Any]) -> bool:
    tools = body.get("tools") or ()
    is_free = body.get("tool_choice") in (None, "auto", "none")
    is_one = body.get("parallel_tool_calls") is False
    return bool(tools) and (not is_free or is_one or any(map(_is_strict, tools)))


def _is_strict(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and bool(function.get("strict"))
