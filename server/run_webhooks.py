"""Tells owners' services that background runs have ended: Standard Webhooks, at least once.

What is due stands in the record, so that neither a dead server nor a deaf receiver loses it; where
a message may go is `server.tools.network`'s. Only an agent's file says to whom.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx2

from feedback.run_store import RunStore
from feedback.runs import Run
from server.agents.progress import Chat
from server.agents.request import Agent
from server.agents.spec import EndWebhook, signing_key
from server.run_wire import stored_json
from server.tools.network import Reach, ReachTransport

logger = logging.getLogger("hone.webhooks")

PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 3 * 3600.0, 6 * 3600.0, 12 * 3600.0)
"""Seconds before each further attempt; after the last one the message is given up."""
TIMEOUT_SECONDS = 15.0
_MARGIN_SECONDS = 30.0
_MAX_ANSWER_BYTES = 2**16


class EndTeller:
    """Posts what is due, each message in a task of its own."""

    def __init__(self, store: RunStore, agents: Mapping[str, Agent], chat: Chat) -> None:
        self._store = store
        self._agents = agents
        self._chat = chat
        self._under_way: set[asyncio.Task[None]] = set()

    async def tell_due(self) -> None:
        """Begin every attempt that is due, unless another server is faster."""
        due = await asyncio.to_thread(self._store.untold, time.time())
        for run_id, due_at, attempts in due:
            again_at = time.time() + TIMEOUT_SECONDS + _MARGIN_SECONDS
            if await asyncio.to_thread(self._store.begin_telling, run_id, due_at, again_at):
                task = asyncio.create_task(self._tell(run_id, attempts))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def stop(self) -> None:
        """Leave what is under way: it is due again at the next server."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _tell(self, run_id: str, attempts: int) -> None:
        run = await asyncio.to_thread(self._store.run, run_id, None)
        agent = None if run is None else self._agents.get(run.episode.agent or "")
        again_at: float | None = None
        if run is not None and agent is not None and agent.spec.webhook is not None:
            body = json.dumps(_message(run, agent, self._chat)).encode()
            trouble = await _post(agent.spec.webhook, _message_id(run_id), body)
            if trouble is not None:
                is_last = attempts >= len(PAUSES)
                again_at = None if is_last else time.time() + PAUSES[attempts]
                what = "given up" if is_last else f"again in {PAUSES[attempts]:g} s"
                logger.warning("the end of run %s is not told: %s; %s", run_id, trouble, what)
        await asyncio.to_thread(self._store.told, run_id, again_at)


def _message(run: Run, agent: Agent, chat: Chat) -> dict[str, Any]:
    said: dict[str, Any] = {**stored_json(run, chat, agent.spec.price)}
    del said["turns"]  # they may be long, and GET /v1/runs/ID has them
    ended = datetime.fromtimestamp(run.episode.ended_at or 0.0, UTC)
    return {"type": f"run.{said['status']}", "timestamp": ended.isoformat(), "data": said}


def _message_id(run_id: str) -> str:
    """The same over all attempts. A run's id may have a full stop, which ends an id in the text
    that is signed."""
    return f"msg_{hashlib.sha256(run_id.encode()).hexdigest()[:32]}"


async def _post(to: EndWebhook, message_id: str, body: bytes) -> str | None:
    """What kept the message from being taken; None: it was."""
    timestamp = str(int(time.time()))
    key = signing_key(to.secret)
    mac = key.sign(message_id.encode(), b".", timestamp.encode(), b".", body)
    headers = {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }
    transport = ReachTransport(Reach.of(to.url, to.allow_hosts), max_bytes=_MAX_ANSWER_BYTES)
    try:
        async with (
            asyncio.timeout(TIMEOUT_SECONDS),
            httpx2.AsyncClient(transport=transport, follow_redirects=False) as client,
        ):
            answer = await client.post(to.url, content=body, headers=headers)
    except TimeoutError:
        return f"no answer within {TIMEOUT_SECONDS:g} s"
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        return f"{type(error).__name__}: {error}"
    return None if answer.is_success else f"status {answer.status_code}"
