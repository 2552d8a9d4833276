"""The composition root: builds every part of a server, in the one order that works.

Nothing else constructs engines, stores or clients. What the parts do is their own business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI

from feedback.keys import ApiKeys
from feedback.log import Log
from feedback.pruning import Pruning
from feedback.run_store import RunStore
from feedback.spec import ShadowSpec
from feedback.store import Store
from feedback.wakeup import Wakeup, open_wakeup
from feedback.webhooks.source import open_webhooks
from policy.chat import ChatFormat
from policy.leases import Leases
from policy.ownership import own, owners
from policy.registry import Registry
from policy.releases import Releases
from policy.types import AdapterRef
from server.access.counters import Counters
from server.access.gate import Access
from server.access.keys import KeyRing
from server.access.limits import Limits
from server.agents.run import Agent
from server.agents.spec import AgentSpec, load_agents
from server.canary import CanaryDecider
from server.instance import Heartbeat, new_name
from server.judges.judge import Judge, read_api_key
from server.judges.watch import JudgeWatch, Post
from server.parity import Parity
from server.parts import Parts
from server.pauses import Pauses
from server.plain_http import collect
from server.plain_traffic import PlainTraffic
from server.pruner import Pruner
from server.quarantine import QuarantineWatch
from server.release_controller import ReleaseController
from server.response_store import ResponseStore
from server.retention import Retention
from server.routing import Routing
from server.run_keeper import RunKeeper
from server.run_webhooks import EndTeller
from server.runner import Runner
from server.sampled_reply import SampledReply
from server.services import Services
from server.settings import Settings
from server.shadow import Shadow
from server.source_limits import SourceLimits
from server.supervisor import Supervisor
from server.telemetry.ledger import Ledger
from server.telemetry.metrics import Metrics
from server.telemetry.watch import WatchedLog, Watcher, Watchers
from server.tools.box import open_toolbox
from server.tools.breaker import Breaker

if TYPE_CHECKING:
    from server.telemetry.spans import Spans


async def start(
    app: FastAPI,
    settings: Settings,
    parts: Parts,
    counted: Metrics | None,
    stack: AsyncExitStack,
) -> Services:
    base = parts.base_model(settings.model.path)
    # Without the default folder there is nothing to serve; a folder that was named must be there.
    named = settings.model_fields_set
    has_agents = "agents" in named or settings.agents.is_dir()
    has_webhooks = "webhooks" in named or settings.webhooks.is_dir()
    specs = load_agents(settings.agents) if has_agents else {}
    webhooks = open_webhooks(settings.webhooks) if has_webhooks else {}

    # The engine first: it forks, which is only safe before any thread exists.
    engine = parts.engine(base, settings)
    stack.push_async_callback(engine.close)

    store, run_store, wakeup, writer = _open_record(settings, stack)
    heartbeat = await _heartbeat(run_store, settings, stack)
    own(store.database, {spec.policy: spec.tenant for spec in specs.values()})
    chat = parts.chat(base.path)
    spans = _spans(settings, chat, stack)
    watchers: list[Watcher] = [watcher for watcher in (counted, spans) if watcher is not None]
    access, counters = _open_access(settings, store, counted, stack)
    registry = Registry(
        settings.model.adapters, base.digest, settings.model.max_lora_rank, base_folder=base.path
    )
    releases = Releases(store.database, on_change=lambda: wakeup.notify("releases"))
    leases = Leases()
    pauses = Pauses(engine, settings.trainer, counted)
    controller = ReleaseController(
        engine,
        registry,
        releases,
        leases,
        slots=settings.engine.max_loras,
        wakeup=wakeup,
        watcher=counted,
        held_off=pauses.held_off,
    )
    shadow = Shadow(engine, chat, controller, leases, recorder=writer, specs=_shadowed(specs))
    log = WatchedLog(writer, Watchers([*watchers, shadow]), access.limits.note_tokens)
    if watchers:
        ledger = Ledger(store, releases, Watchers(watchers))
        await ledger.start()
        stack.push_async_callback(ledger.stop)
    parity = Parity(engine, registry, controller, tolerance=settings.engine.probe_tolerance)
    await _follow_releases(controller, pauses, parity, stack)
    stack.push_async_callback(shadow.stop)

    decider = CanaryDecider(releases, store, {s.policy: s.learning for s in specs.values()})
    _run(decider, stack)

    def in_use(ref: AdapterRef) -> bool:
        waits = run_store.is_pinned(ref.policy, ref.version)
        return waits or ref in engine.loaded or bool(leases.count(ref))

    for part in (
        Retention(releases, registry, in_use, keep=settings.model.keep_versions),
        _pruner(settings, specs, counted, store=store, releases=releases, runs=run_store),
    ):
        _run(part, stack)

    base_name = base.path.name if settings.model.path != "pocket" else "pocket"
    routing = Routing(
        base_name,
        {spec.name: spec.policy for spec in specs.values()},
        controller,
        owners(store.database),
    )
    plain = PlainTraffic(
        log, idle_seconds=settings.http.episode_idle_seconds, is_reply=SampledReply(chat.parse)
    )
    _run(plain, stack)
    parts.openai_routes(app, engine, base_name, collect)

    served, breakers = await _open_agents(specs, spans, stack)
    if counted is not None:
        counted.know_breakers(breakers)
        counted.know_tools({tool for agent in served.values() for tool in agent.toolbox.names})
    runner = Runner(served, engine, chat, controller, log)
    keeper = await _keep_runs(runner, run_store, heartbeat, settings, stack)

    _watch_feedback(specs, settings, stack, store=store, log=log, chat=chat)

    trainer = None
    if settings.trainer.enabled and served:
        trainer = Supervisor("trainer", parts.trainer, _trainer_environment(settings))
        _run(trainer, stack)
    return Services(
        settings=settings,
        base_name=base_name,
        engine=engine,
        chat=chat,
        store=store,
        log=log,
        registry=registry,
        releases=releases,
        leases=leases,
        controller=controller,
        pauses=pauses,
        decider=decider,
        shadow=shadow,
        routing=routing,
        plain=plain,
        responses=ResponseStore(settings.http.max_kept_responses_mb * 2**20),
        agents=served,
        runs=keeper,
        webhooks=webhooks,
        limits=SourceLimits(settings.feedback.events_per_minute, counters),
        trainer=trainer,
        metrics=counted,
        keys=ApiKeys(store.database),
        access=access,
    )


class _Runs(Protocol):
    """What works beside requests."""

    def start(self) -> None: ...

    async def stop(self) -> None: ...


def _run(part: _Runs, stack: AsyncExitStack) -> None:
    """Have it work until the server stops."""
    part.start()
    stack.push_async_callback(part.stop)


async def _follow_releases(
    controller: ReleaseController, pauses: Pauses, parity: Parity, stack: AsyncExitStack
) -> None:
    """Have traffic follow the releases, and pause for the trainer where it may ask for that."""
    await controller.start()
    stack.push_async_callback(controller.stop)
    if pauses.enabled:
        await parity.remember()
        pauses.start(parity.prove)
        stack.push_async_callback(pauses.stop)


def _open_access(
    settings: Settings, store: Store, counted: Metrics | None, stack: AsyncExitStack
) -> tuple[Access, Counters]:
    """Who is known by a key, and what was used."""
    ring = KeyRing(ApiKeys(store.database), max_age=settings.access.key_cache_seconds)
    _run(ring, stack)
    missed = (lambda: None) if counted is None else counted.limit_fell_back
    counters = Counters(settings.storage.redis, missed)
    limits = Limits(settings.limits, counters)
    _run(limits, stack)
    return Access(ring, limits), counters


def _pruner(
    settings: Settings,
    specs: Mapping[str, AgentSpec],
    counted: Metrics | None,
    *,
    store: Store,
    releases: Releases,
    runs: RunStore,
) -> Pruner:
    """What deletes old episodes, if anything does."""
    pruning = Pruning(
        store,
        releases,
        {spec.policy: spec.learning for spec in specs.values()},
        keep_days=settings.storage.keep_days,
        keep_parked_days=settings.storage.keep_parked_days,
    )
    told = (lambda pruned: None) if counted is None else counted.pruned
    return Pruner(pruning, runs.is_first, told=told)


def _shadowed(specs: Mapping[str, AgentSpec]) -> dict[str, ShadowSpec]:
    """By policy: how its canary is to be shadowed."""
    canaries = ((spec.policy, spec.learning.training.canary) for spec in specs.values())
    return {policy: asked.shadow for policy, asked in canaries if asked and asked.shadow}


def _open_record(settings: Settings, stack: AsyncExitStack) -> tuple[Store, RunStore, Wakeup, Log]:
    """The record, how others hear of news in it, and the log that writes to it."""
    store = Store.open(settings.storage.database)
    stack.callback(store.close)
    run_store = RunStore(store.database, new_name())
    wakeup = open_wakeup(settings.storage.redis)
    stack.callback(wakeup.close)
    log = Log(store, wakeup, owner=run_store.owner)
    stack.push_async_callback(asyncio.to_thread, log.close)
    return store, run_store, wakeup, log


async def _heartbeat(run_store: RunStore, settings: Settings, stack: AsyncExitStack) -> Heartbeat:
    """This server's sign of life, before it has anything that another could take over."""
    heartbeat = Heartbeat(run_store, settings.runs.lease_seconds)
    await heartbeat.start()
    stack.push_async_callback(heartbeat.stop)
    return heartbeat


