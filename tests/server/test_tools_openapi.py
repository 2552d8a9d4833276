"""OpenAPI tools against a real HTTP service, well-behaved and not."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, SecretStr

from server.tools.base import CallContext, ToolUnavailable
from server.tools.box import ToolBox, open_toolbox
from server.tools.openapi_document import read_operations
from server.tools.sources import OpenApiSource

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)


class Refund(BaseModel):
    order_id: int
    """Collides with the path's."""
    cents: int
    note: str | None = None


class Node(BaseModel):
    """Refers to itself."""

    name: str
    children: list[Node] = []


class Remembering:
    """Plain ASGI: keeps the scope of each request."""

    def __init__(self, app: Any, seen: list[dict[str, Any]]) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._seen.append(scope)
        await self._app(scope, receive, send)


def build_service(seen: list[dict[str, Any]]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Remembering, seen=seen)

    @app.get("/orders", operation_id="list_orders", description="Orders of a customer.")
    def list_orders(
        customer: str, state: Annotated[list[str] | None, Query()] = None, limit: int = 10
    ) -> Any:
        return {"customer": customer, "limit": limit, "state": state, "name": "Zoë🙂"}

    @app.post("/orders/{order_id}/refunds", operation_id="refund.create", status_code=201)
    def refund(order_id: int, body: Refund, x_reason: str = Header()) -> Any:
        if body.cents > 5000:
            raise HTTPException(409, "approval needed above 5000")
        return {"path": order_id, "body": body.model_dump(), "reason": x_reason}

    @app.get("/files/{name}", operation_id="file")
    def file(name: str) -> Any:
        return {"name": name}

    @app.post("/tree", operation_id="tree")
    def tree(node: Node) -> Any:
        return node

    @app.post("/tags", operation_id="tags")
    def tags(values: list[str]) -> Any:
        return values

    @app.delete("/orders/{order_id}", operation_id="forget", status_code=204)
    def forget(order_id: int) -> None:
        return None

    @app.get("/secret", operation_id="secret")
    def secret(request: Request) -> Any:
        return {"ok": request.headers.get("authorization") == "Bearer s3cret"}

    @app.get("/hang", operation_id="hang")
    async def hang() -> None:
        await asyncio.sleep(600)

    @app.get("/broken", operation_id="broken")
    def broken() -> None:
        raise RuntimeError("boom")

    @app.get("/garbage", operation_id="garbage")
    def garbage() -> Response:
        return Response(b"{not json", media_type="application/json")

    @app.get("/binary", operation_id="binary")
    def binary() -> Response:
        return Response(b"\x89PNG\xff\xfe\x00", media_type="image/png")

    @app.get("/surrogate", operation_id="surrogate")
    def surrogate() -> Response:
        return Response(b'{"a":"\\ud800\\u0000"}', media_type="application/json")

    @app.get("/deep", operation_id="deep")
    def deep() -> Response:
        return Response(b"[" * 200_000, media_type="application/json")

    @app.get("/huge", operation_id="huge")
    def huge() -> Response:
        return StreamingResponse(itertools.repeat(b"x" * 65536), media_type="text/plain")

    @app.get("/redirect", operation_id="redirect")
    def redirect() -> Response:
        return Response(status_code=302, headers={"location": "/secret"})

    return app


def serve(
    app: FastAPI, listener: socket.socket | None = None
) -> tuple[uvicorn.Server, threading.Thread, str]:
    sock = listener or socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def url(seen: list[dict[str, Any]]) -> Iterator[str]:
    server, thread, address = serve(build_service(seen))
    yield address
    server.should_exit = server.force_exit = True
    thread.join(5)


@pytest.fixture
async def box(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ToolBox]:
    monkeypatch.setenv("DESK_TOKEN", "s3cret")
    source = OpenApiSource(
        openapi=f"{url}/openapi.json",
        headers={"Authorization": SecretStr("Bearer ${env:DESK_TOKEN}")},
        timeout_seconds=20,
        max_result_chars=400,
    )
    opened = await open_toolbox([source])
    yield opened
    await opened.aclose()


async def call(box: ToolBox, name: str, /, **arguments: Any) -> tuple[str, Any]:
    result = await box.call(name, arguments, CONTEXT)
    try:
        return result.status, json.loads(result.text)
    except ValueError:
        return result.status, result.text


async def test_a_collision_keeps_both_arguments_apart(box: ToolBox) -> None:
    definition = next(d for d in box.definitions if d["function"]["name"] == "refund_create")
    parameters = definition["function"]["parameters"]
    assert list(parameters["properties"]) == [
        "order_id",
        "x-reason",
        "body_order_id",
        "cents",
        "note",
    ]
    assert parameters["required"] == ["order_id", "x-reason", "body_order_id", "cents"]
    assert "$ref" not in json.dumps(parameters)

    arguments = {"order_id": 7, "x-reason": "late", "body_order_id": 8, "cents": 100}
    assert await call(box, "refund_create", **arguments) == (
        "ok",
        {"path": 7, "body": {"order_id": 8, "cents": 100, "note": None}, "reason": "late"},
    )


