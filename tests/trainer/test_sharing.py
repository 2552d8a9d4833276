"""Updates in pauses that a server grants, and without them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import trainer.sharing
from feedback.store import Store
from tests.trainer.conftest import World
from trainer.progress import Heartbeat
from trainer.sharing import BESIDE, InPauses, NoPauses, NotYet, ServerPauses
from trainer.stop import Stop, Stopped

PAUSE_SECONDS = 0.2
SERVE_SECONDS = 0.3


@dataclass
class Grants:
    """A server's part, which answers with `refusals` first; `spans` are the pauses."""

    refusals: list[Exception] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    asked: int = 0

    def __call__(self) -> Granted:
        self.asked += 1
        if self.refusals:
            raise self.refusals.pop(0)
        now = time.monotonic()
        return Granted(self, now, now + PAUSE_SECONDS)


@dataclass
class Granted:
    grants: Grants
    began: float
    until: float

    def close(self) -> None:
        self.grants.spans.append((self.began, time.monotonic()))


def in_pauses(grants: Callable[[], Granted], settle: Callable[[], None] = lambda: None) -> InPauses:
    return InPauses(grants, serve_seconds=SERVE_SECONDS, settle=settle)


def alive() -> None:
    """A beat that nobody counts."""


def test_microbatches_compute_in_pauses_and_wait_in_between() -> None:
    grants, settled, beats = Grants(), [], []
    computed: list[tuple[float, float]] = []
    sharing = in_pauses(grants, lambda: settled.append(time.monotonic()))
    with sharing.update(lambda: beats.append(time.monotonic())) as turn:
        for _ in range(12):
            began = time.monotonic()
            time.sleep(0.04)
            computed.append((began, time.monotonic()))
            turn.between()
    assert len(grants.spans) >= 3
    for began, ended in computed:
        assert any(start <= began and ended <= stop for start, stop in grants.spans)
    for (_, ended), (began, _) in zip(grants.spans, grants.spans[1:], strict=False):
        assert began - ended >= SERVE_SECONDS - 0.01
        assert any(ended < beat < began for beat in beats), "its lease is kept meanwhile"
    assert all(stop - start < PAUSE_SECONDS + 0.02 for start, stop in grants.spans)
    assert len(settled) == len(grants.spans), "the device is idle before serving goes on"
    assert turn.figures["pauses"] == len(grants.spans)
    spent = sum(stop - start for start, stop in grants.spans)
    assert turn.figures["paused_seconds"] == pytest.approx(spent, abs=0.02)


def test_a_microbatch_longer_than_a_pause_has_one_of_its_own() -> None:
    grants = Grants()
    with in_pauses(grants).update(alive) as turn:
        for _ in range(3):
            time.sleep(PAUSE_SECONDS + 0.05)
            turn.between()
    assert len(grants.spans) >= 3
    assert turn.figures["paused_seconds"] <= len(grants.spans) * PAUSE_SECONDS + 0.01


@pytest.mark.parametrize("error", [Stopped(), MemoryError("no memory")])
def test_an_update_that_fails_gives_its_pause_back(error: Exception) -> None:
    grants = Grants()
    with pytest.raises(type(error)), in_pauses(grants).update(alive):
        raise error
    assert len(grants.spans) == 1


def test_a_stop_ends_the_wait_for_a_pause() -> None:
    stop, grants = Stop(), Grants([NotYet("serving goes on", 30.0)])
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped), in_pauses(grants).update(stop.check):
        pass
    assert time.monotonic() - began < 2


def test_it_asks_again_when_it_is_told_to() -> None:
    grants = Grants([NotYet("serving goes on", 0.2), NotYet("serving goes on", 0.2)])
    with in_pauses(grants).update(alive) as turn:
        turn.between()
    assert (grants.asked, turn.figures["pauses"]) == (3, 1)


def test_without_pauses_training_goes_on_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("hone.trainer").propagate = True
    grants = Grants([NoPauses("it is off"), NoPauses("it is off"), NotYet("in an hour", 3600.0)])
    sharing = in_pauses(grants)
    for asked in (1, 2, 3):
        with sharing.update(alive) as turn:
            for _ in range(3):
                turn.between()
        assert (grants.asked, turn.figures["pauses"]) == (asked, 0)
    assert [line for line in caplog.messages if "not paused" in line] == [
        "training beside serving, which is not paused for it: it is off"
    ]
    with sharing.update(alive):
        assert grants.asked == 4, "each update asks anew"


def test_beside_serving_nothing_is_asked_for() -> None:
    with BESIDE.update(alive) as turn:
        turn.between()
    assert turn.figures == {}


def test_a_lease_is_renewed_while_an_update_waits(world: World) -> None:
    store: Store = world.store
    claim = store.claim(world.spec, live_version=0, owner="test", lease_seconds=1.2)
    assert claim is not None
    with Heartbeat(store, claim, Stop(), lease_seconds=1.2) as heartbeat:
        grants = Grants([NotYet("serving goes on", 2.0)])
        with in_pauses(grants).update(heartbeat.beat):
            store.update_run(claim, "training", {})


@contextmanager
def serving_pauses(answer: Callable[[Request], Response]) -> Iterator[str]:
    app = FastAPI()
    app.add_api_route("/v1/training/pauses", answer, methods=["POST"], response_model=None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, key: str | None = None) -> ServerPauses:
    return ServerPauses(url, key, longest_seconds=1.0)


def test_a_pause_lasts_as_long_as_its_answer_is_read() -> None:
    seen: list[Any] = []

    def answer(request: Request) -> Response:
        async def lines() -> Any:
            try:
                yield json.dumps({"state": "paused", "seconds": 0.7}) + "\n"
                while True:
                    yield ""
                    await asyncio.sleep(0.01)
            finally:
                seen.append("over")

        seen.append(request.headers.get("authorization"))
        return StreamingResponse(lines())

    with serving_pauses(answer) as url:
        held = ask(url, "s3cret")()
        assert 0.5 < held.until - time.monotonic() <= 0.7
        time.sleep(0.1)
        assert seen == ["Bearer s3cret"]
        held.close()
        give_up_at = time.monotonic() + 5
        while "over" not in seen and time.monotonic() < give_up_at:
            time.sleep(0.01)
        assert seen == ["Bearer s3cret", "over"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "match"),
    [
        (409, {"error": {"message": "trainer.share is 'beside'"}}, NoPauses, "409.*'beside'"),
        (429, {"error": {"message": "not yet"}}, NotYet, "not yet"),
        (500, "nonsense", NoPauses, "does not answer"),
        (200, {"seconds": "many"}, NoPauses, "does not answer"),
        (200, {}, NoPauses, "does not answer"),
    ],
)
def test_refusals_are_told_apart(status: int, body: Any, kind: type[Exception], match: str) -> None:
    def answer(request: Request) -> Response:
        return JSONResponse(body, status_code=status, headers={"retry-after": "7"})

    with serving_pauses(answer) as url, pytest.raises(kind, match=match) as caught:
        ask(url)()
    assert getattr(caught.value, "seconds", 7.0) == 7.0


def test_a_server_that_is_not_there_grants_no_pause() -> None:
    with pytest.raises(NoPauses, match=r"http://127\.0\.0\.1:9 does not answer"):
        ask("http://127.0.0.1:9")()


def test_an_update_in_pauses_is_the_update_beside_serving(
    world: World,
    make_world: Callable[[str], Path],
    base_folder: Path,
    controller: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world.run()
    grants = Grants()
    monkeypatch.setattr("trainer.__main__.ServerPauses", lambda *_, **__: grants)
    monkeypatch.setattr(trainer.sharing, "_SLICE_SECONDS", 0.01)
    folder = make_world("in-pauses")
    monkeypatch.setenv("HONE_CONFIG", str(folder / "hone.toml"))
    other = World(folder, base_folder, share="pause", serve_seconds=0.05, microbatch_tokens=64)
    with controller([folder]):
        other.run()
    assert other.adapter(1).metrics["pauses"] == len(grants.spans) >= 1
    assert other.adapter(1).metrics["paused_seconds"] > 0
    assert other.releases.state("line").live.version == 1
    theirs, ours = world.adapter(1).probe, other.adapter(1).probe
    assert theirs is not None
    assert ours is not None
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    other.store.close()
