"""Who signed it: the official signer and published vectors as oracles, and nothing else gets in."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from feedback.webhooks.signatures import (
    Headers,
    Refused,
    Scheme,
    Verified,
    read_key,
    verify,
)

NOW = 1_700_000_000
OLD, NEW = (f"whsec_{base64.b64encode(bytes([seed]) * 32).decode()}" for seed in (1, 2))
PRIVATE = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = "whpk_" + base64.b64encode(PRIVATE.public_key().public_bytes_raw()).decode()
BODY = '{"id": "evt_1", "ok": true, "note": "grüße"}'.encode()
GITHUB = "It's a Secret to Everybody"
STRIPE = "whsec_0123456789abcdef"


def check(
    scheme: Scheme,
    headers: Headers,
    body: bytes = BODY,
    secrets: Sequence[str] = (NEW,),
    now: float = NOW,
) -> Verified | Refused:
    keys = [read_key(scheme, secret) for secret in secrets]
    return verify(scheme, headers, body, keys, now=now, tolerance_seconds=300)


def reason(outcome: Verified | Refused) -> str:
    return outcome.reason if isinstance(outcome, Refused) else "verified"


def official(secret: str, body: bytes = BODY, at: int = NOW, message_id: str = "msg_1") -> str:
    return Webhook(secret).sign(message_id, datetime.fromtimestamp(at, UTC), body.decode())


def standard(signature: str, at: object = NOW, message_id: str = "msg_1") -> Headers:
    return [
        (b"webhook-id", message_id.encode("latin-1")),
        (b"webhook-timestamp", str(at).encode("latin-1")),
        (b"webhook-signature", signature.encode("latin-1")),
    ]


def asymmetric(body: bytes = BODY, at: int = NOW) -> str:
    signature = PRIVATE.sign(b"msg_1.%d." % at + body)
    return f"v1a,{base64.b64encode(signature).decode()}"


def github(signature: str) -> Headers:
    return [(b"x-github-delivery", b"72d3162e"), (b"x-hub-signature-256", signature.encode())]


def stripe(body: bytes = BODY, secret: str = STRIPE, at: int = NOW, extra: str = "") -> Headers:
    mac = hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
    return [(b"stripe-signature", f"t={at},v1={mac}{extra}".encode())]


def test_what_the_official_signer_signs_is_verified() -> None:
    assert check("standard", standard(official(NEW))) == Verified("msg_1")


@pytest.mark.parametrize(
    ("secret", "signature"),
    [
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
         "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
        ("whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=",
         "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="),
    ],
)  # fmt: skip
def test_svixs_published_vectors(secret: str, signature: str) -> None:
    body, at, message_id = b'{"test": 2432232314}', 1614265330, "msg_p5jXN8AQM9LWM0D4loKWxJek"
    verified = check("standard", standard(signature, at, message_id), body, [secret], at)
    assert verified == Verified(message_id)


def test_githubs_documented_vector() -> None:
    digest = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    body = b"Hello, World!"
    verified = check("github", github(f"sha256={digest}"), body, [GITHUB])
    assert verified == Verified(hashlib.sha256(body).hexdigest())


def test_a_public_key_verifies_v1a_and_only_v1a() -> None:
    assert check("standard", standard(asymmetric()), secrets=[PUBLIC]) == Verified("msg_1")
    assert reason(check("standard", standard(asymmetric()))) == "wrong_signature"
    # The public key is public: a MAC made with its bytes proves nothing.
    raw = PRIVATE.public_key().public_bytes_raw()
    forged = official(f"whsec_{base64.b64encode(raw).decode()}")
    assert reason(check("standard", standard(forged), secrets=[PUBLIC])) == "wrong_signature"
    assert reason(check("standard", standard(asymmetric(b"{}")), secrets=[PUBLIC])) == (
        "wrong_signature"
    )


@pytest.mark.parametrize("signers", [(OLD,), (NEW,), (OLD, NEW), (NEW, OLD)])
def test_keys_rotate_on_either_side(signers: Sequence[str]) -> None:
    signature = " ".join(official(secret) for secret in signers)
    assert check("standard", standard(signature), secrets=[OLD, NEW]) == Verified("msg_1")
    unknown = f"v9,anything {signature} v1a,{base64.b64encode(b'x' * 64).decode()}"
    assert check("standard", standard(unknown), secrets=[NEW, PUBLIC, OLD]) == Verified("msg_1")
    if OLD not in signers:
        assert reason(check("standard", standard(signature), secrets=[OLD])) == "wrong_signature"


def test_public_keys_rotate_too() -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    public = "whpk_" + base64.b64encode(other.public_key().public_bytes_raw()).decode()
    strange = f"v1a,{base64.b64encode(b'x' * 64).decode()}"
    for signature in (asymmetric(), f"{strange} {asymmetric()}"):
        verified = check("standard", standard(signature), secrets=[public, PUBLIC])
        assert verified == Verified("msg_1")


def test_stripe_takes_any_v1_of_any_secret() -> None:
    assert check("stripe", stripe(), secrets=[STRIPE]) == Verified(None)
    other = "f" * 64
    several = stripe(extra=f",v1={other},v0={other}")
    assert check("stripe", several, secrets=["whsec_another_secret", STRIPE]) == Verified(None)
    [(name, value)] = stripe()
    only_v0 = [(name, value.replace(b"v1=", b"v0="))]
    assert reason(check("stripe", only_v0, secrets=[STRIPE])) == "wrong_signature"


@pytest.mark.parametrize(
    ("off", "expected"),
    [(-301, "outside_tolerance"), (-300, "verified"), (300, "verified"),
     (301, "outside_tolerance")],
)  # fmt: skip
def test_the_time_of_signing_is_tolerated_both_ways(off: int, expected: str) -> None:
    at = NOW + off
    assert reason(check("standard", standard(official(NEW, at=at), at))) == expected
    assert reason(check("stripe", stripe(at=at), secrets=[STRIPE])) == expected


def test_no_byte_of_what_is_signed_may_change() -> None:
    signature = official(NEW)
    for index in range(len(BODY)):
        body = BODY[:index] + bytes([BODY[index] ^ 1]) + BODY[index + 1 :]
        assert reason(check("standard", standard(signature), body)) == "wrong_signature"
        assert reason(check("stripe", stripe(), body, [STRIPE])) == "wrong_signature"
    for body in (BODY + b"\n", BODY[:-1], b""):
        assert reason(check("standard", standard(signature), body)) == "wrong_signature"
    assert reason(check("standard", standard(signature, NOW + 1))) == "wrong_signature"
    assert reason(check("standard", standard(signature, f"0{NOW}"))) == "wrong_signature"
    assert reason(check("standard", standard(signature, NOW, "msg_2"))) == "wrong_signature"


@pytest.mark.parametrize("signature", [official(NEW), asymmetric()])
def test_no_character_of_a_signature_may_change(signature: str) -> None:
    """Not even to another spelling of the same bytes: base64's last digit has bits to spare."""
    for index in range(len(signature)):
        for other in "AQgw=b1 ":
            changed = signature[:index] + other + signature[index + 1 :]
            if changed != signature:
                outcome = check("standard", standard(changed), secrets=[NEW, PUBLIC])
                assert isinstance(outcome, Refused), changed


