"""The order desk over HTTP: the service that agents work with, and the owner's back door to it.

What an agent may call stands in the OpenAPI document. Seeding tasks and reading final states is the
owner's business: those routes are outside the document and want the owner's key.

    python -m examples.desk.service --port 8400 --database var/desk.db
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from examples.desk.desk import Action, Desk, DeskError, Order, Status

OWNER_KEY_VARIABLE = "DESK_OWNER_KEY"
OrderNumber = Annotated[int, PathParameter(ge=1, le=2**31)]


class OrderRow(BaseModel):
    """An order as anyone at the desk sees it."""

    id: int
    item: str
    status: Status
    days_ago: int
    total: int


class OrderLine(BaseModel):
    """What a list shows of an order."""

    days_ago: int
    id: int


class CustomerRow(BaseModel):
    """A customer."""

    id: int
    name: str


class Done(BaseModel):
    """What was done to the order."""

    done: Action


class SeedOrder(OrderRow):
    """An order as the owner seeds it."""

    locked: bool = False


class Seed(BaseModel):
    """One customer with orders."""

    customer: str
    orders: list[SeedOrder]


def create_service(desk: Desk, owner_key: str) -> FastAPI:
    """The desk as an application; `owner_key` opens the owner's routes.

    Every route is `async` and so runs in the event loop's one thread, as `Desk` requires.
    """
    app = FastAPI(title="Order desk", version="1.0.0", summary="Customers, orders, and their care.")

    @app.exception_handler(DeskError)
    async def refuse(_: Request, error: DeskError) -> JSONResponse:
        return JSONResponse({"detail": error.detail}, status_code=error.status)

    _add_reads(app, desk)
    _add_writes(app, desk)
    _add_owner(app, desk, owner_key)
    return app


def _add_reads(app: FastAPI, desk: Desk) -> None:
    @app.get("/customers/{name}", operation_id="get_customer", response_model=CustomerRow)
    async def get_customer(name: str) -> Any:
        """Look a customer up by name."""
        return desk.customer(name)

    @app.get("/orders", operation_id="find_orders", response_model=list[OrderLine])
    async def find_orders(customer: str, item: str) -> Any:
        """List a customer's orders of one item."""
        return desk.find_orders(customer, item)

    @app.get("/orders/{order}", operation_id="get_order", response_model=OrderRow)
    async def get_order(order: OrderNumber) -> Any:
        """Look at one order."""
        return desk.get_order(order)


def _add_writes(app: FastAPI, desk: Desk) -> None:
    def write(path: str, operation_id: str, kind: Action, summary: str) -> None:
        @app.post(
            f"/orders/{{order}}/{path}",
            operation_id=operation_id,
            summary=summary,
            response_model=Done,
        )
        async def act(order: OrderNumber) -> Any:
            return desk.act(order, kind)

    write("cancellation", "cancel_order", "cancellation", "Cancel an order.")
    write("return", "return_order", "return", "Have an order sent back.")
    write("refund", "refund_order", "refund", "Pay an order's total back.")
    write("approval", "request_approval", "approval", "Ask for approval of a refund.")
    write("ticket", "open_ticket", "ticket", "Hand an order over to a colleague.")


def _add_owner(app: FastAPI, desk: Desk, owner_key: str) -> None:
    def owner(x_owner_key: Annotated[str, Header()] = "") -> None:
        if not secrets.compare_digest(x_owner_key.encode(), owner_key.encode()):
            raise HTTPException(403, "the owner's routes want the header x-owner-key")

    hidden = {"include_in_schema": False, "dependencies": [Depends(owner)]}

    @app.post("/owner/customers", **hidden)  # type: ignore[arg-type] # one dict of mixed options
    async def seed(body: Seed) -> dict[str, str]:
        desk.seed(body.customer, [Order(**row.model_dump()) for row in body.orders])
        return {"customer": body.customer}

    @app.get("/owner/customers/{name}/actions", **hidden)  # type: ignore[arg-type] # as above
    async def actions(name: str) -> dict[str, list[str]]:
        return {str(order): sorted(kinds) for order, kinds in desk.actions(name).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the order desk.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--database", type=Path, default=Path("var/desk.db"))
    options = parser.parse_args()
    owner_key = os.environ.get(OWNER_KEY_VARIABLE)
    if not owner_key:
        parser.error(f"set {OWNER_KEY_VARIABLE}: the owner's routes must not stand open")
    options.database.parent.mkdir(parents=True, exist_ok=True)
    app = create_service(Desk(options.database), owner_key)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,  # clients close idle connections, not we: see server.commands.serve
    )


if __name__ == "__main__":
    main()
