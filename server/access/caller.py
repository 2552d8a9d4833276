"""Who is asking: a tenant, by a key, with scopes. Set once a request, read wherever it matters."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastapi import Depends, Request

from policy.ownership import DEFAULT_TENANT
from server.errors import Forbidden

KeyScope = Literal["inference", "runs", "approvals", "feedback", "admin"]
"""inference: models generate; runs: agents run, and what they did is read; approvals: calls of runs
are approved; feedback: outcomes are told; admin: releases and keys. None contains another."""
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
USUAL_SCOPES: tuple[KeyScope, ...] = ("inference", "runs", "feedback")
"""What a key has of which nothing is said: neither admin, nor leave to approve what it runs."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request."""

    tenant: str
    key_id: str
    scopes: tuple[KeyScope, ...]
    is_limited: bool = True
    """Whether rate limits hold for it."""

    @property
    def is_operator(self) -> bool:
        """Whether it looks after the server, and so after every tenant's keys."""
        return self.tenant == DEFAULT_TENANT and "admin" in self.scopes

    def check(self, *needed: KeyScope) -> None:
        """Raise Forbidden unless it has one of these scopes."""
        if not any(scope in self.scopes for scope in needed):
            names = " or ".join(repr(scope) for scope in sorted(needed))
            raise Forbidden(
                f"key {self.key_id!r} has scopes {sorted(self.scopes)}; this takes {names}",
                code="insufficient_scope",
                headers={"www-authenticate": 'Bearer error="insufficient_scope"'},
            )


BOOTSTRAP = Caller(DEFAULT_TENANT, "bootstrap", SCOPES, is_limited=False)
"""Who has the key of the settings. It is not limited: the trainer's held-out tasks come with it."""
ANONYMOUS = Caller(DEFAULT_TENANT, "anonymous", SCOPES)
"""Who has none, where none is asked for: on loopback, without a key in the settings."""

current: ContextVar[Caller | None] = ContextVar("hone_caller", default=None)
"""The caller whose request this task, or the one that started it, serves."""


def get_caller(request: Request) -> Caller:
    """The caller of this request, for a route."""
    caller = request.state.caller
    assert isinstance(caller, Caller)  # noqa: S101 - the gate lets nobody else through
    return caller


CallerOf = Annotated[Caller, Depends(get_caller)]
