"""An MCP server of ours that does what servers do wrong: `python mcp_house.py [PORT [json]]`.

Over stdio, or over streamable HTTP on a port, in streams of events or plain JSON. Tools named `die`
and `hang_forever` mean it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from pydantic import BaseModel

server = MCPServer("house")


class Place(BaseModel):
    """Referred to by `$ref`."""

    row: int
    shelf: str


@server.tool(name="stock.find", structured_output=False)
def find(place: Place) -> str:
    """What lies at a place."""
    return f"{place.shelf}{place.row}: lamps"


@server.tool()
def count(shelf: str) -> dict[str, int]:
    """How much is on a shelf."""
    return {shelf: 7}


@server.tool(structured_output=False)
def show() -> CallToolResult:
    """Every kind of content."""
    return CallToolResult(
        content=[
            TextContent(text="first"),
            ImageContent(data="aGVsbG8=", mime_type="image/png"),
            AudioContent(data="aGVsbG8h", mime_type="audio/wav"),
            ResourceLink(name="list", uri="file:///list.txt"),
            EmbeddedResource(resource=TextResourceContents(uri="a://b", text="inside")),
            EmbeddedResource(resource=BlobResourceContents(uri="a://c", blob="aGVsbG8=")),
        ]
    )


@server.tool(structured_output=False)
def only_structured() -> CallToolResult:
    return CallToolResult(content=[], structured_content={"a": [1, None]})


@server.tool(structured_output=False)
def refuse() -> str:
    raise ToolError("the shelf is locked")


@server.tool(structured_output=False)
async def hang(seconds: float, note: str = "") -> str:
    """Write `note`, if this is cancelled."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        write(note)
        raise
    return "done"


def write(note: str) -> None:
    if note:
        Path(note).write_text("cancelled")


@server.tool(structured_output=False)
def environment() -> dict[str, Any]:
    return {"names": sorted(os.environ), "key": os.environ.get("HOUSE_KEY"), "cwd": str(Path.cwd())}


@server.tool(structured_output=False)
def complain(text: str, times: int) -> str:
    for _ in range(times):
        print(text, file=sys.stderr, flush=True)
    return "said"


@server.tool(structured_output=False)
def traced(ctx: Context) -> str:
    """Whose trace this call belongs to."""
    return str((ctx.request_context.meta or {}).get("traceparent"))


@server.tool(structured_output=False)
def keyed(ctx: Context) -> str:
    """Under which idempotency key this call is made."""
    return str((ctx.request_context.meta or {}).get("hone/idempotency-key"))


@server.tool(structured_output=False)
async def ask(ctx: Context) -> str:
    """Ask the client's user, who must not be asked."""
    answer = await ctx.elicit("Which row?", Place)
    return answer.action


@server.tool(structured_output=False)
async def learn(name: str, ctx: Context) -> str:
    """Offer one tool more, and tell so."""

    def learnt() -> str:
        return name

    server.add_tool(learnt, name=name, structured_output=False)
    await ctx.notify_tools_changed()
    return "learnt"


@server.tool(structured_output=False)
def flood(characters: int) -> str:
    return "x" * characters


@server.tool(structured_output=False)
def die() -> None:
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        as_json = "json" in sys.argv[2:]
        server.run("streamable-http", port=int(sys.argv[1]), json_response=as_json)
    else:
        server.run("stdio")
