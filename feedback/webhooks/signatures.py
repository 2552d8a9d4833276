"""Who sent a webhook: Standard Webhooks 1.0, GitHub's and Stripe's signatures over the raw body.

Pure functions of headers, body, keys and the time. They never raise over what was sent, compare
in constant time, and refuse what is malformed instead of guessing. What a body means is
`feedback.webhooks.mapping`'s.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Scheme = Literal["standard", "github", "stripe"]
Headers = Sequence[tuple[bytes, bytes]]
"""Lower-case names and values, as they came; a name may stand twice."""
Reason = Literal["missing_header", "malformed_header", "outside_tolerance", "wrong_signature"]

PUBLIC_KEY = "whpk_"
MOST_SIGNATURES = 8
"""In one header, before anybody is known to have sent it: each costs a comparison a key."""
_LONGEST_HEADER = 2048
_SHORTEST_SECRET = 16
_MESSAGE_ID = re.compile(rb"[!-\-/-~]{1,128}")
"""Printable, and no full stop: in the signed text that would be the end of the id."""
_SECONDS = re.compile(rb"[0-9]{1,12}")
_HEX_DIGEST = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HmacKey:
    """A secret that both sides know."""

    secret: bytes = field(repr=False)

    def sign(self, *parts: bytes) -> bytes:
        mac = hmac.new(self.secret, digestmod=hashlib.sha256)
        for part in parts:
            mac.update(part)
        return mac.digest()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half of the sender's ed25519 key."""

    key: Ed25519PublicKey

    def signed(self, signature: bytes, text: bytes) -> bool:
        try:
            self.key.verify(signature, text)
        except InvalidSignature:
            return False
        return True


Key = HmacKey | PublicKey


@dataclass(frozen=True, slots=True)
class Verified:
    """A holder of one of the keys sent exactly these bytes."""

    message_id: str | None
    """The same over all retries, and covered by the signature; None: the payload's own `id`."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It is not shown who sent this."""

    reason: Reason
    detail: str
    """For the sender; tells nothing of the keys."""


def read_key(scheme: Scheme, text: str) -> Key:
    """A key as the provider shows it. Raises ValueError, which never repeats the text."""
    if scheme == "standard":
        return _standard_key(text)
    secret = _bytes(text)
    if len(secret) < _SHORTEST_SECRET:
        raise ValueError(
            f"the secret has {len(secret)} bytes; expected {_SHORTEST_SECRET} or more, such as "
            "`openssl rand -hex 32` gives"
        )
    return HmacKey(secret)


def verify(
    scheme: Scheme,
    headers: Headers,
    body: bytes,
    keys: Sequence[Key],
    *,
    now: float,
    tolerance_seconds: float,
) -> Verified | Refused:
    """Whether any of the keys signed this body, and lately; GitHub signs no time."""
    try:
        return _SCHEMES[scheme](headers, body, keys, now, tolerance_seconds)
    except _Refusal as refusal:
        return refusal.refused


