"""A service that counts what it was asked to do, and a scripted policy that plays a plan on it.

`python -m tests.server.run_house FOLDER [KEY=VALUE...]` serves such a policy as a process of its
own, which tests kill.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request

from policy.scripted import ScriptedEngine
from policy.types import AdapterRef
from server.settings import Settings
from tests.server.house import byte_chat, running, scripted_parts, settings_in, wait_until

_SAID = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def plan(*turns: Any) -> str:
    """What a user says to have the policy make these calls, turn by turn, or say these words; last
    it says what it heard last."""
    return "PLAN " + json.dumps(turns)


def planning_engine(seconds_per_token: float = 0.0) -> ScriptedEngine:
    chat = byte_chat()
    end = chat.end_of_turn_id
    assert end is not None

    def reply(prompt_ids: Sequence[int], adapter: AdapterRef) -> list[int]:
        said = _SAID.findall(chat.text(prompt_ids))
        turns = next(json.loads(text[5:]) for role, text in said if text.startswith("PLAN "))
        place = sum(role == "assistant" for role, _ in said)
        now = turns[place] if place < len(turns) else f"heard {said[-1][1]}"
        if not isinstance(now, str):
            calls = [{"name": name, "arguments": arguments} for name, arguments in now]
            now = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
        return [*chat._ids(now), end]

    return ScriptedEngine(
        reply, chat.text, eos_id=end, max_model_len=8192, seconds_per_token=seconds_per_token
    )


class Booking:
    """A real service. `hold` makes it act, and answer only once that is cleared."""

    def __init__(self) -> None:
        self.acts: Counter[str] = Counter()
        self.keys: list[str | None] = []
        self.hold = False
        self.webhooks: list[tuple[dict[str, str], bytes]] = []
        self.webhook_status = 200
        self.app = self._service()

    def _service(self) -> FastAPI:
        app = FastAPI()
        done: dict[str, str] = {}

        @app.post("/book", operation_id="book")
        def book(n: int) -> dict[str, Any]:
            return self._act(f"book {n}")

        @app.post("/pay", operation_id="pay")
        def pay(n: int, request: Request) -> dict[str, Any]:
            key = request.headers.get("idempotency-key")
            self.keys.append(key)
            if key is None or key not in done:
                done[str(key)] = "paid"
                return self._act(f"pay {n}")
            return {"did": f"pay {n}"}

        @app.post("/refund", operation_id="refund")
        def refund(n: int) -> dict[str, Any]:
            return self._act(f"refund {n}")

        @app.get("/look", operation_id="look")
        def look(n: int) -> dict[str, Any]:
            return self._act(f"look {n}")

        @app.post("/hook", include_in_schema=False)
        async def hook(request: Request) -> Any:
            from fastapi.responses import Response

            self.webhooks.append((dict(request.headers), await request.body()))
            return Response(status_code=self.webhook_status)

        return app

    def _act(self, what: str) -> dict[str, Any]:
        self.acts[what] += 1
        while self.hold:
            time.sleep(0.01)
        return {"did": what}


@contextmanager
def booking() -> Iterator[tuple[Booking, str]]:
    service = Booking()
    server = uvicorn.Server(
        uvicorn.Config(service.app, port=0, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 10)
    try:
        yield service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        service.hold = False
        server.should_exit = True
        thread.join()


def agent_of(url: str, **changes: Any) -> str:
    """The agent's file."""
    tools = {
        "openapi": f"{url}/openapi.json",
        "approval": {"refund": "required"},
        "idempotency": {"pay": "key"},
    }
    limits = {"turns": 6, "tokens": 4000, "seconds": 20, **changes.pop("limits", {})}
    return json.dumps(
        {"name": "desk", "tools": [tools], "limits": limits, "sampling": {"max_tokens": 400}}
        | changes
    )


def settings_for(folder: Path, **flags: Any) -> Settings:
    return settings_in(folder, **{"runs__lease_seconds": 1.5, "http__drain_seconds": 1, **flags})


class Served:
    """A server in a process of its own."""

    def __init__(self, folder: Path, name: str = "server", **flags: Any) -> None:
        self._log = folder / f"{name}.log"
        command = [sys.executable, "-m", "tests.server.run_house", str(folder)]
        command += [f"{key}={value}" for key, value in flags.items()]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=-1, stderr=log)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, self._log.read_text()
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def kill(self) -> None:
        self.http.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    def run(self, run_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def until(self, run_id: str, *statuses: str, seconds: float = 15.0) -> dict[str, Any]:
        wait_until(lambda: self.run(run_id)["status"] in statuses, seconds)
        return self.run(run_id)


def main(folder: Path, flags: dict[str, Any]) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    parts = scripted_parts(folder, engine=lambda base, settings: planning_engine())
    with running(settings_for(folder, **flags), parts) as house:
        print(house.url, flush=True)
        stop.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(pair.split("=", 1) for pair in sys.argv[2:]))
