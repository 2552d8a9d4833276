"""The spans: which there are, what they say, and what they hang from.

Built from what `watch` tells, so that neither run, plain traffic nor trainer knows of tracing. How
spans leave is `export`'s, their names are `names`', and docs/telemetry.md explains both to users.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)

from feedback.events import Receipt
from feedback.training import TrainingRun
from feedback.types import Episode, FeedbackEvent, Turn
from policy.releases import ReleaseEvent
from policy.types import AdapterRef
from server.agents.calls import Tools
from server.telemetry import names
from server.telemetry.export import NO_PARENT, Tracer, nanoseconds, otlp_exporter
from server.telemetry.ids import DerivedIds, SpanIds
from server.telemetry.metrics import run_outcome
from server.telemetry.redaction import Redactor
from server.telemetry.settings import TelemetrySettings
from server.telemetry.tools import TracedTools

_HALF = 2**64


@dataclass(slots=True)
class _Open:
    """The spans of an episode that runs."""

    span: Span
    """Its parent for turns and tools."""
    root: Span
    """The one whose ids are derived, where feedback is linked to; often the same."""
    turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


def open_spans(settings: TelemetrySettings, *, text: Callable[[Sequence[int]], str]) -> Spans:
    """Spans that go to the collector of the settings; `text` as in `Spans`."""
    return Spans(settings, Tracer(settings, otlp_exporter(settings)), text=text)


class Spans:
    """`server.telemetry.watch.Watcher` that exports spans."""

    def __init__(
        self,
        settings: TelemetrySettings,
        tracer: Tracer,
        *,
        text: Callable[[Sequence[int]], str],
    ) -> None:
        """`text` decodes token ids, for exported content."""
        self.tracer = tracer
        self._ids = DerivedIds(settings.service_name)
        self._redactor = Redactor(settings.redact)
        self._content = settings.content
        self._text = text
        self._open: dict[str, _Open] = {}

    def close(self) -> None:
        """Export what is left; see `Tracer.close`."""
        self.tracer.close()

    def around(self, tools: Tools) -> Tools:
        """The same tools, with a span around each call."""
        return TracedTools(tools, self.tracer, self.of_episode, self.content)

    def of_episode(self, episode_id: str) -> Context | None:
        """The context for spans within a running episode."""
        known = self._open.get(episode_id)
        return None if known is None else set_span_in_context(known.span, NO_PARENT)

    def content(self, texts: Mapping[str, Any]) -> dict[str, str]:
        """`texts` by attribute name, redacted; nothing unless content is exported."""
        if not self._content:
            return {}
        return {
            name: self._redactor.text(value)
            if isinstance(value, str)
            else self._redactor.json(value)
            for name, value in texts.items()
        }

    def begun(self, episode: Episode) -> None:
        # The turns of a plain chat may come from many requests, each with its own caller.
        open_ = self._open_plain if episode.agent is None else self._open_run
        self._open[episode.id] = open_(episode)

    def recorded(self, episode: Episode, turn: Turn) -> None:
        known = self._open.get(episode.id)
        if known is None:
            return
        known.turns += 1
        known.input_tokens += len(turn.prompt_ids)
        known.output_tokens += len(turn.token_ids)
        caller = get_current_span()
        is_called = episode.agent is None and caller.get_span_context().is_valid
        span = self.tracer.start(
            f"{names.CHAT} {episode.policy}",
            _chat(episode, turn),
            parent=set_span_in_context(caller if is_called else known.span, NO_PARENT),
            at=turn.started_at,
            links=[Link(known.root.get_span_context())] if is_called else (),
            kind=SpanKind.CLIENT,
        )
        if span.is_recording():
            span.set_attributes(self._chat_content(turn))
        if turn.stop_reason == "abort":
            _fail(span, "aborted")
        # A turn's time includes its tools, which are called together once it is sampled.
        tools = max((call.seconds for call in turn.tool_calls), default=0.0)
        span.end(nanoseconds(turn.started_at + max(0.0, turn.seconds - tools)))

    def ended(self, episode: Episode, stop_reason: str, ended_at: float) -> None:
        known = self._open.pop(episode.id, None)
        if known is None:
            return
        told: dict[str, str | int] = {
            names.STOP_REASON: stop_reason,
            names.TURNS: known.turns,
            names.INPUT_TOKENS: known.input_tokens,
            names.OUTPUT_TOKENS: known.output_tokens,
        }
        for span in {id(known.span): known.span, id(known.root): known.root}.values():
            span.set_attributes(told)
            if stop_reason in ("engine_error", "interrupted"):
                _fail(span, stop_reason)
            span.end(nanoseconds(ended_at))

    def judged(self, event: FeedbackEvent, receipt: Receipt) -> None:
        if receipt.status != "recorded":
            return
        about_id = event.episode_id or event.task_key or ""
        episode, caller = self._ids.of_episode(about_id), get_current_span()
        # The sampler looks at the lower half: it keeps, or drops, an episode and its feedback.
        own = SpanIds(random.randrange(1, _HALF) * _HALF + episode.trace_id % _HALF, 0)  # noqa: S311 - an id, no secret
        about = {
            names.CONVERSATION: event.episode_id,
            names.EVALUATION_NAME: event.metric,
            names.EVALUATION_SCORE: event.value,
            names.EVALUATION_LABEL: _label(event),
            names.FEEDBACK_SOURCE: event.source,
            names.TURN: event.turn,
        }
        span = self.tracer.start(
            names.FEEDBACK,
            about,
            parent=set_span_in_context(caller, NO_PARENT),
            ids=own,
            at=event.received_at,
            links=[Link(_remote(episode))] if event.episode_id is not None else [],
        )
        explained = self.content({names.EVALUATION_EXPLANATION: event.comment or ""})
        result = {name: value for name, value in (about | explained).items() if value is not None}
        result[names.FEEDBACK_TIME] = event.event_time
        span.add_event(names.EVALUATION, result, nanoseconds(event.received_at))
        span.end()

    def trained(self, run: TrainingRun) -> None:
        outcome = run_outcome(run)
        version = None if run.version is None else AdapterRef(run.policy, run.version)
        span = self.tracer.start(
            f"{names.TRAIN} {run.policy}",
            {
                names.TRAINING_RUN: run.id,
                names.TRAINING_OUTCOME: outcome,
                names.TRAINING_EPISODES: run.n_episodes,
                names.ADAPTER: None if version is None else str(version),
                **_figures(run.figures),
            },
            ids=None if version is None else self._ids.of_adapter(version),
            at=run.started_at,
            always=True,
        )
        if outcome in ("failed", "abandoned"):
            _fail(span, outcome)
        span.end(nanoseconds(run.finished_at or run.started_at))

    def released(self, event: ReleaseEvent) -> None:
        span = self.tracer.start(
            f"{names.RELEASE} {event.state}",
            {
                names.ADAPTER: str(event.ref),
                names.RELEASE_STATE: event.state,
                names.RELEASE_ACTOR: event.actor,
                names.RELEASE_REASON: self._redactor.text(event.reason),
                **_figures(event.figures),
            },
            parent=set_span_in_context(
                NonRecordingSpan(_remote(self._ids.of_adapter(event.ref))), NO_PARENT
            ),
            at=event.at,
            always=True,
        )
        span.end(nanoseconds(event.at))

    def _open_plain(self, episode: Episode) -> _Open:
        ids = self._ids.of_episode(episode.id)
        root = self.tracer.start(names.EPISODE, _about(episode), ids=ids, at=episode.started_at)
        return _Open(root, root)

    def _open_run(self, episode: Episode) -> _Open:
        ids, caller = self._ids.of_episode(episode.id), get_current_span()
        about, is_called = _about(episode), caller.get_span_context().is_valid
        span = self.tracer.start(
            f"{names.INVOKE_AGENT} {episode.agent}",
            {names.OPERATION: names.INVOKE_AGENT, names.AGENT: episode.agent, **about},
            parent=set_span_in_context(caller, NO_PARENT),
            ids=None if is_called else ids,
            at=episode.started_at,
        )
        if not is_called or not span.is_recording():
            return _Open(span, span)
        # Where the derived ids lead: to the span that stands in the caller's trace.
        root = self.tracer.start(
            names.EPISODE, about, ids=ids, at=episode.started_at, always=True,
            links=[Link(span.get_span_context())],
        )  # fmt: skip
        return _Open(span, root)

    def _chat_content(self, turn: Turn) -> Mapping[str, str]:
        if not self._content:
            return {}
        part = {"type": "text", "content": turn.text}
        said = {"role": "assistant", "parts": [part], "finish_reason": turn.stop_reason}
        return self.content(
            {names.PROMPT: self._text(turn.prompt_ids), names.OUTPUT_MESSAGES: [said]}
        )


def _about(episode: Episode) -> dict[str, Any]:
    adapter = str(AdapterRef(episode.policy, episode.version))
    return {
        names.PROVIDER: names.PROVIDER_NAME,
        names.CONVERSATION: episode.id,
        names.REQUEST_MODEL: episode.policy,
        names.ADAPTER: adapter,
        names.PURPOSE: episode.purpose,
    }


def _chat(episode: Episode, turn: Turn) -> dict[str, Any]:
    about = _about(episode)
    return {
        names.OPERATION: names.CHAT,
        **about,
        names.AGENT: episode.agent,
        names.REQUEST_TEMPERATURE: episode.temperature,
        names.RESPONSE_MODEL: about[names.ADAPTER],
        names.FINISH_REASONS: [turn.stop_reason],
        names.INPUT_TOKENS: len(turn.prompt_ids),
        names.OUTPUT_TOKENS: len(turn.token_ids),
        names.TURN: turn.index,
    }


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    known = figures.items()
    return {names.FIGURE + name: value for name, value in known if isinstance(value, int | float)}


def _remote(ids: SpanIds) -> SpanContext:
    return SpanContext(
        ids.trace_id, ids.span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
    )


def _label(event: FeedbackEvent) -> str | None:
    """What a statement is, where its score does not say it."""
    if event.kind in ("value", "preference"):
        return "retracted" if event.value is None else None
    return event.kind


def _fail(span: Span, error: str) -> None:
    span.set_attribute(names.ERROR, error)
    span.set_status(StatusCode.ERROR)
