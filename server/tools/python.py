"""Python functions as tools: schema from type hints, conversion of arguments by pydantic.

Sync functions run in threads of their own, async ones in the event loop. Time-outs and failures
are the box's.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import pkgutil
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined, to_json

from server.tools.base import CallContext, InvalidArguments, ToolResult, ToolSpec, ToolUnavailable
from server.tools.schema import Schemas
from server.tools.sources import PythonSource

_MAX_THREADS = 64
"""Calls of one sync function that run at once; more wait, within their time-out."""


class PythonTool:
    """One function of the owner's."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        timeout_seconds: float = 10.0,
        max_result_chars: int = 4000,
    ) -> None:
        """Raises ToolUnavailable if the signature cannot be described to a model."""
        self.timeout_seconds = timeout_seconds
        self.max_result_chars = max_result_chars
        self._function = function
        self._arguments = _Arguments(function)
        self.spec = ToolSpec(
            name=name or function.__name__,
            description=inspect.getdoc(function) or "",
            parameters=self._arguments.schema(),
        )
        self._is_async = inspect.iscoroutinefunction(function)
        self._threads = asyncio.Semaphore(_MAX_THREADS)

    @classmethod
    def from_source(cls, source: PythonSource) -> PythonTool:
        """Import the function that an agent's file names."""
        try:
            function = pkgutil.resolve_name(source.python)
        except Exception as error:
            raise ToolUnavailable(
                f"tool {source.python!r} cannot be imported: {type(error).__name__}: {error}; "
                "expected 'module:function' that this process can import"
            ) from error
        if not inspect.isroutine(function):
            raise ToolUnavailable(
                f"tool {source.python!r} is a {type(function).__name__}; expected a function"
            )
        return cls(
            function,
            name=source.name,
            timeout_seconds=source.timeout_seconds,
            max_result_chars=source.max_result_chars,
        )

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolResult:
        keywords = self._arguments.convert(arguments, context)
        if self._is_async:
            value = await self._function(**keywords)
        else:
            async with self._threads:
                value = await _in_thread(self._function, keywords)
        return ToolResult("ok", value if isinstance(value, str) else to_json(value).decode())

    async def aclose(self) -> None:
        pass


class _Arguments:
    """The parameters of a function, as a pydantic model whose fields are aliased to them.

    Aliases let a parameter have any name, also one that pydantic keeps for itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._context: str | None = None
        self._names: dict[str, str] = {}
        fields: dict[str, Any] = {}
        for parameter, annotation in _parameters(function):
            if annotation is CallContext:
                self._context = parameter.name
                continue
            field = f"p{len(self._names)}"
            self._names[field] = parameter.name
            fields[field] = (annotation, _field(parameter, annotation))
        try:
            self._model: type[BaseModel] = create_model(
                function.__name__, __config__=ConfigDict(extra="forbid"), **fields
            )
        except PydanticUserError as error:
            raise ToolUnavailable(
                f"function {function.__qualname__!r} has a type hint that has no JSON Schema: "
                f"{error.message}"
            ) from error

    def schema(self) -> dict[str, Any]:
        document = self._model.model_json_schema(schema_generator=_Untitled)
        return Schemas(document).inline({k: v for k, v in document.items() if k != "$defs"})

    def convert(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """Keyword arguments; what the model left out keeps the function's own default."""
        try:
            values = self._model.model_validate(arguments)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidArguments(f"{where}: {first['msg']}" if where else first["msg"]) from None
        keywords = {self._names[field]: getattr(values, field) for field in values.model_fields_set}
        if self._context is not None:
            keywords[self._context] = context
        return keywords


class _Untitled(GenerateJsonSchema):
    """Titles repeat names: tokens that tell a model nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _parameters(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
    hints = get_type_hints(function, include_extras=True)
    found: list[tuple[inspect.Parameter, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolUnavailable(
                f"function {function.__qualname__!r} takes {str(parameter)!r}; a tool's parameters "
                "must be ordinary named ones"
            )
        if parameter.name not in hints:
            raise ToolUnavailable(
                f"function {function.__qualname__!r} has no type hint for {parameter.name!r}; "
                "add one: the tool's schema is made from them"
            )
        found.append((parameter, hints[parameter.name]))
    return found


def _field(parameter: inspect.Parameter, annotation: Any) -> Any:
    default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
    described = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    text = next((extra for extra in described if isinstance(extra, str)), None)
    return Field(default, alias=parameter.name, description=text)


async def _in_thread(function: Callable[..., Any], keywords: Mapping[str, Any]) -> Any:
    """Run `function` in a daemon thread.

    Not in an executor: a function that never returns would keep its worker, starve later calls
    and hold up the process at exit, where executors join their threads.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)

    def work() -> None:
        value: Any = None
        failure: BaseException | None = None
        try:
            value = function(**keywords)
        except BaseException as error:
            # A future refuses StopIteration, and SystemExit would end the thread in silence.
            carried = isinstance(error, Exception) and not isinstance(error, StopIteration)
            failure = error if carried else RuntimeError(f"{type(error).__name__}: {error}")
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failure)

    # What the function logs or traces is of this call.
    ours, name = contextvars.copy_context(), f"tool-{function.__name__}"
    threading.Thread(target=ours.run, args=(work,), name=name, daemon=True).start()
    return await answer
