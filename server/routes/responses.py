"""`/v1/responses/{id}`: responses that are still kept. They are made under `server.plain_http`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.access.caller import CallerOf
from server.errors import BadRequest, NotFound
from server.refusals import refusals
from server.services import ServicesOf

router = APIRouter(prefix="/v1/responses", tags=["responses"], responses=refusals(NotFound))


@router.get("/{response_id}")
async def get_response(response_id: str, services: ServicesOf, caller: CallerOf) -> dict[str, Any]:
    """A response as it was answered."""
    return dict(services.responses.get(response_id, caller.tenant).response)


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str, services: ServicesOf, caller: CallerOf
) -> dict[str, Any]:
    """The conversation that it answered, in order."""
    stored = services.responses.get(response_id, caller.tenant)
    items = [
        {"type": "message", "id": f"item_{index}", **item}
        for index, item in enumerate(stored.items)
    ]
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
    return {"object": "list", "data": items, "has_more": False, **ends}


@router.delete("/{response_id}")
async def delete_response(
    response_id: str, services: ServicesOf, caller: CallerOf
) -> dict[str, Any]:
    """Forget it; its turn stays in the record."""
    services.responses.delete(response_id, caller.tenant)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/{response_id}/cancel")
async def cancel_response(
    response_id: str, services: ServicesOf, caller: CallerOf
) -> dict[str, Any]:
    """Refused: a response is kept when it has ended, and none runs in the background."""
    services.responses.get(response_id, caller.tenant)
    raise BadRequest(
        f"response {response_id[:140]!r} has ended; only a background response can be cancelled. "
        "To cut a stream off, close its connection",
        code="response_not_cancellable",
        param="response_id",
    )
