"""`/v1/responses/{id}`: responses that are still kept. They are made under `server.plain_http`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field
from typing_extensions import TypedDict

from server.access.caller import CallerOf
from server.errors import BadRequest, NotFound
from server.openai_shapes import ResponseOut
from server.refusals import refusals
from server.services import ServicesOf
from server.wire import BodyOut, PlainJson

router = APIRouter(prefix="/v1/responses", tags=["responses"], responses=refusals(NotFound))


class InputItemsOut(TypedDict):
    """A conversation, as items of the Responses API."""

    object: Literal["list"]
    data: Annotated[
        list[dict[str, Any]],
        Field(
            min_length=1, description="As they were sent or answered, each with `type` and `id`."
        ),
    ]
    has_more: Annotated[Literal[False], Field(description="All of them are here.")]
    first_id: Annotated[str, Field(description="Of the first item.")]
    last_id: Annotated[str, Field(description="Of the last item.")]


class DeletedResponseOut(BodyOut):
    """That a response is forgotten."""

    id: str = Field(description="The response's.")
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"model": ResponseOut, "description": "The response."}
}
_ITEMS: dict[int | str, dict[str, Any]] = {
    200: {"model": InputItemsOut, "description": "The conversation."}
}
"""For the OpenAPI document."""


@router.get("/{response_id}", responses=_RESPONSE)
async def get_response(response_id: str, services: ServicesOf, caller: CallerOf) -> PlainJson:
    """A response as it was answered."""
    return PlainJson(services.responses.get(response_id, caller.tenant).response)


@router.get("/{response_id}/input_items", responses=_ITEMS)
async def list_input_items(response_id: str, services: ServicesOf, caller: CallerOf) -> PlainJson:
    """The conversation that it answered, in order."""
    stored = services.responses.get(response_id, caller.tenant)
    items = [
        {"type": "message", "id": f"item_{index}", **item}
        for index, item in enumerate(stored.items)
    ]
    shown: InputItemsOut = {
        "object": "list",
        "data": items,
        "has_more": False,
        "first_id": items[0]["id"],
        "last_id": items[-1]["id"],
    }
    return PlainJson(shown)


@router.delete("/{response_id}")
async def delete_response(
    response_id: str, services: ServicesOf, caller: CallerOf
) -> DeletedResponseOut:
    """Forget it; its turn stays in the record."""
    services.responses.delete(response_id, caller.tenant)
    return DeletedResponseOut(id=response_id)


@router.post("/{response_id}/cancel", status_code=400, responses=refusals(BadRequest))
async def cancel_response(response_id: str, services: ServicesOf, caller: CallerOf) -> Response:
    """Refused: a response is kept when it has ended, and none runs in the background."""
    services.responses.get(response_id, caller.tenant)
    raise BadRequest(
        f"response {response_id[:140]!r} has ended; only a background response can be cancelled. "
        "To cut a stream off, close its connection",
        code="response_not_cancellable",
        param="response_id",
    )
