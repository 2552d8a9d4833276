"""An agent as its owner writes it: one strict YAML file, read and checked before anything runs.

Declares only. Tools are opened by `server.tools.box`, the run is `server.agents.run`, and reward
and training are obeyed by the trainer, which reads the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from feedback.references import UnreadableReference, anchor, resolve
from feedback.spec import LearningSpec, RewardSpec, Strict, TrainingSpec
from feedback.types import ToolCall
from feedback.webhooks.signatures import HmacKey, read_key
from policy.ownership import DEFAULT_TENANT, TENANT_PATTERN
from server.agents.context import ContextSpec
from server.judges.spec import JudgeSpec
from server.tools.sources import ClientSource, ToolSource

NAME_PATTERN = r"^[a-z][a-z0-9._-]{0,62}$"


class AgentFileError(ValueError):
    """An agent's file cannot be used; the message names the file, the key and what to do."""


class Limits(Strict):
    """How far one run may go."""

    turns: int = Field(8, ge=1, description="Generations.")
    tokens: int = Field(2048, ge=1, description="Sampled tokens of all turns together.")
    seconds: float = Field(
        60.0, gt=0, description="Wall clock, tools included; not while it waits for anybody."
    )
    spend: float | None = Field(None, gt=0, description="Cost of the whole run, by `price`.")
    approval_seconds: float = Field(
        3600.0, gt=0, description="A call that nobody approves by then counts as refused."
    )
    client_seconds: float = Field(
        3600.0, gt=0, description="A client that brings no result by then ends the run as idle."
    )


_FREE = ("invalid", "refused", "pending")
"""Calls that were not made."""


class Price(Strict):
    """What a run costs, in the unit of `limits.spend`."""

    prompt: float = Field(0.0, ge=0, description="A million prompt tokens, in every turn anew.")
    sampled: float = Field(0.0, ge=0, description="A million sampled tokens.")
    calls: dict[str, float] = Field(
        default_factory=dict, description="One call of a tool, by its name; others cost nothing."
    )

    def tokens(self, prompt: int, sampled: int) -> float:
        """Of one turn or of many."""
        return (prompt * self.prompt + sampled * self.sampled) / 1e6

    def made(self, calls: Iterable[ToolCall]) -> float:
        """Of the calls that were made, as far as is known."""
        return sum(self.calls.get(call.name, 0.0) for call in calls if call.status not in _FREE)


class EndWebhook(Strict):
    """Who is told that a background run has ended, by the Standard Webhooks specification."""

    url: str = Field(pattern=r"^https?://", description="Posted to; redirects are not followed.")
    secret: SecretStr = Field(description="`whsec_...`, as `${env:NAME}` or `${file:PATH}`.")
    allow_hosts: tuple[str, ...] = Field(
        (), description="Hosts, or host:port, that may be at an address that is not public."
    )

    @field_validator("secret", mode="before")
    @classmethod
    def _is_beside_the_agents_file(cls, value: Any, info: ValidationInfo) -> Any:
        folder = (info.context or {}).get("folder")
        return anchor(value, folder) if folder is not None and isinstance(value, str) else value

    @field_validator("secret")
    @classmethod
    def _can_sign(cls, value: SecretStr) -> SecretStr:
        """Read at once, so that a mistake is told at the start and not when a run has ended."""
        try:
            signing_key(value)
        except UnreadableReference as error:
            raise ValueError(str(error)) from error
        return value


def signing_key(secret: SecretStr) -> HmacKey:
    """Raises ValueError or UnreadableReference, neither of which repeats the secret."""
    key = read_key("standard", resolve(secret.get_secret_value()))
    if not isinstance(key, HmacKey):
        raise ValueError("the secret is a public key, which cannot sign; expected 'whsec_...'")
    return key


class SamplingSpec(Strict):
    """How the policy's tokens are drawn. Learning needs temperature 1 or near it."""

    temperature: float = Field(1.0, ge=0, le=2)
    max_tokens: int = Field(128, ge=1, description="Sampled tokens of one turn.")
    top_p: float = Field(1.0, gt=0, le=1)


