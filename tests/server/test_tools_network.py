"""The guard at connect time: spellings of addresses, names that move, redirects, proxies."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.tools.arguments import ArgumentCheck
from server.tools.base import CallContext, ToolUnavailable
from server.tools.box import open_toolbox
from server.tools.network import Reach, ReachTransport, Refused, is_public
from server.tools.sources import McpSource, OpenApiSource

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)
NAME = "service.example.com"
PUBLIC = "93.184.216.34"
REFUSED = r"not on the public Internet|not a canonical IPv4|Invalid IPv4"
"""By us; some spellings are no addresses to the clients themselves."""
Served = tuple[int, list[tuple[str, str | None]]]
"""A port, and the path and host of each request to it."""


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1",
        "169.254.169.254", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:7f00:1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::",
        "2002:c0a8:101::1", "2001:0:808:808::80ff:fffe", "2001:0:7f00:1::f7f7:f7f7", "fc00::1",
        "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "100::1",
    ],
)  # fmt: skip
def test_every_spelling_of_what_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    with pytest.raises(Refused, match="not on the public Internet"):
        Reach.of(f"https://{NAME}/", ()).check(address)


@pytest.mark.parametrize(
    ("url", "allow_hosts", "address", "passes"),
    [
        # The owner wrote this very address, and no other.
        ("http://127.0.0.1:9/x", (), "127.0.0.1", True),
        ("http://127.0.0.1:9/x", (), "127.0.0.2", False),
        ("http://127.0.0.1:9/x", (), "::1", False),
        ("http://[::1]:9/x", (), "::1", True),
        ("http://10.1.2.3/", (), "10.1.2.3", True),
        ("http://user@10.1.2.3@evil.example/", (), "10.1.2.3", False),
        # `localhost` is loopback by its name; other names, and numbers in disguise, are not.
        ("http://localhost:9/", (), "127.0.0.1", True),
        ("http://desk.localhost/", (), "::1", True),
        ("http://localhost/", (), "10.0.0.1", False),
        ("http://localhost.example.com/", (), "127.0.0.1", False),
        ("http://0x7f.1/", (), "127.0.0.1", False),
        ("http://2130706433/", (), "127.0.0.1", False),
        ("http://0177.0.0.1/", (), "127.0.0.1", False),
        # A listed host may be anywhere; a listed port is that port alone.
        (f"https://{NAME}/", (NAME,), "10.0.0.1", True),
        (f"https://{NAME.upper()}./", (NAME,), "10.0.0.1", True),
        (f"https://{NAME}/", (f"{NAME}:443",), "10.0.0.1", True),
        (f"https://{NAME}:8443/", (f"{NAME}:443",), "10.0.0.1", False),
        (f"https://sub.{NAME}/", (NAME,), "10.0.0.1", False),
        ("http://[fd00::1]:80/", ("[fd00::1]:80",), "fd00::1", True),
    ],
)
def test_what_the_owner_has_allowed(
    url: str, allow_hosts: tuple[str, ...], address: str, passes: bool
) -> None:
    reach = Reach.of(url, allow_hosts)
    reach.check(PUBLIC)
    if passes:
        reach.check(address)
    else:
        with pytest.raises(Refused):
            reach.check(address)


def test_a_document_s_own_host_is_nobody_s_wish() -> None:
    with pytest.raises(Refused):
        Reach.of("http://127.0.0.1/", (), by_owner=False).check("127.0.0.1")
    with pytest.raises(Refused):
        Reach.of("http://localhost/", (), by_owner=False).check("127.0.0.1")
    Reach.of("http://127.0.0.1/", ("127.0.0.1",), by_owner=False).check("127.0.0.1")


class Rebinding:
    """A resolver that answers with one address after the other, and the last for ever."""

    def __init__(self, name: str, *answers: str) -> None:
        self._name = name
        self._answers = list(answers)
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *others: Any, **named: Any) -> Any:
        if host not in (self._name, self._name.encode()):
            return self._real(host, port, *others, **named)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return self._real(answer, port, *others, **named)


class Service(BaseHTTPRequestHandler):
    """Answers anything, and counts."""

    server: ThreadingHTTPServer
    seen: list[tuple[str, str | None]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        port = self.server.server_port
        document = {
            "openapi": "3.1.0",
            "paths": {"/look": {"get": {"operationId": "look", "summary": "Look."}}},
        }
        body = json.dumps(document if self.path == "/openapi.json" else {"path": self.path})
        moved = self.path == "/moved"
        self.send_response(302 if moved else 200)
        if moved:
            self.send_header("location", f"http://127.0.0.1:{port}/secret")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")  # each call resolves anew
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Served]:
    seen: list[tuple[str, str | None]] = []
    handler = type("Counting", (Service,), {"seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield server.server_address[1], seen
    server.shutdown()
    server.server_close()


async def test_a_name_that_is_bound_to_us_later_is_refused_then(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = service
    # What stands for the public Internet here is loopback, and what is private 127.0.0.2.
    monkeypatch.setattr(
        "server.tools.network.is_public", lambda address: address == ip_address("127.0.0.1")
    )
    monkeypatch.setattr(socket, "getaddrinfo", Rebinding(NAME, "127.0.0.1", "127.0.0.2"))
    box = await open_toolbox([OpenApiSource(openapi=f"http://{NAME}:{port}/openapi.json")])
    assert seen == [("/openapi.json", f"{NAME}:{port}")]
    refused = await box.call("look", {}, CONTEXT)
    assert (refused.status, "allow_hosts" in refused.text) == ("refused", True)
    assert "127.0.0.2" not in refused.text
    assert len(seen) == 1
    await box.aclose()


async def test_the_mcp_client_is_held_to_the_same(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = service
    monkeypatch.setattr(
        "server.tools.network.is_public", lambda address: address == ip_address("127.0.0.1")
    )
    monkeypatch.setattr(socket, "getaddrinfo", Rebinding(NAME, "127.0.0.1", "127.0.0.2"))
    url = f"http://{NAME}:{port}"
    transport = ReachTransport(Reach.of(url, ()))
    async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
        assert (await client.get(f"{url}/one")).json() == {"path": "/one"}
        assert seen == [("/one", f"{NAME}:{port}")]
        with pytest.raises(httpx2.ConnectError, match="allow_hosts"):
            await client.get(f"{url}/two")
    assert len(seen) == 1


@pytest.mark.parametrize("host", ["0x7f.1", "2130706433", "0177.0.0.1", "127.1"])
async def test_loopback_in_disguise_is_not_reached(service: Served, host: str) -> None:
    port, seen = service
    with pytest.raises(ToolUnavailable, match=REFUSED):
        await open_toolbox([OpenApiSource(openapi=f"http://{host}:{port}/openapi.json")])
    with pytest.raises(ToolUnavailable, match=REFUSED):
        await open_toolbox([McpSource(mcp=f"http://{host}:{port}/mcp")])
    assert seen == []


async def test_a_listed_host_is_reached_wherever_it_is(
    service: Served,
) -> None:
    port, _ = service
    source = OpenApiSource(openapi=f"http://0x7f.1:{port}/openapi.json", allow_hosts=("0x7f.1",))
    box = await open_toolbox([source])
    assert (await box.call("look", {}, CONTEXT)).status == "ok"
    await box.aclose()


async def test_a_file_s_servers_and_proxies_of_the_environment_are_not_trusted(
    service: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, seen = service
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    document = {
        "openapi": "3.1.0",
        "servers": [{"url": f"http://127.0.0.1:{port}"}],
        "paths": {"/look": {"get": {"operationId": "look"}}},
    }
    file = tmp_path / "api.json"
    file.write_text(json.dumps(document))
    box = await open_toolbox([OpenApiSource(openapi=str(file))])
    assert (await box.call("look", {}, CONTEXT)).status == "refused"
    await box.aclose()
    # Had the proxy been asked, it would have answered.
    with pytest.raises(ToolUnavailable, match="cannot be resolved"):
        await open_toolbox([McpSource(mcp="http://no-such-host.invalid/mcp")])
    with pytest.raises(ToolUnavailable, match="cannot be read"):
        await open_toolbox([OpenApiSource(openapi="http://no-such-host.invalid/openapi.json")])
    assert seen == []


def test_a_schema_has_nothing_fetched(service: Served) -> None:
    port, seen = service
    remote = {"$ref": f"http://127.0.0.1:{port}/openapi.json"}
    check = ArgumentCheck("look", {"type": "object", "unevaluatedProperties": remote})
    with pytest.raises(Exception, match="Unresolvable"):
        check.complaint({"a": 1})
    assert seen == []


async def test_an_endless_answer_is_cut_off(service: Served) -> None:
    port, _ = service
    url = f"http://127.0.0.1:{port}"
    transport = ReachTransport(Reach.of(url, ()), max_bytes=1000)
    async with httpx2.AsyncClient(transport=transport) as client:
        assert len((await client.get(f"{url}/{'x' * 900}")).content) > 900
        with pytest.raises(httpx2.StreamError, match="more than 1000 bytes"):
            await client.get(f"{url}/{'x' * 1000}")


async def test_redirects_of_an_mcp_server_are_not_followed_elsewhere(
    service: Served,
) -> None:
    port, seen = service
    with pytest.raises(ToolUnavailable, match="Redirect to"):
        await open_toolbox([McpSource(mcp=f"http://localhost:{port}/moved")])
    assert {path for path, _ in seen} == {"/moved"}