class _Refusal(Exception):
    """Ends a verification; never leaves this module."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.refused = Refused(reason, detail)


def _standard(
    headers: Headers, body: bytes, keys: Sequence[Key], now: float, tolerance: float
) -> Verified:
    message_id = _header(headers, "webhook-id")
    timestamp = _header(headers, "webhook-timestamp")
    signatures = _header(headers, "webhook-signature")
    if not _MESSAGE_ID.fullmatch(message_id):
        raise _malformed("webhook-id", "1 to 128 printable characters without '.'")
    _check_time(timestamp, "webhook-timestamp", now, tolerance)
    symmetric, asymmetric = _standard_signatures(signatures)
    signed = message_id, b".", timestamp, b".", body
    macs = [key.sign(*signed) for key in keys if symmetric and isinstance(key, HmacKey)]
    publics = [key for key in keys if asymmetric and isinstance(key, PublicKey)]
    text = b"".join(signed) if publics else b""
    is_signed = _any_equal(macs, symmetric) or any(
        key.signed(signature, text) for key in publics for signature in asymmetric
    )
    return _verified(is_signed, message_id.decode("ascii"))


def _github(
    headers: Headers, body: bytes, keys: Sequence[Key], now: float, tolerance: float
) -> Verified:
    version, _, given = _header(headers, "x-hub-signature-256").partition(b"=")
    if version != b"sha256" or not _HEX_DIGEST.fullmatch(given):
        raise _malformed("x-hub-signature-256", "'sha256=' and 64 lower-case hex digits")
    macs = [key.sign(body) for key in keys if isinstance(key, HmacKey)]
    # x-github-delivery is not signed: whoever has seen one delivery could send it again under
    # another id. A redelivery repeats the body, byte for byte.
    digest = hashlib.sha256(body).hexdigest()
    return _verified(_any_equal(macs, [bytes.fromhex(given.decode("ascii"))]), digest)


def _stripe(
    headers: Headers, body: bytes, keys: Sequence[Key], now: float, tolerance: float
) -> Verified:
    timestamp, given = _stripe_signatures(_header(headers, "stripe-signature"))
    _check_time(timestamp, "stripe-signature t", now, tolerance)
    macs = [key.sign(timestamp, b".", body) for key in keys if isinstance(key, HmacKey)]
    return _verified(_any_equal(macs, given), None)


_SCHEMES: Mapping[Scheme, Callable[[Headers, bytes, Sequence[Key], float, float], Verified]] = {
    "standard": _standard,
    "github": _github,
    "stripe": _stripe,
}


def _header(headers: Headers, name: str) -> bytes:
    found = [value for key, value in headers if key == name.encode()]
    if not found:
        raise _Refusal("missing_header", f"header {name} is missing")
    if len(found) > 1 or len(found[0]) > _LONGEST_HEADER:
        raise _malformed(name, f"one, of at most {_LONGEST_HEADER} bytes")
    return found[0]


def _check_time(timestamp: bytes, name: str, now: float, tolerance: float) -> None:
    if not _SECONDS.fullmatch(timestamp):
        raise _malformed(name, "whole Unix seconds")
    off = now - int(timestamp)
    if abs(off) > tolerance:
        side = "behind" if off > 0 else "ahead of"
        raise _Refusal(
            "outside_tolerance",
            f"{name} is {abs(off):.0f} s {side} this server's clock; at most {tolerance:g} s are "
            "tolerated",
        )


def _standard_signatures(header: bytes) -> tuple[list[bytes], list[bytes]]:
    """(v1, v1a) signatures; other versions are somebody else's business."""
    found: dict[bytes, list[bytes]] = {b"v1": [], b"v1a": []}
    lengths = {b"v1": hashlib.sha256().digest_size, b"v1a": 64}
    for item in _items(header, b" ", "webhook-signature", MOST_SIGNATURES):
        version, comma, text = item.partition(b",")
        if not comma:
            raise _malformed("webhook-signature", "'VERSION,BASE64', separated by spaces")
        if version in found:
            signature = _decoded(text)
            if signature is None or len(signature) != lengths[version]:
                raise _malformed("webhook-signature", "padded base64 of a whole signature")
            found[version].append(signature)
    return found[b"v1"], found[b"v1a"]


def _stripe_signatures(header: bytes) -> tuple[bytes, list[bytes]]:
    """(t, v1 signatures); other versions are somebody else's business."""
    times: list[bytes] = []
    signatures: list[bytes] = []
    # One more, for the time that stands among them.
    for item in _items(header, b",", "stripe-signature", MOST_SIGNATURES + 1):
        key, equals, value = item.partition(b"=")
        if not equals or (key == b"v1" and not _HEX_DIGEST.fullmatch(value)):
            raise _malformed("stripe-signature", "'t=SECONDS,v1=HEX', separated by commas")
        if key == b"t":
            times.append(value)
        elif key == b"v1":
            signatures.append(bytes.fromhex(value.decode("ascii")))
    if len(times) != 1:
        raise _malformed("stripe-signature", "one 't='")
    return times[0], signatures


def _items(header: bytes, separator: bytes, name: str, most: int) -> list[bytes]:
    items = header.split(separator)
    if len(items) > most:
        raise _malformed(name, f"at most {MOST_SIGNATURES} signatures")
    return items


def _any_equal(macs: Sequence[bytes], given: Sequence[bytes]) -> bool:
    return any(hmac.compare_digest(mac, signature) for mac in macs for signature in given)


def _verified(is_signed: bool, message_id: str | None) -> Verified:
    if not is_signed:
        raise _Refusal("wrong_signature", "no signature is of these bytes by a key of this source")
    return Verified(message_id)


def _malformed(name: str, expected: str) -> _Refusal:
    return _Refusal("malformed_header", f"header {name} is malformed; expected {expected}")


def _standard_key(text: str) -> Key:
    if text.startswith(PUBLIC_KEY):
        raw = _decoded(_bytes(text.removeprefix(PUBLIC_KEY)))
        if raw is None or len(raw) != 32:
            raise ValueError("the key is not 'whpk_' and the base64 of 32 bytes")
        return PublicKey(Ed25519PublicKey.from_public_bytes(raw))
    if text.startswith("whsk_"):
        raise ValueError("the key is the sender's private one; expected its public half, 'whpk_'")
    if not text.startswith("whsec_"):
        raise ValueError("the secret begins with neither 'whsec_' nor 'whpk_', as it must")
    encoded = text.removeprefix("whsec_")
    secret = _decoded(_bytes(encoded + "=" * (-len(encoded) % 4)))
    if secret is None or not 24 <= len(secret) <= 64:
        raise ValueError("the secret is not 'whsec_' and the base64 of 24 to 64 bytes")
    return HmacKey(secret)


def _decoded(text: bytes) -> bytes | None:
    """Base64 in its one canonical spelling; None for any other text."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if base64.b64encode(raw) == text else None


def _bytes(text: str) -> bytes:
    """As the environment holds it, UTF-8 or not."""
    return text.encode("utf-8", "surrogateescape")
