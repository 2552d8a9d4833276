"""Limits: who is turned away, what it is told, and what happens when Redis goes."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.access.caller import BOOTSTRAP, Caller, current
from server.access.counters import Counters
from server.access.limits import Limits
from server.access.settings import LimitSettings
from server.errors import TooManyRequests
from tests.server.house import (
    OPERATOR,
    House,
    client_of,
    make_key,
    running,
    scripted_engine,
    scripted_parts,
    settings_in,
    write_agent,
)
from tests.servers import Redis

ASK: list[Any] = [{"role": "user", "content": "hi"}]
ANN, ANNS_OTHER, BEN = (
    Caller("acme", "k1", ("inference",)),
    Caller("acme", "k2", ("inference",)),
    Caller("bolt", "k3", ("inference",)),
)


@asynccontextmanager
async def limits_of(
    redis: str | None = None, **sections: Any
) -> AsyncIterator[tuple[Limits, list[str]]]:
    """Limits, and a list that grows with each count that Redis missed."""
    missed: list[str] = []
    counters = Counters(redis, lambda: missed.append("missed"))
    limits = Limits(LimitSettings.model_validate(sections), counters)
    limits.start()
    yield limits, missed
    await limits.stop()


async def is_admitted(limits: Limits, caller: Caller, *, generates: bool = True) -> bool:
    try:
        await limits.admit(caller, generates=generates)
    except TooManyRequests:
        return False
    return True


async def spend(limits: Limits, caller: Caller, tokens: int) -> None:
    current.set(caller)
    limits.note_tokens(tokens)
    await asyncio.sleep(0.05)


async def test_keys_and_tenants_are_counted_apart() -> None:
    """Two a minute for a key, three for a tenant, four for one that is named."""
    sections: dict[str, Any] = {
        "key": {"requests_per_minute": 2},
        "tenant": {"requests_per_minute": 3},
        "tenants": {"bolt": {"requests_per_minute": 1}},
    }
    async with limits_of(**sections) as (limits, _):
        assert [await is_admitted(limits, ANN) for _ in range(3)] == [True, True, False]
        # ANN's third was refused by its key, and counted for its tenant.
        assert [await is_admitted(limits, ANNS_OTHER) for _ in range(2)] == [False, False]
        assert [await is_admitted(limits, BEN) for _ in range(2)] == [True, False]
        assert [await is_admitted(limits, BOOTSTRAP) for _ in range(5)] == [True] * 5


async def test_a_window_ends() -> None:
    async with limits_of(key={"requests_per_minute": 1}) as (limits, _):
        (rule,) = limits._rules("acme", "k1")
        (before,) = await limits.admit(ANN, generates=True)
        assert (before.remaining, before.is_over) == (0, False)
        assert before.reset_seconds == pytest.approx(60, abs=1)
        assert not await is_admitted(limits, ANN)
        storage = limits._counters._own.fixed.storage
        storage.expirations[rule.item.key_for(rule.of)] = 0.0  # type: ignore[attr-defined]  # a minute passes
        assert await is_admitted(limits, ANN)


async def test_tokens_are_counted_in_full_past_the_limit() -> None:
    """Nobody stays below a limit for ever by taking much at once."""
    async with limits_of(key={"tokens_per_minute": 100}, tenant={"tokens_per_day": 500}) as (
        limits,
        _,
    ):
        await spend(limits, ANN, 90)
        assert await is_admitted(limits, ANN)
        await spend(limits, ANN, 450)
        with pytest.raises(TooManyRequests, match="100 tokens of 60 s") as refused:
            await limits.admit(ANN, generates=True)
        assert refused.value.code == "rate_limit_exceeded"
        assert await is_admitted(limits, ANN, generates=False), "reading takes no tokens"
        with pytest.raises(TooManyRequests, match="500 tokens of 86400 s") as refused:
            await limits.admit(ANNS_OTHER, generates=True)
        assert refused.value.code == "quota_exceeded"
        assert refused.value.headers is not None
        assert refused.value.headers["x-should-retry"] == "false"
        assert await is_admitted(limits, BEN)


async def test_what_runs_at_once_is_counted_while_it_runs() -> None:
    async with limits_of(key={"concurrent": 1}, tenant={"concurrent": 2}) as (limits, _):
        with limits.running(ANN):
            with pytest.raises(TooManyRequests, match="key 'k1' has 1"), limits.running(ANN):
                pass
            other = Caller("acme", "k9", ("inference",))
            with limits.running(ANNS_OTHER):
                with pytest.raises(TooManyRequests, match="tenant 'acme' has 2"):
                    limits.running(other).__enter__()
                with limits.running(BEN), limits.running(BOOTSTRAP):
                    pass
            with limits.running(other):
                pass
        assert not limits._running, "nothing is left behind"


async def test_processes_share_their_counts_over_redis(redis_server: Redis) -> None:
    sections: dict[str, Any] = {"key": {"requests_per_minute": 3, "tokens_per_minute": 10}}
    async with (
        limits_of(redis_server.url, **sections) as (one, missed),
        limits_of(redis_server.url, **sections) as (two, _),
    ):
        assert [await is_admitted(limits, ANN) for limits in (one, two, one, two)] == [
            True, True, True, False,
        ]  # fmt: skip
        await spend(one, BEN, 11)
        assert not await is_admitted(two, BEN)
        assert missed == []


async def test_without_its_redis_a_process_counts_by_itself(
    redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with limits_of(redis_server.url, key={"requests_per_minute": 2}) as (limits, missed):
        assert await is_admitted(limits, ANN)
        redis_server.stop()
        began = asyncio.get_running_loop().time()
        assert [await is_admitted(limits, ANN) for _ in range(3)] == [True, True, False]
        assert asyncio.get_running_loop().time() - began < 2
        assert len(missed) == 3
        assert caplog.text.count("Redis does not answer") == 1, "said once, and asked once"
        redis_server.start()
        limits._counters._away_until = 0.0  # as after five seconds
        assert await is_admitted(limits, ANN), "it counts in Redis again, which has lost its own"
        assert len(missed) == 3


FEW = {"tokens_per_minute": 60}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("limited")
    write_agent(folder, "name: less-desk\ntenant: less\n", "less-desk")
    told = settings_in(
        folder, http__api_key=OPERATOR, limits__key__requests_per_minute=5,
        limits__tenants={"few": FEW, "less": FEW, "narrow": {"concurrent": 1}},
    )  # fmt: skip
    slow = scripted_parts(folder, engine=lambda base, settings: scripted_engine(0.01))
    with running(told, slow) as house:
        yield house


def test_headers_say_where_one_stands_and_429_when_to_come_back(limited: House) -> None:
    key = make_key(limited, scopes=["inference"])["key"]
    client = openai.OpenAI(base_url=f"{limited.url}/v1", api_key=key, max_retries=0)
    for left in (4, 3, 2, 1, 0):
        headers = client.models.with_raw_response.list().headers
        assert headers["ratelimit-policy"] == '"key-requests";q=5;w=60'
        assert re.fullmatch(rf'"key-requests";r={left};t=(60|5\d)', headers["ratelimit"])
        assert headers["x-ratelimit-limit-requests"] == "5"
        assert headers["x-ratelimit-remaining-requests"] == str(left)
        assert re.fullmatch(r"(60|5\d)s", headers["x-ratelimit-reset-requests"])
    with pytest.raises(openai.RateLimitError) as refused:
        client.models.list()
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "rate_limit_error"
    answer = refused.value.response
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    with client_of(limited, OPERATOR) as operator:
        assert all(operator.get("/v1/models").status_code == 200 for _ in range(6))


@pytest.mark.parametrize(("tenant", "model"), [("few", "pocket"), ("less", "agent:less-desk")])
def test_tokens_of_chats_and_runs_are_counted(limited: House, tenant: str, model: str) -> None:
    key = make_key(limited, scopes=["inference", "runs"], tenant=tenant)["key"]
    asked = {"model": model, "messages": ASK}
    with client_of(limited, key) as client:
        first = client.post("/v1/chat/completions", json=asked)
        second = client.post("/v1/chat/completions", json=asked)
        third = client.post("/v1/chat/completions", json=asked)
        assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
        left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in (first, second)]
        episode = client.get(f"/v1/episodes/{first.headers['x-hone-episode']}").json()
    (turn,) = episode["turns"]
    used = len(turn["prompt_token_ids"]) + len(turn["token_ids"])
    assert left == [60, 60 - used]
    assert 'qu="tokens"' in third.headers["ratelimit-policy"]


def test_one_at_a_time(limited: House) -> None:
    key = make_key(limited, scopes=["inference"], tenant="narrow")["key"]
    statuses: dict[str, int] = {}

    def ask(when: str) -> None:
        asked = {"model": "pocket", "messages": ASK}
        with client_of(limited, key) as client:
            statuses[when] = client.post("/v1/chat/completions", json=asked).status_code

    first = threading.Thread(target=ask, args=["first"])
    first.start()
    limited.until(lambda: bool(limited.services.access.limits._running))
    ask("beside it")
    first.join()
    ask("after it")
    assert statuses == {"first": 200, "beside it": 429, "after it": 200}


async def test_a_client_that_hangs_up_gives_its_place_back(limited: House) -> None:
    key = make_key(limited, scopes=["inference"], tenant="narrow")["key"]
    asked = {"model": "pocket", "messages": ASK}
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=limited.url, headers=headers) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json=asked, timeout=0.1)
    limited.until(lambda: not limited.services.access.limits._running)


@pytest.mark.parametrize(
    "section",
    [{"key": {"requests_per_minute": 0}}, {"kye": {}}, {"tenants": {"Not A Name": {}}}],
)
def test_what_cannot_be_meant_is_refused(section: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limits"):
        settings_in(tmp_path, **{f"limits__{name}": value for name, value in section.items()})
