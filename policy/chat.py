"""The border between messages and token ids: prompts of agent runs out, tool calls in.

Templates are the base model's own Jinja, rendered by transformers. What to say and which tools to
call is the caller's; sampling is the engine's.

A text cannot forge a turn. Before rendering, every string of a message or tool that spells a
control token (`<|im_end|>`) has it replaced by a mark, a random word that no one outside knows. The
rendered text is cut at the marks; only the pieces between, the template's own markup, are encoded
with control tokens, and in a mark's place go the ids of the spelling as ordinary characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from policy.tool_calls import ParsedCall, ParsedTurn, parse_turn

__all__ = ["ChatFormat", "ChatFormatError", "Message", "ParsedCall", "ParsedTurn"]
__all__ += ["load_chat_format", "load_tokenizer"]

Message = Mapping[str, Any]
"""One message, or one tool, in OpenAI's shape."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_CANARY = 'Hone 12,345: "café" \\u00e9\n\n\t{"id": 90817, "to": ["a_b", null]}  don\'t 日本 🙂'


class ChatFormatError(ValueError):
    """Messages that the template cannot say, or a tokenizer that cannot be used."""


class ChatFormat:
    """One base model's template and tokenizer. Stateless but for caches; cheap per call."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False) or not tokenizer.chat_template:
            raise ChatFormatError(
                f"{type(tokenizer).__name__} has no chat template, or no tokenizer.json; "
                "agent runs need both"
            )
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._nonce = f"q{secrets.token_hex(8)}q"
        self._mark = re.compile(self._nonce + r"(\d+)z")
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = [text for text, token in added.items() if token.special]
        self._spellings = [
            *special,
            *(t for t in added if t not in special and _MARKUP.fullmatch(t)),
        ]
        self._spelling_ids = [self._spell(text) for text in self._spellings]
        self._control = _any_of(special)
        self._markup = _any_of(self._spellings)
        self._declarations: dict[str, list[Message]] = {}
        self._object_arguments = self._takes_object_arguments()
        self._end_of_turn = self._find_end_of_turn()

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that closes an assistant turn; None if the template has none."""
        return None if self._end_of_turn is None else self._id(self._end_of_turn)

    def first_prompt(self, messages: Sequence[Message], tools: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks next.

        Raises ChatFormatError for messages that are not OpenAI's or that the template refuses.
        """
        return self._encode(self._render(self._said(messages), self._declared(tools)))

    def next_prompt(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        tools: Sequence[Message],
    ) -> list[int]:
        """Ids of the next prompt: `prompt_ids + completion_ids + suffix`, never re-tokenized.

        `messages` is all that was said: what `prompt_ids` says, the assistant message just sampled,
        and what was answered. The suffix is what the template writes behind that message. If the
        completion was cut before its end-of-turn token, the suffix begins with it. A template that
        now writes earlier turns differently (strips their thinking, say) gets a full re-render.
        """
        said, declared = self._said(messages), self._declared(tools)
        full = self._render(said, declared)
        tail = self._tail(full, said, declared)
        if tail is None or self._end_of_turn is None:
            return self._encode(full)
        end = self._id(self._end_of_turn)
        closing = [] if completion_ids and completion_ids[-1] == end else [end]
        return [*prompt_ids, *completion_ids, *closing, *self._encode(tail)]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer that somebody wrote: it may call tools, but spells no control token."""
        return self._encode(self._literal(text, self._control))

    def text(self, completion_ids: Sequence[int]) -> str:
        """The text of a completion, markup included, without the token that ended it."""
        text: str = self._backend.decode(list(completion_ids), skip_special_tokens=False)
        return text.removesuffix(self._end_of_turn or "")

    def parse(self, text: str) -> ParsedTurn:
        """Content and tool calls of a completion's text; faults are data, never exceptions."""
        return parse_turn(text.removesuffix(self._end_of_turn or ""))

    def _tail(self, full: str, said: list[Message], declared: list[Message] | None) -> str | None:
        """What `full` says behind its last assistant message; None if it rewrites what was said."""
        sampled = max((i for i, m in enumerate(said) if m["role"] == "assistant"), default=None)
        if sampled is None or self._end_of_turn is None:
            return None
        head = self._render(said[:sampled], declared)
        # Contents cannot spell the end-of-turn token here, so the first one found is the turn's.
        end = full.find(self._end_of_turn, len(head))
        if end < 0 or not full.startswith(head):
            return None
        if _unspaced(said[sampled]["content"]) not in _unspaced(full[len(head) : end]):
            return None
        return full[end + len(self._end_of_turn) :]

    def _render(
        self, said: Sequence[Message], declared: Sequence[Message] | None, *, ask: bool = True
    ) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                said, tools=declared, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError) as error:
            raise ChatFormatError(
                f"the chat template refused these messages: {error}; see the base model's card"
            ) from error
        return str(rendered)

    def _encode(self, rendered: str) -> list[int]:
        if self._nonce not in rendered:
            return self._ids(rendered)
        ids: list[int] = []
        for place, piece in enumerate(self._mark.split(rendered)):
            ids += self._spelling_ids[int(piece)] if place % 2 else self._ids(piece)
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _id(self, token: str) -> int:
        return int(self._backend.token_to_id(token))

    def _said(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            raise ChatFormatError("there are no messages; expected at least one")
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ChatFormatError(f"message role is {role!r}; expected one of {sorted(ROLES)}")
        # The owner and the model may write `<tool_call>`, which is no control token in every
        # vocabulary; users and tools may write no markup at all.
        trusted = role in ("system", "developer", "assistant")
        pattern = self._control if trusted else self._markup
        cleaned: dict[str, Any] = {
            key: self._literal(value, pattern)
            for key, value in message.items()
            if key not in ("role", "content", "tool_calls")
        }
        cleaned["role"] = role
        cleaned["content"] = self._literal(_plain_text(message.get("content")), pattern)
        if message.get("tool_calls"):
            cleaned["tool_calls"] = [
                self._literal(self._call(call), self._markup) for call in message["tool_calls"]
            ]
        return cleaned

    def _call(self, call: Message) -> Message:
        """OpenAI writes arguments as a JSON string; most templates want the object."""
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise ChatFormatError(
                f"tool call is {call!r:.200}; expected an object 'function' in it"
            )
        arguments = function.get("arguments")
        if self._object_arguments and isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                value = None
            arguments = value if isinstance(value, dict) else arguments
        return {**call, "function": {**function, "arguments": arguments}}

    def _declared(self, tools: Sequence[Message]) -> list[Message] | None:
        """The tools, cleaned. They are large and the same each turn: clean each list once."""
        if not tools:
            return None
        key = json.dumps(tools)
        if key not in self._declarations:
            if len(self._declarations) >= 64:
                self._declarations.clear()
            self._declarations[key] = [self._literal(tool, self._markup) for tool in tools]
        return self._declarations[key]

    def _literal(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """`value` with each control token that any of its strings spells replaced by its mark."""
        if isinstance(value, str):
            return pattern.sub(self._mark_of, _encodable(value))
        if isinstance(value, Mapping):
            return {
                self._literal(k, pattern): self._literal(item, pattern) for k, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._literal(item, pattern) for item in value]
        return value

    def _mark_of(self, match: re.Match[str]) -> str:
        return f"{self._nonce}{self._spellings.index(match[0])}z"

    def _spell(self, token: str) -> list[int]:
        """Ids that say the token's spelling without being any control token."""
        ways: tuple[Iterable[str], ...] = ((token[:1], token[1:]), token)
        forbidden = {self._id(text) for text in self._spellings} - {self._tokenizer.unk_token_id}
        for pieces in ways:
            ids = [i for piece in pieces for i in self._ids(piece)]
            if not forbidden & set(ids):
                return ids
        raise ChatFormatError(
            f"the tokenizer can write {token!r} only as a control token; texts could forge turns"
        )

    def _takes_object_arguments(self) -> bool:
        call = {"id": "call00000", "type": "function"}
        function = {"name": "look", "arguments": {"at": "it"}}
        said: list[Message] = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [{**call, "function": function}]},
        ]
        try:
            self._render(said, None, ask=False)
        except ChatFormatError:
            return False
        return True

    def _find_end_of_turn(self) -> str | None:
        said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": self._nonce}]
        behind = self._render(said, None, ask=False).partition(self._nonce)[2]
        match = self._control.search(behind)
        return match[0] if match else None


