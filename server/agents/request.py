"""What a run begins with: an agent whose tools are open, and what is asked of it.

Data only. How the run goes on from it is `server.agents.progress`; what HTTP makes a request of is
the routes'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback.types import Episode, Purpose
from policy.types import AdapterRef
from server.agents.calls import Tools
from server.agents.spec import AgentSpec


@dataclass(frozen=True, slots=True)
class Agent:
    """A declared agent with its tools open."""

    spec: AgentSpec
    toolbox: Tools


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What is asked of an agent."""

    messages: Sequence[Mapping[str, Any]]
    """OpenAI's shape; the agent's system prompt comes before them."""
    episode_id: str
    task_key: str
    purpose: Purpose = "live"
    metadata: Mapping[str, str] = field(default_factory=dict)
    tenant: str = "default"
    stream: bool = False
    """Whether TextDelta events are wanted."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the client runs, in OpenAI's shape."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What the run needs of it to go on without its client."""
        return {"messages": list(self.messages), "tools": list(self.tools)}

    def episode(self, agent: AgentSpec, adapter: AdapterRef) -> Episode:
        """The episode that begins with it."""
        return Episode(
            id=self.episode_id,
            policy=adapter.policy,
            version=adapter.version,
            task_key=self.task_key,
            started_at=time.time(),
            tenant=self.tenant,
            agent=agent.name,
            purpose=self.purpose,
            temperature=agent.sampling.temperature,
            metadata=self.metadata,
        )


def opening(agent: AgentSpec, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What stands before the policy's first turn."""
    system = [{"role": "system", "content": agent.system}] if agent.system is not None else []
    return [*system, *messages]
