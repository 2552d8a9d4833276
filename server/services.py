"""What a running server consists of, as its routes see it. Built by `server.start` alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, FastAPI, Request

from feedback.keys import ApiKeys
from feedback.spec import LearningSpec
from feedback.store import Store
from feedback.webhooks.source import WebhookSource
from policy.chat import ChatFormat
from policy.engine import Engine
from policy.leases import Leases
from policy.registry import Registry
from policy.releases import Releases
from server.access.gate import Access
from server.agents.run import Agent
from server.agents.spec import learning_of
from server.canary import CanaryDecider
from server.errors import Unavailable
from server.pauses import Pauses
from server.plain_traffic import PlainTraffic
from server.release_controller import ReleaseController
from server.response_store import ResponseStore
from server.routing import Routing
from server.run_keeper import RunKeeper
from server.settings import Settings
from server.shadow import Shadow
from server.source_limits import SourceLimits
from server.supervisor import Supervisor
from server.telemetry.metrics import Metrics
from server.telemetry.watch import WatchedLog


@dataclass(frozen=True, slots=True)
class Services:
    """Every part of a server that has started."""

    settings: Settings
    base_name: str
    """What clients call the base model."""
    engine: Engine
    chat: ChatFormat
    store: Store
    log: WatchedLog
    registry: Registry
    releases: Releases
    leases: Leases
    controller: ReleaseController
    pauses: Pauses
    decider: CanaryDecider
    shadow: Shadow
    routing: Routing
    plain: PlainTraffic
    responses: ResponseStore
    agents: Mapping[str, Agent]
    runs: RunKeeper
    webhooks: Mapping[str, WebhookSource]
    limits: SourceLimits
    trainer: Supervisor | None
    """None when the server runs no trainer."""
    metrics: Metrics | None
    """None when they are switched off."""
    keys: ApiKeys
    access: Access
    started_at: float = field(default_factory=time.time)

    def agents_of(self, tenant: str) -> dict[str, Agent]:
        """The agents that a tenant may see and run, by name."""
        mine = self.agents.items()
        return {name: agent for name, agent in mine if agent.spec.tenant == tenant}

    def learning(self, policy: str, agent: str | None = None) -> LearningSpec:
        """As `learning_of`, of the agents that are served."""
        specs = {name: served.spec for name, served in self.agents.items()}
        return learning_of(specs, policy, agent)


def services_of(app: FastAPI) -> Services:
    """The services of this app. Raises Unavailable until they are up."""
    services = getattr(app.state, "services", None)
    if not isinstance(services, Services):
        raise Unavailable("the server is starting or stopping; try again", code="starting")
    return services


def get_services(request: Request) -> Services:
    """As `services_of`, for a route."""
    app: FastAPI = request.app
    return services_of(app)


ServicesOf = Annotated[Services, Depends(get_services)]
