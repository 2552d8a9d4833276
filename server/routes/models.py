"""`/v1/models`: every name that `model` may be, in OpenAI's shape, with what it stands for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.access.caller import CallerOf
from server.errors import NotFound
from server.refusals import refusals
from server.routing import Model
from server.services import Services, ServicesOf

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """The base model, policies, resident versions and agents."""
    data = [_card(model, services) for model in services.routing.models(caller.tenant)]
    return {"object": "list", "data": data}


@router.get("/{model:path}", responses=refusals(NotFound))
async def get_model(model: str, services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """One of them."""
    for known in services.routing.models(caller.tenant):
        if known.id == model:
            return _card(known, services)
    raise NotFound(
        f"model {model[:140]!r} does not exist; GET /v1/models lists those that do",
        code="model_not_found",
        param="model",
    )


def _card(model: Model, services: Services) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": model.id,
        "object": "model",
        "created": int(services.started_at),
        "owned_by": "hone",
        "kind": model.kind,
        "max_model_len": services.engine.max_model_len,
    }
    if model.adapter is not None:
        card["adapter"] = str(model.adapter)
    if model.agent is not None:
        card["runs"] = f"/v1/agents/{model.agent}/runs"
    return card