async def test_the_model_reads_compact_json_without_escapes(box: ToolBox) -> None:
    result = await box.call(
        "list_orders", {"customer": "Ann & Bö/1", "state": ["new", "b&c"]}, CONTEXT
    )
    assert (
        result.text == '{"customer":"Ann & Bö/1","limit":10,"state":["new","b&c"],"name":"Zoë🙂"}'
    )


async def test_a_service_s_refusal_is_shown_with_its_status(box: ToolBox) -> None:
    arguments = {"order_id": 7, "x-reason": "late", "body_order_id": 7, "cents": 9000}
    result = await box.call("refund_create", arguments, CONTEXT)
    assert result.status == "error"
    assert result.text == '{"error":409,"detail":"approval needed above 5000"}'


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("list_orders", {}, "'customer' is a required property"),
        ("list_orders", {"customer": 5}, "customer: 5 is not of type 'string'"),
        ("list_orders", {"customer": "a", "colour": "red"}, "'colour' was unexpected"),
        ("no_such_tool", {}, "the tools are: list_orders,"),
        ("file", {"name": ".."}, "cannot stand in a path"),
        ("file", {"name": ""}, "cannot stand in a path"),
    ],
)
async def test_wrong_calls_never_reach_the_service(
    box: ToolBox, seen: list[dict[str, Any]], name: str, arguments: dict[str, Any], said: str
) -> None:
    before = len(seen)
    status, answer = await call(box, name, **arguments)
    assert (status, answer["error"]) == ("invalid", "invalid")
    assert said in answer["detail"]
    assert len(seen) == before


async def test_a_path_argument_cannot_leave_its_place(
    box: ToolBox, seen: list[dict[str, Any]]
) -> None:
    status, _ = await call(box, "file", name="../secret?x=1#y")
    assert status == "error"  # FastAPI has no such file route: 404
    assert seen[-1]["raw_path"] == b"/files/..%2Fsecret%3Fx%3D1%23y"


async def test_every_misbehaviour_is_a_result(box: ToolBox) -> None:
    assert await call(box, "broken") == ("error", {"error": 500, "detail": "Internal Server Error"})
    status, answer = await call(box, "garbage")
    assert (status, answer["error"]) == ("error", "unreadable")
    assert "{not json" in answer["detail"]
    assert "7 bytes of image/png" in (await call(box, "binary"))[1]["detail"]
    assert await call(box, "surrogate") == ("ok", {"a": "?\0"})
    assert (await call(box, "deep"))[0] == "error"
    status, answer = await call(box, "redirect")
    assert (status, answer["error"]) == ("error", 302)
    assert await call(box, "forget", order_id=1) == ("ok", {"status": 204})


async def test_a_service_that_hangs_is_given_up(url: str) -> None:
    source = OpenApiSource(openapi=f"{url}/openapi.json", timeout_seconds=2)
    box = await open_toolbox([source])
    started = time.perf_counter()
    status, answer = await call(box, "hang")
    assert (status, answer["error"]) == ("timeout", "timeout")
    assert 1.9 <= time.perf_counter() - started < 20
    # The connection that hung is not given to the next call.
    assert (await call(box, "file", name="a"))[0] == "ok"
    await box.aclose()


async def test_an_endless_answer_is_cut(box: ToolBox) -> None:
    result = await box.call("huge", {}, CONTEXT)
    assert result.status == "ok"
    assert result.text.startswith("x" * 400 + "… [cut: 400 of ")
    assert len(result.text) < 460


async def test_bodies_that_are_no_plain_object_or_recur(box: ToolBox) -> None:
    assert await call(box, "tags", body=["a", "b"]) == ("ok", ["a", "b"])
    node = {"name": "a", "children": [{"name": "b", "children": []}]}
    assert await call(box, "tree", **node) == ("ok", node)


