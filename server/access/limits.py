"""How much a caller may use: which limits hold for it, who is turned away, and what it is told.

Requests are counted as they come. Tokens are known only afterwards: a request begins while there
is any left, and what it took is counted in full. The counting itself is `counters`'.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

from limits import RateLimitItemPerDay, RateLimitItemPerMinute

from server.access.caller import Caller, current
from server.access.counters import Counters, Rule, Standing
from server.access.settings import LimitSettings, Quota
from server.background import cancel
from server.errors import TooManyRequests

logger = logging.getLogger("hone.access")

_PATIENCE_SECONDS = 60
"""Past it a client had better ask a person than wait and try again."""


class Limits:
    """The limits of one server."""

    def __init__(self, settings: LimitSettings, counters: Counters) -> None:
        self._settings = settings
        self._counters = counters
        self._running: Counter[tuple[str, str, str]] = Counter()
        """Generating requests by key and by tenant; none is not there."""
        self._spent: asyncio.Queue[tuple[Caller, int]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._rules = lru_cache(maxsize=4096)(self._rules_of)

    def start(self) -> None:
        self._task = asyncio.create_task(self._charge())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel(self._task)
        await self._counters.close()

    async def admit(self, caller: Caller, *, generates: bool) -> Sequence[Standing]:
        """Count a request, and say where its caller stands. Raises TooManyRequests."""
        if not caller.is_limited:
            return ()
        rules = self._rules(caller.tenant, caller.key_id)
        if not rules:
            return ()
        standings = await asyncio.gather(
            *(
                self._counters.use(rule) if rule.unit == "requests" else self._counters.look(rule)
                for rule in rules
            )
        )
        for standing in standings:
            if standing.is_over and (generates or standing.rule.unit == "requests"):
                raise _refusal(standing, standings)
        return standings

    @contextmanager
    def running(self, caller: Caller) -> Iterator[None]:
        """Count one generating request while it lasts. Raises TooManyRequests."""
        held = []
        for kind, of, quota in self._quotas(caller.tenant, caller.key_id):
            if quota.concurrent is None or not caller.is_limited:
                continue
            # Keys and tenants are counted apart even if they have one name.
            held.append((kind, caller.tenant, of))
            if self._running[held[-1]] >= quota.concurrent:
                raise TooManyRequests(
                    f"{kind} {of!r} has {quota.concurrent} requests running, which is its limit; "
                    "wait for one to end",
                    code="concurrency_limit_exceeded",
                    headers={"retry-after": "1"},
                )
        self._running.update(held)
        try:
            yield
        finally:
            self._running -= Counter(held)

    def note_tokens(self, tokens: int) -> None:
        """Have tokens counted that were used for the caller of this task. Quick, raises nothing."""
        caller = current.get()
        if caller is not None and caller.is_limited and self._task is not None:
            self._spent.put_nowait((caller, tokens))

    async def _charge(self) -> None:
        while True:
            caller, tokens = await self._spent.get()
            for rule in self._rules(caller.tenant, caller.key_id):
                if rule.unit == "tokens":
                    try:
                        await self._counters.spend(rule, tokens)
                    except Exception:
                        logger.exception("%d tokens of %s are not counted", tokens, rule.of)

    def _quotas(self, tenant: str, key_id: str) -> tuple[tuple[str, str, Quota], ...]:
        of_tenant = self._settings.tenants.get(tenant, self._settings.tenant)
        return (("key", key_id, self._settings.key), ("tenant", tenant, of_tenant))

    def _rules_of(self, tenant: str, key_id: str) -> tuple[Rule, ...]:
        rules: list[Rule] = []
        for kind, of, quota in self._quotas(tenant, key_id):
            who = f"{kind}/{tenant}/{of}"
            if quota.requests_per_minute is not None:
                per_minute = RateLimitItemPerMinute(quota.requests_per_minute, namespace="requests")
                rules.append(Rule(f"{kind}-requests", "requests", per_minute, who))
            if quota.tokens_per_minute is not None:
                per_minute = RateLimitItemPerMinute(quota.tokens_per_minute, namespace="tokens")
                rules.append(Rule(f"{kind}-tokens", "tokens", per_minute, who))
            if quota.tokens_per_day is not None:
                per_day = RateLimitItemPerDay(quota.tokens_per_day, namespace="tokens")
                rules.append(Rule(f"{kind}-tokens-day", "tokens", per_day, who))
        return tuple(rules)


def headers_of(standings: Sequence[Standing]) -> dict[str, str]:
    """Where a caller stands, as draft-ietf-httpapi-ratelimit-headers-10 and OpenAI say it."""
    if not standings:
        return {}
    policies, states = [], []
    for standing in standings:
        rule = standing.rule
        unit = "" if rule.unit == "requests" else ';qu="tokens"'
        policies.append(f'"{rule.name}";q={rule.item.amount};w={rule.seconds}{unit}')
        states.append(f'"{rule.name}";r={standing.remaining};t={math.ceil(standing.reset_seconds)}')
    headers = {"ratelimit-policy": ", ".join(policies), "ratelimit": ", ".join(states)}
    for unit in ("requests", "tokens"):
        if ours := [standing for standing in standings if standing.rule.unit == unit]:
            headers |= _as_openai(unit, min(ours, key=lambda standing: standing.remaining))
    return headers


def _as_openai(unit: str, tightest: Standing) -> Mapping[str, str]:
    return {
        f"x-ratelimit-limit-{unit}": str(tightest.rule.item.amount),
        f"x-ratelimit-remaining-{unit}": str(tightest.remaining),
        f"x-ratelimit-reset-{unit}": f"{math.ceil(tightest.reset_seconds)}s",
    }


def _refusal(standing: Standing, standings: Sequence[Standing]) -> TooManyRequests:
    rule, seconds = standing.rule, max(1, math.ceil(standing.reset_seconds))
    headers = {**headers_of(standings), "retry-after": str(seconds)}
    if seconds > _PATIENCE_SECONDS:
        headers["x-should-retry"] = "false"
    kind = rule.name.partition("-")[0]
    return TooManyRequests(
        f"this {kind} has used its {rule.item.amount} {rule.unit} of {rule.seconds} s; "
        f"try again in {seconds} s",
        code="rate_limit_exceeded" if seconds <= _PATIENCE_SECONDS else "quota_exceeded",
        headers=headers,
    )
