"""What the run loop itself costs a turn: engine, tool and recorder answer at once.

    python -m benchmarks.agent_overhead [--runs 2000] [--at-once 200] [--telemetry off|metrics|all]

Each run has one turn with a tool call and one without. The chat format is a stand-in as well: its
cost is the template's, and is measured elsewhere. `--telemetry all` counts and traces every run;
the spans are encoded for export and thrown away.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from feedback.events import Receipt
from feedback.runs import NewRun, Run, RunCall
from feedback.types import Episode, FeedbackEvent, ToolCall, Turn
from policy.tool_calls import ParsedTurn, parse_turn
from policy.types import Adapter, AdapterRef, Delta, ProbeReport, Sampling
from server.agents.calls import Tools
from server.agents.run import Agent, RunRequest, run_to_end
from server.agents.spec import AgentSpec
from server.telemetry.export import Tracer
from server.telemetry.metrics import Metrics
from server.telemetry.settings import TelemetrySettings
from server.telemetry.spans import Spans
from server.telemetry.watch import WatchedLog, Watcher, Watchers
from server.tools.box import ToolBox
from server.tools.python import PythonTool

CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
TOKENS = 24


class InstantEngine:
    """Says a turn in one piece: a call to a short prompt, an answer to a longer one."""

    max_model_len = 4096
    loaded: frozenset[AdapterRef] = frozenset()

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        text = CALL if len(prompt_ids) < 100 else "It is 5."
        yield Delta((len(text),) * TOKENS, (-0.5,) * TOKENS, text, "stop")

    async def load(self, adapter: Adapter) -> ProbeReport | None:
        return None

    async def unload(self, ref: AdapterRef) -> None:
        pass

    async def score(self, token_ids: Sequence[int], *, adapter: AdapterRef) -> list[float]:
        return [-0.5] * (len(token_ids) - 1)

    async def pause(self) -> None:
        pass

    async def resume(self) -> None:
        pass

    async def healthy(self) -> bool:
        return True

    async def close(self) -> None:
        pass


class InstantChat:
    """Messages to made-up ids; tool calls are parsed as in earnest."""

    def first_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        return [1] * 80

    def next_prompt(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> list[int]:
        return [*prompt_ids, *completion_ids, 2, 3]

    def text(self, completion_ids: Sequence[int]) -> str:
        return CALL if completion_ids[0] == len(CALL) else "It is 5."

    def parse(self, text: str) -> ParsedTurn:
        return parse_turn(text)


class InstantRecorder:
    """Keeps nothing."""

    async def begin(self, episode: Episode) -> None:
        pass

    async def begin_run(self, episode: Episode, run: NewRun) -> None:
        pass

    async def resume_run(self, run: Run) -> None:
        pass

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        pass

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        pass

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        pass

    async def answer(self, episode_id: str, call: ToolCall) -> None:
        pass

    async def complete(self, episode_id: str, turn: Turn) -> None:
        pass

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        return []

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        pass

    async def add_feedback(self, said: Sequence[FeedbackEvent]) -> list[Receipt]:
        return []


class Encoded(SpanExporter):
    """All of an export but the network."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def measure(runs: int, at_once: int, telemetry: str) -> float:
    """CPU seconds a turn."""
    tools: Tools = ToolBox([PythonTool(add)])
    watchers: list[Watcher] = [] if telemetry == "off" else [Metrics()]
    if telemetry == "all":
        spans = _spans()
        watchers.append(spans)
        tools = spans.around(tools)
    agent = Agent(AgentSpec(name="bench"), tools)
    engine, chat = InstantEngine(), InstantChat()
    recorder = WatchedLog(InstantRecorder(), Watchers(watchers))
    messages = [{"role": "user", "content": "2 and 3?"}]
    turns = 0

    async def worker(first: int) -> None:
        nonlocal turns
        for number in range(first, runs, at_once):
            ended, _ = await run_to_end(
                agent,
                RunRequest(messages, f"ep_{number}", "sum"),
                engine=engine,
                chat=chat,
                adapter=AdapterRef("bench", 0),
                recorder=recorder,
            )
            assert ended.output == "It is 5.", ended
            turns += ended.turns

    started = time.process_time()
    await asyncio.gather(*(worker(first) for first in range(at_once)))
    return (time.process_time() - started) / turns


def _spans() -> Spans:
    settings = TelemetrySettings()
    return Spans(settings, Tracer(settings, Encoded()), text=InstantChat().text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--telemetry", choices=("off", "metrics", "all"), default="off")
    options = parser.parse_args()
    for at_once in (1, options.at_once):
        seconds = asyncio.run(measure(options.runs, at_once, options.telemetry))
        print(f"{at_once:4d} runs at once: {seconds * 1e6:6.0f} microseconds a turn")


if __name__ == "__main__":
    main()
