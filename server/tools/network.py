"""Where a tool's requests may go: judged on the address that is connected to, not on its name.

A name can be spelt in many ways and resolve to another address each time, so every connection is
checked after resolution, for both HTTP clients that tools use. Which URLs are called is theirs.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx2

Address = IPv4Address | IPv6Address

_log = logging.getLogger("hone.tools")

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


class Refused(OSError):
    """A connection that the owner has not allowed."""

    def __init__(self, message: str) -> None:
        # An errno and a text: aiohttp shows nothing of an OSError that has no more than a text.
        super().__init__(errno.EACCES, message)
        self.message = message


def is_public(address: Address) -> bool:
    """Whether `address`, and any IPv4 address inside it, is one of the public Internet."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    inside = _embedded(address)
    if address.ipv4_mapped is not None or address in _NAT64:
        return all(map(is_public, inside))
    return address.is_global and address in _GLOBAL_UNICAST and all(map(is_public, inside))


def _embedded(address: IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses that a translator or tunnel would make of `address`."""
    if address in _NAT64:
        return [IPv4Address(int(address) & 0xFFFF_FFFF)]
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    return [part for part in found if part is not None]


@dataclass(frozen=True, slots=True)
class Reach:
    """What connections to one host may reach; the public Internet always."""

    host: str
    anything: bool = False
    """The owner listed the host: whatever it resolves to is meant."""
    address: Address | None = None
    """The owner wrote this very address."""
    loopback: bool = False
    """The owner wrote `localhost`."""

    @classmethod
    def of(cls, url: str, allow_hosts: Sequence[str], *, by_owner: bool = True) -> Reach:
        """For requests to the host of `url`; `by_owner`: the owner wrote it, not a document."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        literal = host if ":" not in host else f"[{host}]"
        listed = {entry.lower() for entry in allow_hosts}
        return cls(
            host,
            anything=not listed.isdisjoint({host, literal, f"{literal}:{port}"}),
            address=_literal(host) if by_owner else None,
            loopback=by_owner and (host == "localhost" or host.endswith(".localhost")),
        )

    def check(self, text: str) -> None:
        """Raises Refused if the address `text` is beyond reach."""
        address = ip_address(text)
        if self.anything or address == self.address or is_public(address):
            return
        if self.loopback and address.is_loopback:
            return
        _log.warning("refused to connect to %r: it is %s here", self.host, text)
        # Without the address: a model may read it, and aiohttp merges only equal messages.
        raise Refused(
            f"{self.host!r} is not on the public Internet; if it is meant, list it under the "
            "tool's `allow_hosts`"
        )

    def socket(self, info: tuple[Any, Any, int, str, Any]) -> socket.socket:
        """aiohttp's `socket_factory`: the last word before a connection."""
        family, kind, protocol, _, address = info
        self.check(address[0])
        return socket.socket(family, kind, protocol)


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:  # a name, or a spelling that only the resolver reads, such as 0x7f.1
        return None


class ReachTransport(httpx2.AsyncHTTPTransport):
    """Resolves each request's host itself and connects to an address that was checked.

    Answers are read up to `max_bytes`; streams of events have a limit on each event, the SDK's.
    """

    def __init__(self, reach: Reach, *, max_bytes: int = 16 * 2**20) -> None:
        # Servers drop idle connections after about 5 s; see `server.tools.openapi`.
        super().__init__(limits=httpx2.Limits(keepalive_expiry=2.0))
        self._reach = reach
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        failure: Exception = httpx2.ConnectError("the host resolves to no address")
        for address in await self._addresses(request):
            try:
                self._reach.check(address)
                response = await super().handle_async_request(_pinned(request, address))
                return self._bounded(response)
            except (Refused, httpx2.ConnectError) as error:  # nothing has been sent
                failure = error
        if isinstance(failure, Refused):
            raise httpx2.ConnectError(failure.message) from failure
        raise failure

    def _bounded(self, response: httpx2.Response) -> httpx2.Response:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)  # noqa: S101 - narrows
            response.stream = _Bounded(response.stream, self._max_bytes)
        return response

    async def _addresses(self, request: httpx2.Request) -> list[str]:
        host, port = request.url.host, request.url.port
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise httpx2.ConnectError(f"{host!r} cannot be resolved: {error}") from error
        return list(dict.fromkeys(str(info[4][0]) for info in found))


class _Bounded(httpx2.AsyncByteStream):
    """A body that ends with an error rather than without end."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for chunk in self._stream:
            read += len(chunk)
            if read > self._limit:
                # What the MCP SDK takes for a failure of this one call; others end its session.
                raise httpx2.StreamError(f"the answer has more than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _pinned(request: httpx2.Request, address: str) -> httpx2.Request:
    """`request` to `address`; its Host header and the name in its certificate stay."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )
