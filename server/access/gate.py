"""Before every request: who asks, whether its route lets them, and whether they have had enough.

Plain ASGI, so that streams are not buffered. It knows no tenant's objects: routes ask for the
caller and look only among its own.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from policy.ownership import TENANT_PATTERN
from server.access.caller import ANONYMOUS, BOOTSTRAP, Caller, current
from server.access.keys import KeyRing, is_ours
from server.access.limits import Limits, headers_of
from server.access.scopes import needs_of
from server.errors import FORESEEN, Forbidden, Unauthorized, as_api_error, error_response
from server.telemetry.logs import log_also

TENANT_HEADER = "x-hone-tenant"
"""For whom the operator acts, if not for its own tenant."""
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Access:
    """What the gate needs, once the server has started."""

    ring: KeyRing
    limits: Limits


class Gate:
    """Middleware that no request passes unasked but for the open routes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        routes: Callable[[], Sequence[BaseRoute]],
        access: Callable[[], Access],
    ) -> None:
        """`key`: of the settings; without it, whoever shows none is the operator."""
        self._app = app
        self._key = None if key is None else key.encode()
        self._routes = routes
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        needs = needs_of(scope, self._routes)
        if needs.is_open:
            await self._app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                headers = Headers(scope=scope)
                caller = _acting(await self._identify(headers), headers.get(TENANT_HEADER))
                needs.check(caller)
                limits = self._access().limits
                standings = await limits.admit(caller, generates=needs.generates)
                if needs.generates:
                    stack.enter_context(limits.running(caller))
            except FORESEEN as error:
                await error_response(as_api_error(error))(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
            log_also(tenant=caller.tenant, key=caller.key_id)
            current.set(caller)
            await self._app(scope, receive, _telling(send, headers_of(standings)))

    async def _identify(self, headers: Headers) -> Caller:
        given = headers.get("authorization", "")
        token = given[len(_BEARER) :].strip() if given.lower().startswith(_BEARER) else ""
        if self._key is not None and hmac.compare_digest(token.encode(), self._key):
            return BOOTSTRAP
        if is_ours(token):
            caller = await self._access().ring.caller(token)
            if caller is not None:
                return caller
        elif self._key is None:
            return ANONYMOUS
        raise Unauthorized(
            "the API key is missing, wrong, expired or revoked; send 'Authorization: Bearer KEY'",
            headers={"www-authenticate": "Bearer"},
        )


def _acting(caller: Caller, tenant: str | None) -> Caller:
    """The caller for whom this one acts. Raises Forbidden unless it may."""
    if tenant is None or tenant == caller.tenant:
        return caller
    if caller.is_operator and re.fullmatch(TENANT_PATTERN, tenant):
        return replace(caller, tenant=tenant)
    raise Forbidden(
        f"{TENANT_HEADER} is {tenant[:80]!r}, and this key acts for {caller.tenant!r}",
        code="foreign_tenant",
    )


def _telling(send: Send, headers: dict[str, str]) -> Send:
    if not headers:
        return send

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return telling