@pytest.mark.parametrize("index", range(3))
def test_each_header_is_needed_once_and_of_sane_size(index: int) -> None:
    headers = list(standard(official(NEW)))
    name, value = headers[index]
    assert reason(check("standard", [*headers, (name, value)])) == "malformed_header"
    without = headers[:index] + headers[index + 1 :]
    assert reason(check("standard", without)) == "missing_header"
    for bad in (b"", b"\xff\xfe", value + b" ", b"x" * 100_000, value + b"\x00"):
        outcome = check("standard", [*without, (name, bad)])
        assert isinstance(outcome, Refused), (name, bad[:20])


@pytest.mark.parametrize(
    ("at", "message_id"),
    [("1.7e9", "m"), ("-1", "m"), ("\u0661\u0667", "m"), ("9" * 13, "m"), ("", "m"), (" 1", "m"),
     (NOW, ""), (NOW, "m.1"), (NOW, "m 1"), (NOW, "é"), (NOW, "m" * 129)],
)  # fmt: skip
def test_malformed_times_and_ids_are_refused_signed_or_not(at: object, message_id: str) -> None:
    key = read_key("standard", NEW)
    text = str(at).encode()
    mac = key.sign(message_id.encode("latin-1"), b".", text, b".", BODY)  # type: ignore[union-attr] # a whsec_ key
    headers = [
        (b"webhook-id", message_id.encode("latin-1")),
        (b"webhook-timestamp", text),
        (b"webhook-signature", b"v1," + base64.b64encode(mac)),
    ]
    assert reason(check("standard", headers)) == "malformed_header"


