"""What `/v1/policies` tells of a policy: its versions, its canary, and what happened to them.

The routes are `server.routes.policies`'.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from feedback.finite import finite
from policy.release_state import Mark
from policy.releases import Canary, ReleaseEvent, ReleaseState, ReleaseStateName
from policy.types import Adapter, AdapterRef
from server.services import Services
from server.wire import BodyOut, Figures

Name = Annotated[str, Field(description="`policy@vN`.")]
Number = Annotated[int, Field(description="1, 2, 3 ... within the policy; 0: the base model.")]
Policy = Annotated[str, Field(description="Its name.")]
Live = Annotated[
    str,
    Field(
        description="The version that this server gives new episodes, but for a canary's share; "
        "version 0 is the base model."
    ),
]
Reason = Annotated[str, Field(description="As the request said.")]
State = Annotated[
    ReleaseStateName | None,
    Field(
        description="candidate: published, unproven; loaded: the engine's probe passed; canary: it "
        "takes a share of new episodes; live: the rest; retired: it was live; rejected: it is "
        "never served; rolled_back: it was taken back; deleted: it is no longer on disk; null: "
        "nothing is recorded of it."
    ),
]
Pinned = Annotated[
    bool, Field(description="It stays on disk, and only a person replaces it while it is live.")
]
Resident = Annotated[bool, Field(description="This server's engine holds it.")]
Leases = Annotated[int, Field(description="Episodes and requests of this server that use it now.")]


class PolicyLineOut(BodyOut):
    """A policy as a list has it."""

    id: str = Field(description="Its name.")
    object: Literal["policy"] = "policy"
    live: Live


class PoliciesOut(BodyOut):
    """Policies."""

    object: Literal["list"] = "list"
    data: list[PolicyLineOut] = Field(description="By name.")


class CanaryOut(BodyOut):
    """A version on trial."""

    id: Name
    version: Number
    share: float = Field(description="Of new episodes; 0: it answers copies only.")
    why: str = Field(description="What the last look at it found.")
    figures: dict[str, float | None] = Field(
        description="What that look read: episodes and mean rewards of the canary and of what is "
        "live, and evidence for and against; of copies, how many were made and failed."
    )
    shadow: dict[str, float | None] | None = Field(
        description="Its copied answers beside those that were served, since this server started: "
        "counts, agreement in [0, 1], mean tokens, `logprob_gap` in nats; null: there were none."
    )


class PublishedVersionOut(BodyOut):
    """A version that has a folder."""

    id: Name
    version: Number
    published: Literal[True] = True
    parent: str | None = Field(
        description="The version that training started from, `policy@vN`; null: it was imported."
    )
    digest: str = Field(description="`sha256:` over its weights and its config.")
    rank: int = Field(description="Of the LoRA.")
    metrics: Figures = Field(description="What its training measured.")
    created_at: float = Field(description="Unix seconds.")
    state: State
    pinned: Pinned
    resident: Resident
    leases: Leases


class UnpublishedVersionOut(BodyOut):
    """A version without a folder that can be read: rejected or deleted, mostly."""

    id: Name
    version: Number
    published: Literal[False] = False
    state: State
    pinned: Pinned
    resident: Resident
    leases: Leases


class ReleaseEventOut(BodyOut):
    """One thing that happened to one version."""

    sequence: int = Field(description="1, 2, 3 ... within the policy.")
    version: Number
    state: ReleaseStateName | Mark = Field(
        description="What it became; pinned and unpinned leave it what it was."
    )
    actor: str = Field(description="Who caused it: trainer, server, canary, api ...")
    reason: str = Field(description="For people.")
    share: float | None = Field(
        description="Of a canary: the part of new episodes that it takes from here on."
    )
    figures: Figures = Field(description="What it was decided by.")
    at: float = Field(description="Unix seconds.")


class PolicyOut(PolicyLineOut):
    """A policy with its versions and its history."""

    canary: CanaryOut | None = Field(description="Null: none is on trial.")
    rollback_to: str | None = Field(
        description="What a rollback would leave live, `policy@vN`; null: the base model is live."
    )
    versions: list[PublishedVersionOut | UnpublishedVersionOut] = Field(
        description="Those that have a folder or an event, by number."
    )
    events: list[ReleaseEventOut] = Field(description="Oldest first.")


class RollbackOut(BodyOut):
    """That a version was taken back; `from` is it."""

    object: Literal["policy.rollback"] = "policy.rollback"
    policy: Policy
    taken: Name = Field(serialization_alias="from")
    live: Live
    reason: Reason


class PromotionOut(BodyOut):
    """That a version was made live; `from` is the one that was."""

    object: Literal["policy.promotion"] = "policy.promotion"
    policy: Policy
    before: Name = Field(serialization_alias="from")
    live: Live
    reason: Reason


class PinOut(BodyOut):
    """Whether a version is kept from now on."""

    object: Literal["policy.pin"] = "policy.pin"
    policy: Policy
    id: Name
    pinned: Pinned


def policy_out(
    state: ReleaseState,
    events: list[ReleaseEvent],
    adapters: list[Adapter],
    services: Services,
) -> PolicyOut:
    """All that is told of a policy. `adapters` are its folders."""
    return PolicyOut(
        id=state.policy,
        live=str(services.controller.live(state.policy)),
        canary=None if state.canary is None else _canary(state.canary, services),
        rollback_to=_rollback_to(state),
        versions=_versions(state, adapters, services),
        events=[_event(event) for event in events],
    )


def _rollback_to(state: ReleaseState) -> str | None:
    """What a rollback would leave live; the canary is taken back first."""
    if state.canary is not None:
        return str(state.live)
    return None if state.live.is_base else str(state.previous)


def _canary(canary: Canary, services: Services) -> CanaryOut:
    evidence, copies = services.decider.evidence(canary), services.shadow.figures(canary.ref)
    return CanaryOut(
        id=str(canary.ref),
        version=canary.ref.version,
        share=canary.share,
        why="not looked at yet" if evidence is None else evidence.why,
        figures={} if evidence is None else finite(evidence.figures),
        shadow=None if copies is None else finite(copies),
    )


def _versions(
    state: ReleaseState, adapters: list[Adapter], services: Services
) -> list[PublishedVersionOut | UnpublishedVersionOut]:
    """Every version that has a folder or an event: a rejected folder may be unreadable."""
    published = {adapter.ref.version: adapter for adapter in adapters}
    numbers = sorted(published.keys() | (state.states.keys() - {0}))
    return [_version(number, published.get(number), state, services) for number in numbers]


def _version(
    number: int, adapter: Adapter | None, state: ReleaseState, services: Services
) -> PublishedVersionOut | UnpublishedVersionOut:
    ref = AdapterRef(state.policy, number)
    bare = UnpublishedVersionOut(
        id=str(ref),
        version=number,
        state=state.states.get(number),
        pinned=number in state.pinned,
        resident=ref in services.controller.resident,
        leases=services.leases.count(ref),
    )
    if adapter is None:
        return bare
    return PublishedVersionOut(
        **bare.model_dump(exclude={"published"}),
        parent=None if adapter.parent is None else str(adapter.parent),
        digest=adapter.digest,
        rank=adapter.rank,
        metrics=finite(adapter.metrics),
        created_at=adapter.created_at,
    )


def _event(event: ReleaseEvent) -> ReleaseEventOut:
    return ReleaseEventOut(
        sequence=event.sequence,
        version=event.ref.version,
        state=event.state,
        actor=event.actor,
        reason=event.reason,
        share=event.share,
        figures=finite(event.figures),
        at=event.at,
    )
