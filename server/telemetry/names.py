"""Every span and attribute name. OpenTelemetry's GenAI names still move: they change here only.

Spelled out, because the package of semantic conventions gives them up release by release; the
golden tests say what leaves the process.
"""

from __future__ import annotations

from typing import Final

# Spans; a name may be followed by what it is about.
INVOKE_AGENT: Final = "invoke_agent"
CHAT: Final = "chat"
EXECUTE_TOOL: Final = "execute_tool"
EPISODE: Final = "episode"
FEEDBACK: Final = "feedback"
TRAIN: Final = "train"
RELEASE: Final = "release"

# GenAI conventions.
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
CONVERSATION: Final = "gen_ai.conversation.id"
AGENT: Final = "gen_ai.agent.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL: Final = "gen_ai.tool.call.id"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
EVALUATION: Final = "gen_ai.evaluation.result"
EVALUATION_NAME: Final = "gen_ai.evaluation.name"
EVALUATION_SCORE: Final = "gen_ai.evaluation.score.value"
EVALUATION_LABEL: Final = "gen_ai.evaluation.score.label"
EVALUATION_EXPLANATION: Final = "gen_ai.evaluation.explanation"
ERROR: Final = "error.type"

# What the conventions have no word for.
ADAPTER: Final = "hone.adapter"
PURPOSE: Final = "hone.purpose"
STOP_REASON: Final = "hone.stop_reason"
TURN: Final = "hone.turn"
TURNS: Final = "hone.turns"
PROMPT: Final = "hone.prompt"
TOOL_STATUS: Final = "hone.tool.status"
TOOL_ATTEMPTS: Final = "hone.tool.attempts"
FEEDBACK_SOURCE: Final = "hone.feedback.source"
FEEDBACK_TIME: Final = "hone.feedback.event_time"
TRAINING_RUN: Final = "hone.training.run"
TRAINING_OUTCOME: Final = "hone.training.outcome"
TRAINING_EPISODES: Final = "hone.training.episodes"
RELEASE_STATE: Final = "hone.release.state"
RELEASE_ACTOR: Final = "hone.release.actor"
RELEASE_REASON: Final = "hone.release.reason"
FIGURE: Final = "hone.figure."
"""Before the name of a figure of a training run or a release event."""

PROVIDER_NAME: Final = "hone"