async def _keep_runs(
    runner: Runner,
    run_store: RunStore,
    heartbeat: Heartbeat,
    settings: Settings,
    stack: AsyncExitStack,
) -> RunKeeper:
    """What goes on with runs, those of dead servers first."""
    keeper = RunKeeper(
        runner,
        run_store,
        EndTeller(run_store, runner.agents, runner.chat),
        heartbeat,
        sweep_seconds=settings.runs.lease_seconds / 3,
        at_once=settings.runs.background,
        drain_seconds=settings.http.drain_seconds,
    )
    await keeper.start()
    stack.push_async_callback(keeper.stop)
    return keeper


def _watch_feedback(
    specs: Mapping[str, AgentSpec],
    settings: Settings,
    stack: AsyncExitStack,
    *,
    store: Store,
    log: WatchedLog,
    chat: ChatFormat,
) -> None:
    """What judges episodes, and what looks at who judges them."""
    _run(QuarantineWatch(store, [spec.learning for spec in specs.values()]), stack)
    _run(JudgeWatch(store, log, _judges(specs, settings), chat.text), stack)


def _judges(specs: Mapping[str, AgentSpec], settings: Settings) -> list[Post]:
    """Every judge with whom it judges; those without an address of their own are asked of us."""
    own = settings.http.api_key
    own_key = None if own is None else own.get_secret_value()
    return [
        Post(
            Judge(
                judge,
                base_url=judge.base_url or f"{settings.http.url}/v1",
                api_key=own_key if judge.base_url is None else read_api_key(judge),
            ),
            agent.name,
            agent.policy,
            agent.tenant,
        )
        for agent in specs.values()
        for judge in agent.judges
    ]


