"""`/v1/webhooks/{source}`: outcomes that other services post, signed by them; no key is asked for.

Who may send and what a payload means is `feedback.webhooks`'; this says it in HTTP. A sender takes
2xx for done and anything else for "send it again": so what can never change is 200, with a status
that tells, and what an owner can mend is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from typing_extensions import TypedDict

from feedback.events import Receipt
from feedback.webhooks.mapping import Unmappable
from feedback.webhooks.signatures import Refused
from server.errors import (
    BadRequest,
    BodyTooLarge,
    NotFound,
    TooManyRequests,
    Unauthorized,
)
from server.refusals import refusals
from server.services import ServicesOf
from server.wire import PlainJson, ReceiptOut, receipt_json

router = APIRouter(prefix="/v1/webhooks", tags=["feedback"])

logger = logging.getLogger("hone.webhooks")


WebhookStatus = Literal["conflict", "recorded", "duplicate", "ignored"]


class WebhookReceiptOut(TypedDict):
    """What became of one message."""

    object: Literal["webhook.receipt"]
    status: Annotated[
        WebhookStatus,
        Field(
            description="Of its events the most telling one's, in this order; ignored: it says "
            "nothing that the source's file asks for."
        ),
    ]
    data: Annotated[list[ReceiptOut], Field(description="One for each of its events.")]


_RECEIPT: dict[int | str, dict[str, Any]] = {
    200: {"model": WebhookReceiptOut, "description": "Done; the same again changes nothing."}
}
"""For the OpenAPI document."""


@router.post(
    "/{source}",
    responses={**_RECEIPT, **refusals(Unauthorized, NotFound, BodyTooLarge, TooManyRequests)},
)
async def receive_webhook(source: str, request: Request, services: ServicesOf) -> PlainJson:
    """Record what a declared source sends. Acknowledged means on disk, twice is once."""
    webhook = services.webhooks.get(source)
    if webhook is None:
        raise NotFound(f"webhook source {source[:80]!r} does not exist", code="webhook_not_found")
    body = await request.body()
    if len(body) > webhook.spec.max_body_bytes:
        raise BodyTooLarge(
            f"the body is larger than {webhook.spec.max_body_bytes} bytes; send less"
        )
    try:
        said = webhook.receive(request.headers.raw, body, now=time.time())
    except Unmappable as error:
        logger.warning("%s: a signed message gives no event: %s", source, error)
        raise BadRequest(str(error), code="invalid_payload", param=error.param) from error
    if isinstance(said, Refused):
        logger.warning("%s: refused, %s: %s", source, said.reason, said.detail)
        raise Unauthorized(said.detail, code="invalid_signature")
    await services.limits.take(webhook.spec.tenant, webhook.source, len(said))
    receipts = await services.log.add_feedback(said) if said else []
    told = [receipt_json(receipt) for receipt in receipts]
    return PlainJson(
        WebhookReceiptOut(object="webhook.receipt", status=_status(receipts), data=told)
    )


def _status(receipts: Sequence[Receipt]) -> WebhookStatus:
    """The most telling of the events' statuses."""
    statuses = {receipt.status for receipt in receipts}
    telling: tuple[WebhookStatus, ...] = ("conflict", "recorded", "duplicate")
    return next((status for status in telling if status in statuses), "ignored")