class AgentSpec(Strict):
    """One agent."""

    name: str = Field(pattern=NAME_PATTERN)
    tenant: str = Field(
        DEFAULT_TENANT, pattern=TENANT_PATTERN, description="Who may see and run it."
    )
    policy: str = Field("", pattern=NAME_PATTERN, description="Adapter line; the agent's name.")
    system: str | None = Field(None, description="System prompt, before the client's messages.")
    tools: tuple[ToolSource, ...] = ()
    client_tools: bool = Field(
        True, description="Whether a request may bring functions that its client runs."
    )
    limits: Limits = Limits()
    price: Price | None = Field(None, description="What `limits.spend` is counted in.")
    webhook: EndWebhook | None = Field(None, description="Told of the end of background runs.")
    sampling: SamplingSpec = SamplingSpec()
    context: ContextSpec = ContextSpec()
    reward: RewardSpec = RewardSpec()
    judges: tuple[JudgeSpec, ...] = ()
    training: TrainingSpec = TrainingSpec()
    practice: str | None = Field(
        None, description="Import path 'package.module:name' of what `hone practice` attempts."
    )

    @model_validator(mode="before")
    @classmethod
    def _policy_is_named_after_the_agent(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("policy") is None and "name" in data:
            return {**data, "policy": data["name"]}
        return data

    @model_validator(mode="after")
    def _learns_from_what_it_sampled(self) -> AgentSpec:
        if self.training.enabled and self.sampling.top_p != 1:
            raise ValueError(
                f"sampling.top_p is {self.sampling.top_p:g}, which the trainer cannot redo; leave "
                "it at 1, or set training.enabled to false"
            )
        return self

    @model_validator(mode="after")
    def _can_count_what_it_limits(self) -> AgentSpec:
        if self.limits.spend is not None and self.price is None:
            raise ValueError("limits.spend has no meaning without `price`; give both or neither")
        return self

    @model_validator(mode="after")
    def _is_judged_by_others(self) -> AgentSpec:
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError(f"judges are called {names}; expected a name for each")
        for judge in self.judges:
            if judge.is_one_of({self.name, self.policy}) and not judge.may_judge_itself:
                raise ValueError(
                    f"judge {judge.name!r} is {judge.model!r}, which it would judge; name another "
                    "model, or set may_judge_itself"
                )
        return self

    @property
    def has_client_functions(self) -> bool:
        """Whether it may call functions that its client runs, whatever the request brings."""
        return any(isinstance(source, ClientSource) for source in self.tools)

    @property
    def learning(self) -> LearningSpec:
        """What the trainer reads of this file."""
        return LearningSpec(policy=self.policy, reward=self.reward, training=self.training)


def load_agent(path: Path) -> AgentSpec:
    """Read one agent's file. Raises AgentFileError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AgentFileError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise AgentFileError(f"{path}: is a {type(data).__name__}; expected keys such as 'name:'")
    try:
        return AgentSpec.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        raise AgentFileError(_worded(path, error)) from None


def load_agents(folder: Path) -> dict[str, AgentSpec]:
    """Every `*.yaml` and `*.yml` of `folder`, by agent name. Raises AgentFileError."""
    if not folder.is_dir():
        raise AgentFileError(f"{folder}: is not a folder; expected one that holds agents' files")
    agents: dict[str, AgentSpec] = {}
    files: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml")):
        agent = load_agent(path)
        if agent.name in agents:
            raise AgentFileError(
                f"{path}: name: {agent.name!r} is already the name in {files[agent.name]}"
            )
        agents[agent.name] = agent
        files[agent.name] = path
    _check_shared_policies(agents, files)
    return agents


def learning_of(
    agents: Mapping[str, AgentSpec], policy: str, agent: str | None = None
) -> LearningSpec:
    """What counts as reward, and when to train: the agent's word, else its policy's first."""
    if agent is not None and agent in agents:
        return agents[agent].learning
    for spec in agents.values():
        if spec.policy == policy:
            return spec.learning
    return LearningSpec(policy=policy)


def _check_shared_policies(agents: Mapping[str, AgentSpec], files: Mapping[str, Path]) -> None:
    """Agents may share a policy; then they must agree on how it learns, for it learns once, and
    be one tenant's: what it learned from one tenant's episodes may not answer another's."""
    first: dict[str, AgentSpec] = {}
    for agent in agents.values():
        other = first.setdefault(agent.policy, agent)
        if agent.tenant != other.tenant:
            raise AgentFileError(
                f"{files[agent.name]}: tenant: policy {agent.policy!r} is also the policy of "
                f"{files[other.name]}, whose tenant is {other.tenant!r}; name another policy"
            )
        if agent.learning != other.learning:
            raise AgentFileError(
                f"{files[agent.name]}: policy: {agent.policy!r} is also the policy of "
                f"{files[other.name]}, with another `reward` or `training`; make them equal"
            )


def _worded(path: Path, error: ValidationError) -> str:
    lines = []
    for one in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in one["loc"]) or "the file"
        if one["type"] == "extra_forbidden":
            lines.append(f"{path}: {key}: unknown key; check its spelling")
        elif one["type"] == "missing":
            lines.append(f"{path}: {key}: is missing")
        else:
            # These hold secrets, and so may any mapping around them.
            hidden = {"headers", "env", "bind", "secret", "api_key"} & set(
                one["loc"]
            ) or isinstance(one["input"], Mapping)
            got = "" if hidden else f" (got {str(one['input'])[:80]!r})"
            lines.append(f"{path}: {key}: {one['msg']}{got}")
    return "\n".join(lines)
