"""The one table of what each route asks for. A route that is not in it is refused.

Routes are matched by the app's own router, so that no other spelling of a path leads past this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from server.access.caller import SCOPES, Caller, KeyScope
from server.errors import Forbidden


@dataclass(frozen=True, slots=True)
class Needs:
    """What a route asks of its caller."""

    any_of: tuple[KeyScope, ...] = ()
    is_open: bool = False
    """No key is asked for."""
    generates: bool = False
    """It has the engine generate, which counts as tokens and as work at the same time."""
    of_operator: bool = False
    """It concerns all tenants."""

    def check(self, caller: Caller) -> None:
        """Raise Forbidden unless the caller may."""
        if not self.any_of:
            raise Forbidden(
                "this route is nobody's: server/access/scopes.py does not say what it takes",
                code="route_undeclared",
            )
        caller.check(*self.any_of)
        if self.of_operator and not caller.is_operator:
            raise Forbidden(
                "this concerns every tenant; it takes an admin key of the tenant 'default'",
                code="operator_only",
            )


OPEN = Needs(is_open=True)
UNDECLARED = Needs()
"""Of a route that nobody thought of here."""
UNKNOWN = Needs(SCOPES)
"""Of a path or method that no route has: whoever has a key is told so by the router."""

GENERATES = Needs(("inference",), generates=True)
# An agent is a model too, which takes `runs`; whose name it is stands in the body.
CHATS = Needs(("inference", "runs"), generates=True)
USES = Needs(("inference", "runs"))
RUNS = Needs(("runs",))
READS = Needs(("runs", "admin"))
# Whoever runs an agent may not say yes to its calls. Who may sees what they are; an admin could
# make itself such a key.
APPROVES = Needs(("approvals", "admin"))
SEES_RUNS = Needs(("runs", "approvals", "admin"))
ADMIN = Needs(("admin",))

NEEDS: Mapping[str, Needs] = {
    # Probes carry no key, and pages for people cannot; their answers tell nothing of anybody.
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "GET /docs/assets/{path}": OPEN,
    "GET /docs/oauth2-redirect": OPEN,
    # Its sender's signature is its key.
    "POST /v1/webhooks/{source}": OPEN,
    "GET /v1/models": USES,
    "GET /v1/models/{model}": USES,
    "POST /v1/chat/completions": CHATS,
    "POST /v1/completions": GENERATES,
    "POST /v1/responses": CHATS,
    "GET /v1/responses/{response_id}": USES,
    "GET /v1/responses/{response_id}/input_items": USES,
    "DELETE /v1/responses/{response_id}": USES,
    "POST /v1/responses/{response_id}/cancel": USES,
    "GET /v1/agents": RUNS,
    "POST /v1/agents/{name}/runs": Needs(("runs",), generates=True),
    "GET /v1/runs": SEES_RUNS,
    "GET /v1/runs/{run_id}": SEES_RUNS,
    "POST /v1/runs/{run_id}/cancel": RUNS,
    "POST /v1/runs/{run_id}/approvals": APPROVES,
    "POST /v1/runs/{run_id}/tool_outputs": Needs(("runs",), generates=True),
    "GET /v1/episodes": READS,
    "GET /v1/episodes/{episode_id}": READS,
    "POST /v1/episodes/{episode_id}/end": USES,
    "GET /v1/export/episodes": ADMIN,
    "GET /v1/export/feedback": ADMIN,
    "POST /v1/feedback": Needs(("feedback",)),
    "GET /v1/feedback/quarantine": ADMIN,
    "POST /v1/feedback/quarantine/{ruling_id}/release": ADMIN,
    "POST /v1/feedback/quarantine/{ruling_id}/discard": ADMIN,
    "GET /v1/policies": READS,
    "GET /v1/policies/{policy}": READS,
    "POST /v1/policies/{policy}/rollback": ADMIN,
    "POST /v1/policies/{policy}/promote": ADMIN,
    "POST /v1/policies/{policy}/pin": ADMIN,
    "GET /v1/training": READS,
    "POST /v1/training/pauses": Needs(("admin",), of_operator=True),
    "GET /v1/keys": ADMIN,
    "POST /v1/keys": ADMIN,
    "POST /v1/keys/{key_id}/revoke": ADMIN,
    "GET /metrics": Needs(("admin",), of_operator=True),
}


def needs_of(scope: Scope, routes: Callable[[], Sequence[BaseRoute]]) -> Needs:
    """What the route that answers this request asks for."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    for route in routes():
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return NEEDS.get(f"{method} {getattr(route, 'path_format', None)}", UNDECLARED)
    # Middlewares answer on their own paths, whether or not the engine has a route behind them.
    return NEEDS.get(f"{method} {scope['path']}", UNKNOWN)