@pytest.mark.parametrize(
    "signature",
    ["v1", "v1,", "v1,====", "v1,AAAA", official(NEW).rstrip("="), official(NEW) + " ",
     official(NEW).replace(",", ", "), official(NEW) + "\n", " ".join([official(NEW)] * 9)],
)  # fmt: skip
def test_malformed_signatures_are_refused(signature: str) -> None:
    assert reason(check("standard", standard(signature))) == "malformed_header"


@pytest.mark.parametrize(
    "value",
    ["", "sha256=", "sha1=" + "a" * 40, "sha256=" + "A" * 64, "sha256=" + "a" * 63, "a" * 64],
)
def test_malformed_github_signatures_are_refused(value: str) -> None:
    assert reason(check("github", github(value), secrets=[GITHUB])) == "malformed_header"


@pytest.mark.parametrize(
    "value",
    ["", "t", "v1=" + "a" * 64, f"t={NOW},t={NOW},v1=" + "a" * 64, f"t={NOW},v1=zz", f"t={NOW},v1",
     "t=x,v1=" + "a" * 64, f"t={NOW}" + ",v1=" + ",v1=".join(["a" * 64] * 9)],
)  # fmt: skip
def test_malformed_stripe_signatures_are_refused(value: str) -> None:
    headers = [(b"stripe-signature", value.encode())]
    assert reason(check("stripe", headers, secrets=[STRIPE])) == "malformed_header"


@pytest.mark.parametrize(
    ("scheme", "secret"),
    [("standard", "hunter2hunter2"), ("standard", "whsec_hunter2"), ("standard", "whsec_"),
     ("standard", "whpk_hunter2"), ("standard", "whsk_hunter2"), ("github", "hunter2"),
     ("stripe", ""), ("standard", "whsec_" + base64.b64encode(b"x" * 23).decode()),
     ("standard", "whsec_hünter2" + "\udcff")],
)  # fmt: skip
def test_weak_and_malformed_keys_are_refused_and_not_repeated(scheme: Scheme, secret: str) -> None:
    with pytest.raises(ValueError, match=r"^the (key|secret) ") as caught:
        read_key(scheme, secret)
    assert "nter2" not in str(caught.value)
    assert NEW not in repr(read_key("standard", NEW))


NAMES = st.sampled_from(
    [b"webhook-id", b"webhook-timestamp", b"webhook-signature", b"x-hub-signature-256",
     b"stripe-signature", b"other"]
)  # fmt: skip
PIECES = st.sampled_from(
    [b"v1,", b"v1a,", b"v1=", b"t=", b"sha256=", b",", b" ", b"=", b"%d" % NOW]
)
VALUES = st.lists(PIECES | st.binary(max_size=70), max_size=12).map(b"".join)


@given(
    scheme=st.sampled_from(["standard", "github", "stripe"]),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    body=st.binary(max_size=50),
)
def test_nothing_unsigned_is_verified_and_nothing_raises(
    scheme: Scheme, headers: Headers, body: bytes
) -> None:
    secrets = [NEW, PUBLIC] if scheme == "standard" else [STRIPE]
    outcome = check(scheme, headers, body, secrets)
    assert isinstance(outcome, Refused)
    assert NEW not in outcome.detail
    assert STRIPE not in outcome.detail
