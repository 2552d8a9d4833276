"""A webhook source as its owner writes it: one strict YAML file, read and checked before serving.

Declares only. Secrets are named here, as `${env:NAME}` or `${file:PATH}`, and read by
`feedback.webhooks.source`; expressions are obeyed by `feedback.webhooks.mapping`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jmespath
import yaml
from jmespath.exceptions import JMESPathError
from jmespath.functions import Functions
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from feedback.references import is_reference
from feedback.spec import Strict
from feedback.types import LARGEST_VALUE, METRIC_PATTERN, FeedbackKind
from feedback.webhooks.signatures import PUBLIC_KEY, Scheme
from policy.ownership import DEFAULT_TENANT, TENANT_PATTERN

SOURCE_PATTERN = r"^[a-z][a-z0-9_-]{0,62}$"


class WebhookFileError(ValueError):
    """A webhook's file cannot be used; the message names the file, the key and what to do."""


def _expression(text: str) -> str:
    try:
        parsed = jmespath.compile(text).parsed
    except JMESPathError as error:
        raise ValueError(f"is not JMESPath: {error}") from error
    for name in _functions(parsed):
        # The library finds out only once a payload arrives.
        if name not in Functions.FUNCTION_TABLE:
            raise ValueError(f"is not JMESPath: there is no function {name}()")
    return text


def _functions(node: Mapping[str, Any]) -> Iterator[str]:
    if node["type"] == "function_expression":
        yield node["value"]
    for child in node["children"]:
        if isinstance(child, Mapping):
            yield from _functions(child)


def _reference(text: str) -> str:
    if not is_reference(text) and not _is_public(text):
        raise ValueError("expected ${env:NAME} or ${file:PATH}: a secret has no place in this file")
    return text


def _is_public(text: str) -> bool:
    return text.startswith(PUBLIC_KEY)


def _words(values: object) -> object:
    for word in values if isinstance(values, Mapping) else ():
        if not isinstance(word, str):
            raise ValueError(f"YAML reads a word as {word!r}; put it in quotes")
    return values


Expression = Annotated[str, Field(strict=True, max_length=1000), AfterValidator(_expression)]
Metric = Annotated[str, Field(pattern=METRIC_PATTERN, strict=True)]
Bounded = Annotated[float, Field(ge=-LARGEST_VALUE, le=LARGEST_VALUE)]


class Computed(Strict):
    """A name that the payload says, where a plain string would be a constant."""

    jmespath: Expression


class MappingSpec(Strict):
    """From a payload to feedback events. All expressions are JMESPath."""

    when: Expression | None = Field(
        None, description="Payloads for which it is not true are ignored."
    )
    each: Expression | None = Field(
        None,
        description="A list in the payload, each item an event; the expressions below then see "
        "`item` and `payload`.",
    )
    episode_id: Expression | None = None
    task_key: Expression | None = Field(None, description="A task, in place of an episode.")
    better: Expression | None = Field(None, description="The episode preferred to `worse`.")
    worse: Expression | None = None
    turn: Expression | None = None
    metric: Metric | Computed = "success"
    value: Expression | bool | Bounded | None = Field(
        None, description="A number or a boolean. With `better` and `worse`: null retracts."
    )
    correction: Expression | None = Field(None, description="What should have been said.")
    values: Annotated[dict[str, Bounded | bool | None] | None, BeforeValidator(_words)] = Field(
        None, min_length=1, description="What the words that `value` gives are worth."
    )
    event_time: Expression | None = Field(
        None, description="Unix seconds, or ISO 8601 with an offset. None: the time of arrival."
    )
    event_time_unit: Literal["seconds", "milliseconds"] = "seconds"
    comment: Expression | None = None

    @model_validator(mode="after")
    def _says_one_thing_of_one_target(self) -> Self:
        is_pair = self.better is not None and self.worse is not None
        if (self.better is None) != (self.worse is None):
            raise ValueError("better and worse belong together")
        if sum((self.episode_id is not None, self.task_key is not None, is_pair)) != 1:
            raise ValueError("expected one of `episode_id`, `task_key`, or `better` and `worse`")
        if is_pair and (self.correction is not None or self.turn is not None):
            raise ValueError("a preference between two episodes has no `correction` and no `turn`")
        if self.value is not None and self.correction is not None:
            raise ValueError("a payload gives a `value` or a `correction`, not both")
        if not is_pair and (self.value, self.correction, self.comment) == (None, None, None):
            raise ValueError("expected a `value`, a `correction` or a `comment`")
        return self

    @property
    def kind(self) -> FeedbackKind:
        """What each event is."""
        if self.better is not None:
            return "preference"
        if self.correction is not None:
            return "correction"
        return "comment" if self.value is None else "value"

    @model_validator(mode="after")
    def _words_come_from_the_payload(self) -> Self:
        if self.values is not None and not isinstance(self.value, str):
            raise ValueError("`values` says what words are worth, but `value` is a constant")
        return self


class WebhookSpec(Strict):
    """One source of webhooks."""

    name: str = Field(pattern=SOURCE_PATTERN)
    tenant: str = Field(
        DEFAULT_TENANT, pattern=TENANT_PATTERN, description="Whose episodes it speaks of."
    )
    scheme: Scheme
    secrets: tuple[Annotated[str, AfterValidator(_reference)], ...] = Field(
        min_length=1, max_length=8, description="Any of them may sign: that is how to rotate."
    )
    tolerance_seconds: float = Field(
        300, gt=0, le=86_400, description="How far the sender's time of signing may be off."
    )
    max_body_bytes: int = Field(
        2**20, ge=1, description="Larger bodies are refused before they are hashed."
    )
    mapping: MappingSpec

    @model_validator(mode="after")
    def _only_public_keys_stand_in_the_file(self) -> Self:
        if self.scheme != "standard" and any(map(_is_public, self.secrets)):
            raise ValueError(f"scheme {self.scheme!r} has no public keys; its secrets are secret")
        return self


def load_webhook(path: Path) -> WebhookSpec:
    """Read one source's file. Raises WebhookFileError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WebhookFileError(f"{path}: cannot be read: {type(error).__name__}") from None
    except (yaml.YAMLError, ValueError) as error:
        # Its own words would quote the line, in which a secret may stand.
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" (line {mark.line + 1})"
        raise WebhookFileError(f"{path}: is not YAML{line}") from None
    if not isinstance(data, Mapping):
        raise WebhookFileError(f"{path}: is a {type(data).__name__}; expected keys such as 'name:'")
    try:
        return WebhookSpec.model_validate(data)
    except ValidationError as error:
        raise WebhookFileError(_worded(path, error)) from None


def load_webhooks(folder: Path) -> dict[str, tuple[Path, WebhookSpec]]:
    """Every `*.yaml` and `*.yml` of `folder`, by source name. Raises WebhookFileError."""
    if not folder.is_dir():
        raise WebhookFileError(f"{folder}: is not a folder; expected one that holds sources' files")
    found: dict[str, tuple[Path, WebhookSpec]] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml")):
        spec = load_webhook(path)
        if spec.name in found:
            raise WebhookFileError(
                f"{path}: name: {spec.name!r} is already the name in {found[spec.name][0]}"
            )
        found[spec.name] = (path, spec)
    return found


def _worded(path: Path, error: ValidationError) -> str:
    # What was got is never repeated: it may be a secret in the wrong place.
    lines = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        key = ".".join(str(part) for part in one["loc"]) or "the file"
        said = {"extra_forbidden": "unknown key; check its spelling", "missing": "is missing"}
        lines.append(f"{path}: {key}: {said.get(one['type'], one['msg'])}")
    return "\n".join(lines)
