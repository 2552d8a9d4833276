"""What a model name means: the base model, a policy's live version or its canary, a pinned version,
or an agent.

Names are resolved once, when an episode begins; the release controller says what is live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

from feedback.types import Purpose
from policy.ownership import DEFAULT_TENANT
from policy.types import AdapterRef
from server.errors import BadRequest, NotFound

AGENT_PREFIX = "agent:"
"""Before an agent's name, it makes the agent a model of `/v1/chat/completions`."""
BASE_POLICY = "base"
"""The policy under which traffic to the bare base model is logged; it is never trained."""


class ReservedName(ValueError):
    """A policy has the base model's name; clients could not tell them apart."""


class Live(Protocol):
    """What is needed of the release controller."""

    @property
    def policies(self) -> tuple[str, ...]: ...
    @property
    def resident(self) -> frozenset[AdapterRef]: ...
    def live(self, policy: str) -> AdapterRef: ...
    def assigned(self, policy: str, key: str) -> AdapterRef: ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a new episode goes."""

    adapter: AdapterRef
    is_pinned: bool
    """The client named the version itself."""


ModelKind = Literal["base", "policy", "version", "agent"]


@dataclass(frozen=True, slots=True)
class Model:
    """One name that clients may give as `model`, as `/v1/models` lists it."""

    id: str
    kind: ModelKind
    adapter: AdapterRef | None = None
    agent: str | None = None


class Routing:
    """Model names of this server. `agents` maps an agent's name to its policy's.

    A name means something to the tenant whose policy it is, and to nobody else; the base model is
    everybody's.
    """

    def __init__(
        self,
        base_name: str,
        agents: Mapping[str, str],
        live: Live,
        owners: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`owners`: each policy's tenant; one that is not there is the default's. Raises
        ReservedName."""
        for agent, policy in agents.items():
            if policy in (base_name, BASE_POLICY):
                raise ReservedName(
                    f"agent {agent!r} has policy {policy!r}, which is the base model's name; "
                    "give the policy another one"
                )
        self._base_name = base_name
        self._agents = agents
        self._live = live
        self._owners = owners

    @property
    def policies(self) -> tuple[str, ...]:
        """Every tenant's policies that an agent has or that have a release."""
        return tuple(sorted({*self._agents.values(), *self._live.policies}))

    def policies_of(self, tenant: str) -> tuple[str, ...]:
        """Those of one tenant."""
        return tuple(policy for policy in self.policies if self._is_of(tenant, policy))

    def assigned(self, policy: str, key: str, purpose: Purpose) -> AdapterRef:
        """The adapter of a new episode of the task `key`, which names no version.

        Held-out tasks compare versions that they name: what names none is measured on what is live.
        """
        if purpose == "evaluation":
            return self._live.live(policy)
        return self._live.assigned(policy, key)

    def resolve(self, model: str, key: str, purpose: Purpose, *, tenant: str) -> Route:
        """The adapter of a new plain episode of a tenant, of the task `key`.

        Raises NotFound for an unknown name, BadRequest for an agent's that is no policy's.
        """
        if model in (self._base_name, BASE_POLICY):
            return Route(AdapterRef(BASE_POLICY, 0), is_pinned=True)
        policies = self.policies_of(tenant)
        if model in policies:
            return Route(self.assigned(model, key, purpose), is_pinned=False)
        if "@" in model:
            return Route(self.pinned(model, tenant=tenant), is_pinned=True)
        name = model.removeprefix(AGENT_PREFIX)
        if self._agents.get(name) in policies:
            raise BadRequest(
                f"{name!r} is an agent: chat with the model '{AGENT_PREFIX}{name}', or use POST "
                f"/v1/agents/{name}/runs; its bare policy is {self._agents[name]!r}",
                code="model_is_an_agent",
                param="model",
            )
        raise self._unknown(model, tenant)

    def pinned(self, model: str, *, tenant: str) -> AdapterRef:
        """Read `policy@vN`. Raises NotFound unless the policy is the tenant's."""
        try:
            ref = AdapterRef.parse(model)
        except ValueError:
            raise self._unknown(model, tenant) from None
        if ref.policy not in self.policies_of(tenant):
            raise self._unknown(model, tenant)
        return ref

    def engine_name(self, ref: AdapterRef) -> str:
        """What the engine's own routes call this adapter."""
        return self._base_name if ref.policy == BASE_POLICY else str(ref)

    def models(self, tenant: str) -> list[Model]:
        """All names that a tenant may use, the base model first."""
        policies = self.policies_of(tenant)
        listed = [Model(self._base_name, "base")]
        for policy in policies:
            listed.append(Model(policy, "policy", self._live.live(policy)))
        resident = sorted(ref for ref in self._live.resident if ref.policy in policies)
        listed += [Model(str(ref), "version", ref) for ref in resident]
        listed += [
            Model(f"{AGENT_PREFIX}{agent}", "agent", self._live.live(policy), agent)
            for agent, policy in sorted(self._agents.items())
            if policy in policies
        ]
        return listed

    def _is_of(self, tenant: str, policy: str) -> bool:
        return self._owners.get(policy, DEFAULT_TENANT) == tenant

    def _unknown(self, model: str, tenant: str) -> NotFound:
        names = (self._base_name, *self.policies_of(tenant))
        known = ", ".join(repr(name) for name in names)
        return NotFound(
            f"model {model[:140]!r} does not exist; expected one of {known}, or POLICY@vN",
            code="model_not_found",
            param="model",
        )
