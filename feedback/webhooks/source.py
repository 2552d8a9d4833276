"""A webhook source that is ready to receive: its keys read, its expressions compiled.

`receive` is the whole way from what came to what is to be recorded, still without any I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feedback.references import UnreadableReference, resolve
from feedback.types import FeedbackEvent
from feedback.webhooks.mapping import PayloadMapping, Statement, message_id_in, parse
from feedback.webhooks.signatures import Headers, Key, Refused, read_key, verify
from feedback.webhooks.spec import WebhookFileError, WebhookSpec, load_webhooks

SOURCE_PREFIX = "webhook:"
"""Before a source's name in the record. Nobody else may say it: `/v1/feedback` refuses it."""


@dataclass(frozen=True, slots=True)
class WebhookSource:
    """One source, able to tell its sender's messages from everybody else's."""

    spec: WebhookSpec
    keys: Sequence[Key] = field(repr=False)
    mapping: PayloadMapping

    @property
    def source(self) -> str:
        """Its name in the record."""
        return SOURCE_PREFIX + self.spec.name

    def receive(
        self, headers: Headers, body: bytes, *, now: float
    ) -> list[FeedbackEvent] | Refused:
        """The events that a message says; none, if its owner's filter passes it over.

        Raises Unmappable for a message that is the sender's and gives no event.
        """
        verified = verify(
            self.spec.scheme,
            headers,
            body,
            self.keys,
            now=now,
            tolerance_seconds=self.spec.tolerance_seconds,
        )
        if isinstance(verified, Refused):
            return verified
        payload = parse(body)
        statements = self.mapping.statements(payload)
        if not statements:
            return []
        message_id = verified.message_id or message_id_in(payload)
        # A list's items are numbered even if there is one: "m" and "m#0" are never the same event.
        ids = (
            [message_id]
            if self.spec.mapping.each is None
            else [f"{message_id}#{index}" for index in range(len(statements))]
        )
        return [
            self._event(event_id, statement, now)
            for event_id, statement in zip(ids, statements, strict=True)
        ]

    def _event(self, event_id: str, statement: Statement, now: float) -> FeedbackEvent:
        return FeedbackEvent(
            event_id=event_id,
            source=self.source,
            episode_id=statement.episode_id,
            metric=statement.metric,
            value=statement.value,
            event_time=now if statement.event_time is None else statement.event_time,
            received_at=now,
            tenant=self.spec.tenant,
            comment=statement.comment,
            turn=statement.turn,
            kind=statement.kind,
            task_key=statement.task_key,
            correction=statement.correction,
            worse_id=statement.worse_id,
        )


def open_webhooks(folder: Path) -> dict[str, WebhookSource]:
    """The sources of a folder, by name, with their secrets read. Raises WebhookFileError."""
    return {
        name: WebhookSource(spec, _keys(path, spec), PayloadMapping(spec.mapping))
        for name, (path, spec) in load_webhooks(folder).items()
    }


def _keys(path: Path, spec: WebhookSpec) -> tuple[Key, ...]:
    keys = []
    for index, reference in enumerate(spec.secrets):  # a public key refers to nothing
        try:
            keys.append(read_key(spec.scheme, resolve(reference, path.parent)))
        except (UnreadableReference, ValueError) as error:
            raise WebhookFileError(f"{path}: secrets.{index}: {error}") from None
    return tuple(keys)