async def _open_agents(
    specs: Mapping[str, AgentSpec], spans: Spans | None, stack: AsyncExitStack
) -> tuple[dict[str, Agent], dict[str, Sequence[Breaker]]]:
    """Every agent with its tools open, traced if anything is; and the breakers of its sources."""
    served: dict[str, Agent] = {}
    breakers: dict[str, Sequence[Breaker]] = {}
    for name, spec in specs.items():
        tools = await open_toolbox(spec.tools)
        stack.push_async_callback(tools.aclose)
        served[name] = Agent(spec, tools if spans is None else spans.around(tools))
        breakers[name] = tools.breakers
    return served, breakers


def _spans(settings: Settings, chat: ChatFormat, stack: AsyncExitStack) -> Spans | None:
    """What exports spans, if there is anywhere to export them to."""
    if settings.telemetry.otlp_endpoint is None:
        return None
    from server.telemetry.spans import open_spans  # noqa: PLC0415 - as above

    spans = open_spans(settings.telemetry, text=chat.text)
    stack.push_async_callback(asyncio.to_thread, spans.close)
    return spans


def _trainer_environment(settings: Settings) -> Mapping[str, str]:
    variables = settings.shared_environment()
    key = settings.http.api_key
    if key is not None:
        variables["HONE_HTTP__API_KEY"] = key.get_secret_value()
    variables["PYTHONUNBUFFERED"] = "1"
    return variables