async def test_secrets_come_from_the_environment_or_a_file_and_are_not_printed(
    box: ToolBox, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await call(box, "secret") == ("ok", {"ok": True})
    source = OpenApiSource(openapi=url, headers={"Authorization": SecretStr("Bearer s3cret")})
    assert "s3cret" not in repr(source)
    monkeypatch.delenv("DESK_TOKEN")
    unset = OpenApiSource(openapi=url, headers={"X": SecretStr("${env:DESK_TOKEN}")})
    with pytest.raises(ToolUnavailable, match="'DESK_TOKEN' is not set"):
        await open_toolbox([unset])
    absent = OpenApiSource(openapi=url, headers={"X": SecretStr("${file:/no/such/file}")})
    with pytest.raises(ToolUnavailable, match="'/no/such/file' cannot be read"):
        await open_toolbox([absent])
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    headers = {"Authorization": SecretStr(f"Bearer ${{file:{file}}}")}
    opened = await open_toolbox([OpenApiSource(openapi=f"{url}/openapi.json", headers=headers)])
    assert await call(opened, "secret") == ("ok", {"ok": True})
    await opened.aclose()


async def test_calls_run_side_by_side_over_kept_connections(
    box: ToolBox, seen: list[dict[str, Any]]
) -> None:
    before = len(seen)
    results = await asyncio.gather(*(call(box, "list_orders", customer=str(i)) for i in range(200)))
    assert [answer["customer"] for _, answer in results] == [str(i) for i in range(200)]
    ports = {scope["client"][1] for scope in seen[before:]}
    assert len(seen) - before == 200
    assert len(ports) <= 128


async def test_only_allowed_operations_exist(url: str) -> None:
    box = await open_toolbox(
        [OpenApiSource(openapi=f"{url}/openapi.json", operations=("list_orders", "file"))]
    )
    assert box.names == ("list_orders", "file")
    assert (await call(box, "secret"))[0] == "invalid"
    await box.aclose()
    with pytest.raises(ToolUnavailable, match=r"\['lst_orders'\].*'list_orders'"):
        await open_toolbox(
            [OpenApiSource(openapi=f"{url}/openapi.json", operations=("lst_orders",))]
        )


async def test_a_document_cannot_send_calls_and_secrets_elsewhere(tmp_path: Path) -> None:
    document = {
        "openapi": "3.1.0",
        "info": {},
        "servers": [{"url": "http://169.254.169.254/"}],
        "paths": {},
    }
    app = FastAPI(openapi_url=None)
    app.get("/doc.json")(lambda: document)
    app.get("/moved.json")(lambda: Response(status_code=307, headers={"location": "/doc.json"}))
    server, thread, url = serve(app)
    try:
        with pytest.raises(ToolUnavailable, match="another host"):
            await open_toolbox([OpenApiSource(openapi=f"{url}/doc.json")])
        with pytest.raises(ToolUnavailable, match="status 307"):
            await open_toolbox([OpenApiSource(openapi=f"{url}/moved.json")])
        with pytest.raises(ToolUnavailable, match="status 404"):
            await open_toolbox([OpenApiSource(openapi=f"{url}/none.json")])
    finally:
        server.should_exit = True
        thread.join(5)
    with pytest.raises(ToolUnavailable, match="start the service first"):
        await open_toolbox([OpenApiSource(openapi=f"{url}/doc.json")])
    file = tmp_path / "api.json"
    file.write_text(json.dumps({**document, "servers": []}))
    with pytest.raises(ToolUnavailable, match="set `base_url`"):
        await open_toolbox([OpenApiSource(openapi=str(file))])
    with pytest.raises(ToolUnavailable, match="does not start with '/'"):
        read_operations({**document, "paths": {"@elsewhere/x": {"get": {}}}})


def test_openapi_3_0_is_read_in_json_schema_s_words() -> None:
    document = {
        "openapi": "3.0.3",
        "paths": {
            "/a/{id}": {
                "parameters": [{"$ref": "#/components/parameters/Id"}],
                "get": {"summary": "Read."},
                "put": {
                    "operationId": "a/put",
                    "requestBody": {
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/A"}}
                        }
                    },
                },
                "post": {
                    "operationId": "a put",
                    "requestBody": {"required": True, "content": {"application/xml": {}}},
                },
            }
        },
        "components": {
            "parameters": {
                "Id": {"in": "path", "name": "id", "schema": {"type": "integer"}, "example": 3}
            },
            "schemas": {
                "A": {
                    "type": "object",
                    "properties": {
                        "title": {"type": "string", "nullable": True, "title": "Title"},
                        "size": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
                    },
                    "required": ["title"],
                }
            },
        },
    }
    operations, skipped = read_operations(document)
    assert [operation.spec.name for operation in operations] == ["get_a_id", "a_put"]
    assert skipped == ["operation 'a put' is left out: its body is neither JSON nor a form"]
    assert operations[1].spec.parameters["properties"] == {
        "id": {"type": "integer"},
        "title": {"type": ["string", "null"]},
        "size": {"type": "number", "exclusiveMinimum": 0},
    }
    # The body as a whole is optional, so its own required property is too.
    assert operations[1].spec.parameters["required"] == ["id"]
    with pytest.raises(ToolUnavailable, match="neither JSON nor a form"):
        read_operations(document, ["a put"])
    with pytest.raises(ToolUnavailable, match=r"expected version 3\.0 or 3\.1"):
        read_operations({"swagger": "2.0"})
