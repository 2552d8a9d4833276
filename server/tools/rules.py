"""What an owner decides over a model's head: arguments that are fixed, and limits on the others.

The same for every kind of tool. A rule that cannot be kept makes the tool unavailable: one that is
silently without effect would be worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.tools.arguments import ArgumentCheck
from server.tools.base import CallContext, Tool, ToolResult, ToolSpec, ToolUnavailable, fault
from server.tools.sources import Source, interpolate


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one source, by the names of its tools."""

    bind: Mapping[str, Mapping[str, Any]]
    constrain: Mapping[str, Mapping[str, Any]]
    idempotent: bool | Sequence[str] = ()
    """Names beside those whose kind tells so; or whether all are."""
    approval: Collection[str] = ()
    """Tools whose calls a person must approve."""
    keyed: Collection[str] = ()
    """Tools that take an idempotency key."""

    @classmethod
    def of(cls, source: Source) -> Rules:
        """Raises ToolUnavailable for a variable that is not set."""
        return cls(
            _filled(source.bind),
            source.constrain,
            source.idempotent,
            source.approval,
            source.idempotency,
        )

    def over(self, tools: Sequence[Tool]) -> list[Tool]:
        """`tools` under these rules. Raises ToolUnavailable for a rule about no tool, and for one
        that cannot be kept."""
        self._check_names(tools)
        return [self._over(tool) for tool in tools]

    def _check_names(self, tools: Sequence[Tool]) -> None:
        names = {tool.spec.name for tool in tools}
        repeated = () if isinstance(self.idempotent, bool) else self.idempotent
        ruled = {*self.bind, *self.constrain, *repeated, *self.approval, *self.keyed}
        if missing := sorted(ruled - names):
            raise ToolUnavailable(
                "`bind`, `constrain`, `idempotent`, `approval` or `idempotency` names "
                f"{missing!r}, which is no tool of this source; its tools are {sorted(names)!r}"
            )

    def _over(self, tool: Tool) -> Tool:
        name = tool.spec.name
        constants, constraint = self.bind.get(name, {}), self.constrain.get(name)
        spec = replace(
            tool.spec,
            idempotent=self._repeatable(tool.spec),
            needs_approval=name in self.approval,
            takes_key=name in self.keyed,
        )
        if not (constants or constraint or spec != tool.spec):
            return tool
        return RuledTool(tool, constants, constraint, spec)

    def _repeatable(self, spec: ToolSpec) -> bool:
        """What the owner says goes before what a service says of itself."""
        if isinstance(self.idempotent, bool):
            return self.idempotent
        return spec.idempotent or spec.name in self.idempotent


class RuledTool:
    """A tool that the model may call within its owner's rules."""

    def __init__(
        self,
        tool: Tool,
        constants: Mapping[str, Any],
        constraint: Mapping[str, Any] | None,
        spec: ToolSpec,
    ) -> None:
        """`spec`: the tool's own, with what its owner says of repeats, approval and keys."""
        left = _without(spec.name, spec.parameters, constants)
        self.spec = replace(spec, parameters=left)
        self.timeout_seconds = tool.timeout_seconds
        self.max_result_chars = tool.max_result_chars
        self._tool = tool
        self._constants = constants
        self._constraint = ArgumentCheck(spec.name, constraint or {})

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        if taken := sorted(self._constants.keys() & arguments.keys()):
            return fault("refused", f"not yours to set: {', '.join(taken)}")
        complaint = self._constraint.complaint(arguments)
        if complaint is not None:
            return fault("refused", f"not allowed: {complaint}")
        return await self._tool.call({**arguments, **self._constants}, context)

    async def aclose(self) -> None:
        await self._tool.aclose()


def _without(
    tool: str, schema: Mapping[str, Any], constants: Mapping[str, Any]
) -> Mapping[str, Any]:
    """`schema` of the arguments that are left to the model."""
    properties = schema.get("properties", {})
    for name, value in constants.items():
        if name not in properties:
            raise ToolUnavailable(
                f"tool {tool!r}: `bind` names the argument {name!r}, which it does not have; it "
                f"has {sorted(properties)!r}"
            )
        # Not quoted: it may be a secret.
        if ArgumentCheck(tool, {"properties": {name: properties[name]}}).complaint({name: value}):
            raise ToolUnavailable(
                f"tool {tool!r}: the value that `bind` gives {name!r} is not what its schema "
                f"expects: {json.dumps(properties[name])[:300]}"
            )
    left = {
        **schema,
        "properties": {key: value for key, value in properties.items() if key not in constants},
        "required": [name for name in schema.get("required", ()) if name not in constants],
    }
    others = json.dumps({k: v for k, v in left.items() if k not in ("properties", "required")})
    if mentioned := [name for name in constants if json.dumps(name) in others]:
        raise ToolUnavailable(
            f"tool {tool!r}: {mentioned!r} cannot be bound, because its schema makes other "
            "arguments depend on it; constrain it to the value with `constrain`"
        )
    return left


def _filled(value: Any) -> Any:
    """`value` with the variables in its strings."""
    if isinstance(value, str):
        return interpolate(value)
    if isinstance(value, Mapping):
        return {key: _filled(part) for key, part in value.items()}
    return [_filled(part) for part in value] if isinstance(value, list) else value
