"""What stands in a line of the log, and what never does."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from server.settings import load_settings
from server.supervisor import Supervisor
from server.telemetry.ids import DerivedIds
from server.telemetry.logs import JsonLines, configure_logging, log_only, logging_also
from server.telemetry.redaction import LONGEST, Redactor
from server.telemetry.settings import LogSettings, TelemetrySettings
from tests.server.collector import collecting
from tests.server.house import running, scripted_parts, settings_in, write_agent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@contextmanager
def written(traces: DerivedIds | None) -> Iterator[list[dict[str, Any]]]:
    """The log's lines, decoded when the block is over."""
    stream, lines = io.StringIO(), list[dict[str, Any]]()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(traces))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("hone").setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        lines += map(json.loads, stream.getvalue().splitlines())


def test_lines_carry_the_ids_of_their_request_episode_and_trace(tmp_path: Path) -> None:
    write_agent(tmp_path, f"name: desk\ntools:\n  - python: {__name__}:complain\n")
    ids = {"x-request-id": "req-1"}
    caller = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    with collecting() as collector, written(DerivedIds("hone")) as lines:
        settings = settings_in(tmp_path, telemetry__otlp_endpoint=collector.url)
        with running(settings, scripted_parts(tmp_path)) as house:
            for episode, headers in (("run-1", ids), ("run-2", {**ids, **caller})):
                body = {"input": "CALL complain {}", "episode_id": episode}
                house.http.post("/v1/agents/desk/runs", json=body, headers=headers)
    tools = [span for span in collector.spans if span.name == "execute_tool complain"]
    own, called = [line for line in lines if line["message"] == "no stock"]
    for line, tool, episode in ((own, tools[0], "run-1"), (called, tools[1], "run-2")):
        assert (line["level"], line["logger"]) == ("warning", "hone.shop")
        assert (line["request_id"], line["episode_id"]) == ("req-1", episode)
        assert (line["trace_id"], line["span_id"]) == (tool.trace_id, tool.span_id)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}\+00:00", line["time"])
    assert called["trace_id"] == TRACE != own["trace_id"]


def complain() -> str:
    """Look at the stock."""
    logging.getLogger("hone.shop").warning("no stock")
    return "none"


async def test_an_untraced_episode_names_its_own_trace_only_if_there_are_traces() -> None:
    ids = DerivedIds("hone")
    expected = f"{ids.of_episode('run-1').trace_id:032x}"
    for traces, trace_id in ((ids, expected), (None, None)):
        with written(traces) as lines:
            log_only(episode_id="run-1")
            await asyncio.create_task(_log_in_a_task())
            with logging_also(trace_id="tool"):
                logging.getLogger("hone.x").info("within")
            logging.getLogger("hone.x").info("after")
        within, after = lines[1:]
        assert (within["trace_id"], after.get("trace_id")) == ("tool", trace_id)
        assert lines[0].get("trace_id") == trace_id
        assert lines[0]["episode_id"] == "run-1"
        assert lines[0]["error"].splitlines()[-1] == "ValueError: gone"


async def _log_in_a_task() -> None:
    try:
        raise ValueError("gone")
    except ValueError:
        logging.getLogger("hone.x").exception("two\nlines")


@pytest.mark.parametrize(
    ("format", "terminal", "json_line"),
    [("auto", False, True), ("auto", True, False), ("text", False, False), ("json", True, True)],
)
def test_json_unless_on_a_terminal_or_told_otherwise(
    format: Any, terminal: bool, json_line: bool
) -> None:
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    console = Console(file=io.StringIO(), force_terminal=terminal)
    try:
        configure_logging(LogSettings(format=format), TelemetrySettings(), console)
        [handler] = root.handlers
        assert isinstance(handler.formatter, JsonLines) == json_line
    finally:
        root.handlers = before


async def test_the_trainers_json_lines_keep_their_level_and_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hone.kid")
    told = {"at": 1, "level": "warning", "event": 'rejected: "it\'s" worse', "figures": {"kl": 1}}
    code = f"print({json.dumps(told)!r}); print('[1]'); print('plain')"
    kid = Supervisor("kid", (sys.executable, "-c", code))
    kid.start()
    for _ in range(500):
        if "plain" in caplog.text:
            break
        await asyncio.sleep(0.02)
    await kid.stop()
    first, second, third = caplog.records[:3]
    assert (first.levelname, first.getMessage()) == ("WARNING", told["event"])
    assert getattr(first, "figures", None) == {"kl": 1}
    assert (second.getMessage(), third.getMessage()) == ("[1]", "plain")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to ann.b+c@mail.example.co.uk!", "write to [redacted:email]!"),
        ("Authorization: Bearer abc.def-123456", "Authorization: [redacted:credential]"),
        ("key sk-proj-abcdEFGH12345678 ok", "key [redacted:key] ok"),
        ("card 4111 1111 1111 1111, order 4711", "card [redacted:number], order 4711"),
        ("IBAN DE89370400440532013000", "IBAN DE[redacted:number]"),
        ('{"api_key": "s3cr3t-value"}', '{"[redacted:secret]"}'),
        ("a token costs 2 cents", "a token costs 2 cents"),
        ("born 2024-01-02 at 10:11", "born 2024-01-02 at 10:11"),
        ("see K-77", "see [redacted:custom]"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    assert Redactor([r"K-\d+"]).text(text) == redacted


def test_redaction_keeps_json_what_it_is_and_cuts_last() -> None:
    redactor = Redactor()
    account = {"password": "hunter2", "to": ["ann@example.com"], "number": 12345678901, "n": 3}
    assert json.loads(redactor.json(account)) == {
        "password": "[redacted:secret]",
        "to": ["[redacted:email]"],
        "number": "[redacted:number]",
        "n": 3,
    }
    long = redactor.text("x" * (LONGEST - 8) + " ann@example.com")
    assert len(long) == LONGEST
    assert "ann" not in long


def test_what_cannot_be_meant_is_refused() -> None:
    for flags, message in (
        ({"telemetry.otlp_endpoint": "localhost:4317"}, "expected http"),
        ({"telemetry.redact": ["("]}, "telemetry.redact"),
        ({"telemetry.sample_ratio": 2}, "sample_ratio"),
        ({"log.format": "xml"}, "format"),
    ):
        with pytest.raises(ValidationError, match=message):
            load_settings(flags)
    secret = load_settings({"telemetry.headers": {"authorization": "Bearer s3cret"}})
    assert "s3cret" not in repr(secret)