def load_chat_format(path: Path | str) -> ChatFormat:
    """The chat format of the base model in folder `path`."""
    return ChatFormat(load_tokenizer(path))


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of the base model in folder `path`, as vLLM and the trainer load it.

    transformers 5 gives some `model_type`s (qwen2) its own pre-tokenizer, whatever the folder says,
    and says nothing: the model would read other ids than it was trained on. Raises ChatFormatError
    where `tokenizer.json` and what was loaded disagree.
    """
    # Imports torch and takes seconds; the command line shall not pay for it.
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        _check_same(Tokenizer.from_file(str(file)), tokenizer, file)
    return tokenizer


def _check_same(own: Any, loaded: Any, file: Path) -> None:
    """Compare ids of the pieces of the vocabulary: each that is split otherwise tells."""
    every = max(1, own.get_vocab_size() // 2000)
    pieces = (own.decode([i]) for i in range(0, own.get_vocab_size(), every))
    for text in (_CANARY, *pieces):
        expected = own.encode(text, add_special_tokens=False).ids
        got = loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if got != expected:
            raise ChatFormatError(
                f"transformers loads {str(file)!r} as {type(loaded).__name__}, which gives {got} "
                f"for {text!r}; expected {expected}, as the file says. It ignores "
                "'tokenizer_class' for this model_type: set 'auto_map' to {'AutoTokenizer': "
                "[null, null]} in tokenizer_config.json, which it honours and runs no code for"
            )


def _plain_text(content: Any) -> str:
    """Message content as one string; None is empty, parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ChatFormatError(f"message content is {content!r:.200}; expected text or text parts")


def _encodable(text: str) -> str:
    """JSON can carry lone surrogates, which no tokenizer takes; they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    alternatives = [re.escape(text) for text in sorted(spellings, key=len, reverse=True)]
    return re.compile("|".join(alternatives) or r"(?!)")


def _unspaced(text: str) -> str:
    return "".join(text.split())
