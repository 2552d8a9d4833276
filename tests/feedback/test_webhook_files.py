"""Sources' files: strictness, messages that name the file and the key, and secrets kept secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from pathlib import Path
from typing import Any

import pytest

from feedback.types import FeedbackEvent
from feedback.webhooks.mapping import PayloadMapping, Unmappable
from feedback.webhooks.signatures import Refused
from feedback.webhooks.source import WebhookSource, open_webhooks
from feedback.webhooks.spec import WebhookFileError, load_webhook

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-of-github-and-us"
GITHUB = """
name: tickets
scheme: github
secrets: ["${env:TICKETS_SECRET}"]
mapping:
  episode_id: episode
  value: state
  values: {closed: 1, reopened: 0}
"""


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETS_SECRET", SECRET)


def write(folder: Path, text: str, name: str = "tickets.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def receive(
    source: WebhookSource, body: bytes, secret: str = SECRET
) -> list[FeedbackEvent] | Refused:
    mac = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    headers = [(b"x-hub-signature-256", f"sha256={mac}".encode())]
    return source.receive(headers, body, now=5.0)


def test_from_file_to_event(tmp_path: Path) -> None:
    write(tmp_path, GITHUB)
    write(tmp_path, "not: [a, source", "notes.txt")
    sources = open_webhooks(tmp_path)
    assert list(sources) == ["tickets"]
    body = b'{"episode": "ep_1", "state": "closed"}'
    said = receive(sources["tickets"], body)
    assert not isinstance(said, Refused)
    [event] = said
    assert (event.source, event.event_id) == ("webhook:tickets", hashlib.sha256(body).hexdigest())
    assert (event.episode_id, event.metric, event.value) == ("ep_1", "success", 1.0)
    assert event.event_time == event.received_at == 5.0

    assert isinstance(receive(sources["tickets"], body, "another-secret-of-ours"), Refused)
    with pytest.raises(Unmappable, match="value is 'merged'"):
        receive(sources["tickets"], b'{"episode": "ep_1", "state": "merged"}')


def test_secrets_come_from_the_environment_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("an-older-secret-of-ours\n")
    references = '["${env:TICKETS_SECRET}", "${file:old}"]'
    write(tmp_path, GITHUB.replace('["${env:TICKETS_SECRET}"]', references))
    tickets = open_webhooks(tmp_path)["tickets"]
    for secret in (SECRET, "an-older-secret-of-ours"):
        assert not isinstance(
            receive(tickets, b'{"episode": "e", "state": "closed"}', secret), Refused
        )
    assert SECRET not in repr(tickets)


def test_a_public_key_may_stand_in_the_file_of_its_scheme_only(tmp_path: Path) -> None:
    public = "whpk_" + base64.b64encode(b"p" * 32).decode()
    inline = GITHUB.replace("${env:TICKETS_SECRET}", public)
    write(tmp_path, inline.replace("scheme: github", "scheme: standard"))
    assert list(open_webhooks(tmp_path)) == ["tickets"]
    write(tmp_path, inline)
    with pytest.raises(WebhookFileError, match="'github' has no public keys"):
        open_webhooks(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("name: tickets", "name: Tickets/1", "name: String should match pattern"),
        ("scheme: github", "scheme: svix", "scheme: Input should be"),
        ("scheme: github", "shceme: github", "shceme: unknown key"),
        ("${env:TICKETS_SECRET}", SECRET, "secrets.0: .*expected \\$\\{env:NAME\\}"),
        ("${env:TICKETS_SECRET}", "x${env:TICKETS_SECRET}", "secrets.0: .*expected"),
        ('["${env:TICKETS_SECRET}"]', "[]", "secrets: .*at least 1"),
        ("${env:TICKETS_SECRET}", "${env:TICKETS_UNSET}", "'TICKETS_UNSET' is not set"),
        ("${env:TICKETS_SECRET}", "${file:none}", "secrets.0: file 'none' cannot be read"),
        ("  episode_id: episode\n", "", "mapping: .*expected one of `episode_id`"),
        ("value: state", "value: 'state['", "mapping.value.*is not JMESPath"),
        ("value: state", "value: lower(state)", "there is no function lower"),
        ("value: state", "value: a[?nope(b)].c | [0]", "there is no function nope"),
        ("value: state", "value: 1", "`value` is a constant"),
        ("closed: 1", "closed: .nan", "mapping.values.closed"),
        ("closed: 1", "yes: 1", "mapping.values: .*a word as True; put it in quotes"),
        ("mapping:", "tolerance_seconds: 0\nmapping:", "tolerance_seconds: .*greater than 0"),
        ("name: tickets", "name: [", "is not YAML"),
        (GITHUB, "- name", "is a list; expected keys"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in GITHUB
    path = write(tmp_path, GITHUB.replace(before, after))
    with pytest.raises(WebhookFileError, match=said) as caught:
        open_webhooks(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", [f"secrets: [{SECRET}", f"secrets: {SECRET}", f"secrets: [[{SECRET}]]",
             f"name: {{{SECRET}: 1}}", f"secrets: [!!int {SECRET}]"],
)  # fmt: skip
def test_a_misplaced_secret_is_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(WebhookFileError) as caught:
        load_webhook(write(tmp_path, text))
    assert SECRET not in str(caught.value)


PAYLOADS: dict[str, Any] = {
    "tickets": {"type": "ticket.closed", "timestamp": "2023-11-14T22:13:20.344522Z",
                "data": {"metadata": {"episode": "ep_1"}, "status": "resolved"}},
    "github": {"action": "closed", "pull_request": {
        "head": {"ref": "ep_1"}, "merged": True, "closed_at": "2023-11-14T22:13:20Z"}},
    "stripe": {"id": "evt_1", "type": "invoice.paid", "created": 1_700_000_000,
               "data": {"object": {"lines": {"data": [
                   {"metadata": {}, "amount": 7}, {"metadata": {"episode": "ep_1"}, "amount": 1}
               ]}}}},
}  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "docs/webhooks.md"])
def test_the_documented_sources_work(tmp_path: Path, page: str) -> None:
    sources = re.findall(r"```yaml\n(# webhooks/.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert sources
    for source in sources:
        spec = load_webhook(write(tmp_path, source))
        [said] = PayloadMapping(spec.mapping).statements(PAYLOADS[spec.name])
        assert (said.episode_id, said.value) == ("ep_1", 1.0)


def test_two_files_must_not_share_a_name(tmp_path: Path) -> None:
    write(tmp_path, GITHUB, "1.yaml")
    write(tmp_path, GITHUB, "2.yml")
    with pytest.raises(WebhookFileError, match=r"2\.yml: name: 'tickets' is already .*1\.yaml"):
        open_webhooks(tmp_path)
