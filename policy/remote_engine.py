"""The engine on a vLLM server elsewhere, over its HTTP API; imports no vllm.

Token ids in, token ids and log-probabilities out, by `/v1/completions`; adapters by vLLM's runtime
LoRA routes, from a folder that both machines see under one path. What the remote forgets when it
restarts is loaded again by the first request that misses it. Its start is its owner's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
)
from typing import Any

import aiohttp
import httpx

from policy.engine import (
    AdapterNotLoaded,
    AdapterRefused,
    CannotPause,
    EngineError,
    EngineUnreachable,
    check_fits,
)
from policy.probe import judge_probe
from policy.settings import EngineSettings
from policy.types import Adapter, AdapterRef, Delta, ProbeReport, Sampling, StopReason

logger = logging.getLogger("hone.engine")

NEUTRAL = {
    # The remote's own defaults (a checkpoint's top_k, say) would bend the behaviour policy.
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
TOLD = {"return_token_ids": True, "logprobs": 0}
"""Has a completion say what was sampled, and how likely each id was."""
_HEALTH_SECONDS = 5.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=300)
_IDLE_SECONDS = 2.0
"""How long an unused connection is kept: vLLM's server keeps it for five, and closes it unasked."""
_LOAD = "/v1/load_lora_adapter"
_HOT = 2.0
"""A temperature at which a distribution is far from its own at 1."""


class RemoteRefused(EngineError):
    """The remote answers, with an error. `body` is its own, JSON in vLLM's shape."""

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


def open_remote_engine(settings: EngineSettings) -> RemoteVllm:
    """Ask the server at `settings.url` what it is. Raises EngineError if it is not fit to serve."""
    assert settings.url is not None  # noqa: S101 - narrows: the settings require it
    url = settings.url.rstrip("/").removesuffix("/v1")
    key = None if settings.key is None else settings.key.get_secret_value()
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        try:
            models = http.get("/v1/models")
            models.raise_for_status()
            base = next(card for card in models.json()["data"] if not card.get("parent"))
            _check_logprobs(http, base["id"])
        except (httpx.HTTPError, ValueError, KeyError, StopIteration) as error:
            raise EngineError(
                f"the remote engine at {url} does not answer as a vLLM server does: {error!r}"
            ) from error
    return RemoteVllm(
        url,
        headers,
        base_model=base["id"],
        max_model_len=int(base["max_model_len"]),
        probe_tolerance=settings.probe_tolerance,
    )


def _check_logprobs(http: httpx.Client, model: str) -> None:
    """They must be those that were sampled from, temperature and all."""
    asked: dict[str, Any] = {**NEUTRAL, **TOLD, "model": model, "seed": 1}

    def choice(**more: Any) -> dict[str, Any]:
        answer = http.post("/v1/completions", json={**asked, **more})
        if answer.status_code >= 400:
            raise _refusal(answer.status_code, answer.text)
        [only] = answer.json()["choices"]
        return dict(only)

    prompt = [1, 2, 3, 4]
    hot = choice(prompt=prompt, max_tokens=4, temperature=_HOT)
    logprobs, ids = hot["logprobs"]["token_logprobs"], hot["token_ids"]
    whole = [*prompt, *ids]
    at_one = _scores(choice(prompt=whole, max_tokens=1, prompt_logprobs=0), whole)[-len(ids) :]
    if all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(logprobs, at_one, strict=True)):
        raise EngineError(
            f"the remote engine tells log-probabilities from before the temperature, which nothing "
            f"can be trained on; start it with `--logprobs-mode processed_logprobs` (model {model})"
        )


