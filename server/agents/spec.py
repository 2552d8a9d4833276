"""An agent as its owner writes it: one strict YAML file, read and checked before anything runs.

Declares only. Tools are opened by `server.tools.box`, the run is `server.agents.run`, and reward
and training are obeyed by the trainer, which reads the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from feedback.spec import LearningSpec, RewardSpec, Strict, TrainingSpec
from policy.ownership import DEFAULT_TENANT, TENANT_PATTERN
from server.agents.context import ContextSpec
from server.tools.sources import ToolSource

NAME_PATTERN = r"^[a-z][a-z0-9._-]{0,62}$"


class AgentFileError(ValueError):
    """An agent's file cannot be used; the message names the file, the key and what to do."""


class Limits(Strict):
    """How far one run may go."""

    turns: int = Field(8, ge=1, description="Generations.")
    tokens: int = Field(2048, ge=1, description="Sampled tokens of all turns together.")
    seconds: float = Field(60.0, gt=0, description="Wall clock, tools included.")


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
    limits: Limits = Limits()
    sampling: SamplingSpec = SamplingSpec()
    context: ContextSpec = ContextSpec()
    reward: RewardSpec = RewardSpec()
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
            hidden = {"headers", "env", "bind"} & set(one["loc"]) or isinstance(
                one["input"], Mapping
            )
            got = "" if hidden else f" (got {str(one['input'])[:80]!r})"
            lines.append(f"{path}: {key}: {one['msg']}{got}")
    return "\n".join(lines)
