"""The OpenAI routes that generate, as the OpenAPI document describes them.

Their requests are read by the engine's own routes, which take more than stands here and say what
they refuse; nothing is validated by these models. `model` is Hone's: `server.routing` reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Metadata = Annotated[
    dict[str, str],
    Field(
        description="Kept with the episode. `episode_id` names it, `task_key` its task, `purpose` "
        "what it is for; `pin` the version, where the model is an agent."
    ),
]
ModelName = Annotated[
    str,
    Field(
        description="A policy (its live version), `policy@vN`, `agent:NAME`, or the base model.",
        examples=["base"],
    ),
]


class _Shape(BaseModel):
    # What is not named here is the engine's to know.
    model_config = ConfigDict(extra="allow")


class Message(_Shape):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _Sampled(_Shape):
    model: ModelName
    stream: bool = Field(False, description="Answer as server-sent events.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    metadata: Metadata | None = None
    user: str | None = None


class _Completed(_Sampled):
    n: int | None = Field(None, ge=1, le=128, description="Choices; each is an episode of its own.")
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream_options: dict[str, Any] | None = Field(
        None, description="`include_usage`; with `stream` only."
    )


class ChatCompletionIn(_Completed):
    """A conversation to be answered."""

    messages: list[Message] = Field(
        min_length=1, examples=[[{"role": "user", "content": "Where is my parcel?"}]]
    )
    max_completion_tokens: int | None = Field(None, ge=1, examples=[16])
    max_tokens: int | None = Field(None, ge=1, description="`max_completion_tokens`, as it was.")
    tools: list[dict[str, Any]] | None = Field(None, description="Functions of the client.")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="auto, none, required, or a function by name."
    )
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object or json_schema."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, description="With `logprobs` only.")


class CompletionIn(_Completed):
    """A text to be gone on with."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(examples=["Order"])
    max_tokens: int | None = Field(None, ge=1, examples=[16])
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)


class ResponseIn(_Sampled):
    """A conversation to be answered, or gone on with from an earlier response."""

    input: str | list[dict[str, Any]] = Field(examples=["Where is my parcel?"])
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, examples=[16])
    store: bool | None = Field(None, description="Whether a later request may name it.")
    tools: list[dict[str, Any]] | None = Field(
        None, description="Of the types function, custom and namespace."
    )
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = Field(None, description="`format`: text or json_schema.")
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0)


class Usage(_Shape):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int | None
    total_tokens: int


class ChatChoice(_Shape):
    """One answer."""

    index: int
    message: Message
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class _Completion(_Shape):
    id: str
    created: int
    model: str = Field(description="The version that answered.")
    usage: Usage | None = None
    metadata: dict[str, str] = Field(
        description="The client's, with `episode_id`; with several choices `episode_ids`."
    )


class ChatCompletionOut(_Completion):
    """The answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(_Shape):
    """One text."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class CompletionOut(_Completion):
    """The texts that go on from a prompt."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ResponseOut(_Shape):
    """A response of the Responses API."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str = Field(description="The version that answered.")
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    previous_response_id: str | None
    metadata: dict[str, str]
    store: bool