class RemoteVllm:
    """`policy.engine.Engine` on a remote vLLM server. Use it from one event loop."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        base_model: str,
        max_model_len: int,
        probe_tolerance: float,
    ) -> None:
        self.url = url
        self.base_model = base_model
        self._headers = headers
        self._max_model_len = max_model_len
        self._probe_tolerance = probe_tolerance
        self._adapters: dict[AdapterRef, Adapter] = {}
        self._loading = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def loaded(self) -> frozenset[AdapterRef]:
        return frozenset(self._adapters)

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        check_fits(len(prompt_ids), sampling.max_tokens, self._max_model_len)
        asked = {
            **NEUTRAL,
            **TOLD,
            "prompt": list(prompt_ids),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "stream": True,
        }
        last: Delta | None = None
        async with (
            self.answer("/v1/completions", asked, adapter) as answer,
            aclosing(events(answer)) as pieces,
        ):
            async for piece in pieces:
                for choice in piece["choices"]:
                    delta = _delta(choice)
                    if delta.stop_reason is None:
                        yield delta
                    else:  # held back until the connection is free for the next request
                        last = delta
        if last is None:
            raise EngineUnreachable("the remote engine cut a stream off; try again")
        yield last

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        if adapter.ref.is_base:
            raise AdapterRefused(f"{adapter.ref} is the base model, which is always loaded")
        async with self._loading:
            is_known = adapter.ref in self._adapters
            if not is_known:
                await self._add(adapter)
            try:
                report = await self._probe(adapter)
            except BaseException:
                if not is_known:
                    await self._remove(adapter.ref)
                raise
            self._adapters[adapter.ref] = adapter
            return report

    async def unload(self, ref: AdapterRef) -> None:
        if self._adapters.pop(ref, None) is None:
            raise AdapterNotLoaded(f"cannot unload {ref}: it is not loaded")
        await self._remove(ref)

    async def score(self, token_ids: Sequence[int], *, adapter: AdapterRef) -> list[float]:
        return await self._score(token_ids, self.name_of(adapter), adapter)

    async def pause(self) -> None:
        raise CannotPause(
            f"the engine is a vLLM server elsewhere, {self.url}: others may use it, and it is not "
            "ours to hold up; set trainer.share to 'beside'"
        )

    async def resume(self) -> None:
        """Nothing: it was never paused."""

    async def healthy(self) -> bool:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                async with self._http.get(f"{self.url}/health") as answer:
                    return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        """Let go of the connections; the remote runs on."""
        if self._session is not None:
            await self._session.close()

    def name_of(self, ref: AdapterRef) -> str:
        """What the remote calls it. Raises AdapterNotLoaded."""
        if ref.is_base:
            return self.base_model
        if ref not in self._adapters:
            raise AdapterNotLoaded(
                f"{ref} is not loaded; loaded are {sorted(map(str, self._adapters)) or 'none'}"
            )
        return str(ref)

    @asynccontextmanager
    async def answer(
        self, path: str, asked: Mapping[str, Any], adapter: AdapterRef
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST under an adapter's name; the adapter is loaded again if the remote forgot it.

        Leaving early aborts the request there. Raises EngineError for what it refuses.
        """
        body = {**asked, "model": self.name_of(adapter)}
        async with AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(self._post(path, body))
            except RemoteRefused as error:
                if error.status != 404 or adapter.is_base:
                    raise
                await self._restore(adapter)
                answer = await stack.enter_async_context(self._post(path, body))
            yield answer

    @property
    def _http(self) -> aiohttp.ClientSession:
        # Made in the event loop that uses it; as many connections as there are requests.
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, timeout=_TIMEOUT
            )
        return self._session

    def _post(
        self, path: str, body: Mapping[str, Any]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._request("POST", path, body)

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with await self._send(method, path, body) as answer:
                if answer.status >= 400:
                    raise _refusal(answer.status, await answer.text())
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            # Clients read this: where the engine is, is for the log.
            logger.warning("the remote engine at %s does not answer: %s", self.url, error)
            raise EngineUnreachable("the remote engine does not answer; try again") from error

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> aiohttp.ClientResponse:
        """Once more if the connection ends before an answer begins: the remote may close a kept
        one while a request is on its way (RFC 9112, 9.3.1). To ask twice for tokens harms nobody.
        """
        url = f"{self.url}{path}"
        try:
            return await self._http.request(method, url, json=body)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if path == _LOAD:  # may be there by now, and would be refused as a second of its name
                raise
            return await self._http.request(method, url, json=body)

    async def _score(
        self, token_ids: Sequence[int], name: str, adapter: AdapterRef | None
    ) -> list[float]:
        """Under `name`, which is loaded again if the remote forgot it and `adapter` is given."""
        check_fits(len(token_ids), 1, self._max_model_len)
        asked = {**NEUTRAL, "prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": 0}
        how = (
            self._post("/v1/completions", {**asked, "model": name})
            if adapter is None
            else self.answer("/v1/completions", asked, adapter)
        )
        async with how as answer:
            [choice] = (await answer.json())["choices"]
        return _scores(choice, token_ids)

    async def _restore(self, ref: AdapterRef) -> None:
        """Have the remote load again what it has forgotten: it was started anew."""
        async with self._loading:
            adapter = self._adapters.get(ref)
            if adapter is None or await self._is_there(ref):
                return
            await self._add(adapter)
            await self._probe(adapter)

    async def _is_there(self, ref: AdapterRef) -> bool:
        async with self._request("GET", "/v1/models") as answer:
            return str(ref) in [card["id"] for card in (await answer.json())["data"]]

    async def _probe(self, adapter: Adapter) -> ProbeReport | None:
        probe = adapter.probe
        if probe is None:
            return None
        under_adapter = await self._score(probe.token_ids, str(adapter.ref), None)
        under_base = await self._score(probe.token_ids, self.base_model, None)
        return judge_probe(
            adapter.ref, probe, under_adapter, under_base, tolerance=self._probe_tolerance
        )

    async def _add(self, adapter: Adapter) -> None:
        # A name is never used twice, but a server before us may have left another folder under it.
        await self._remove(adapter.ref)
        asked = {"lora_name": str(adapter.ref), "lora_path": str(adapter.path.resolve())}
        try:
            async with self._post(_LOAD, asked):
                pass
        except RemoteRefused as error:
            raise AdapterRefused(
                f"the remote engine cannot load {adapter.ref}: {error}. It must see the folder"
                f" {str(adapter.path.resolve())!r} under this path"
            ) from error

    async def _remove(self, ref: AdapterRef) -> None:
        try:
            async with self._post("/v1/unload_lora_adapter", {"lora_name": str(ref)}):
                pass
        except RemoteRefused as error:
            if error.status != 404:  # it is not there
                raise


async def events(answer: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any]]:
    """What a streamed answer says, event by event. Raises EngineError if it says an error."""
    async for line in answer.content:
        data = line.strip().removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise _refusal(int(event["error"].get("code") or 500), data.decode())
        yield event


def stop_reason(finish_reason: str | None) -> StopReason | None:
    """A finish reason of OpenAI's as ours."""
    if finish_reason is None:
        return None
    return (
        "length" if finish_reason == "length" else "abort" if finish_reason == "abort" else "stop"
    )


def _delta(choice: Mapping[str, Any]) -> Delta:
    logprobs = choice.get("logprobs") or {}
    return Delta(
        tuple(choice.get("token_ids") or ()),
        tuple(logprobs.get("token_logprobs") or ()),
        choice["text"],
        stop_reason(choice.get("finish_reason")),
    )


def _scores(choice: Mapping[str, Any], token_ids: Sequence[int]) -> list[float]:
    rows = choice["prompt_logprobs"][1:]
    return [row[str(token)]["logprob"] for row, token in zip(rows, token_ids[1:], strict=True)]


def _refusal(status: int, body: str) -> EngineError:
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = body[:400]
    told = f"the remote engine answered {status}: {said}"
    if status in (502, 503, 504):
        return EngineUnreachable(told)
    return RemoteRefused(told, status, body)
