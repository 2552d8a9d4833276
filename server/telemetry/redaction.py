"""Takes secrets and personal data out of content before it is exported.

Patterns find what looks like one, so this is a net and not a proof: content that must not leave is
content that is not exported, which is the default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 16_384
"""Characters of one exported text."""

_PATTERNS = (
    (r"-----BEGIN [A-Z ]{1,40}-----[^-]*-----END [A-Z ]{1,40}-----", "key"),
    (r"(?i)\b(?:bearer|basic)\s+[a-z0-9._~+/=-]{8,}", "credential"),
    (r"\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*", "credential"),
    (
        r"\b(?:sk|pk|rk|hf|npm|ghp|gho|ghs|glpat|github_pat|xox[abprs]|AKIA|ASIA|AIza)"
        r"[\w-]{12,}",
        "key",
    ),
    (
        r"(?i)\b(?:api[_-]?key|[a-z_-]{0,20}token|secret|password|passwd)"
        r"\b[\"']?\s{0,3}[:=]\s{0,3}[\"']?[^\s\"',;}]{4,}",
        "secret",
    ),
    (r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+", "email"),
    (r"(?<!\d)\d(?:[ -]?\d){8,}(?!\d)", "number"),
)
_SECRET_KEY = re.compile(r"(?i)(?:password|passwd|secret|token|api[_-]?key|authorization|cookie)\Z")


class Redactor:
    """Replaces what matches a pattern by `[redacted:KIND]`."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        named = (*_PATTERNS, *((pattern, "custom") for pattern in more))
        self._patterns = [(re.compile(pattern), f"[redacted:{kind}]") for pattern, kind in named]

    def text(self, text: str) -> str:
        """`text` redacted, then cut: a secret that is cut in two would not be found."""
        for pattern, instead in self._patterns:
            text = pattern.sub(instead, text)
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    def json(self, value: Any) -> str:
        """`value` as JSON with every string, and every number that is long, redacted."""
        return json.dumps(self._leaves(value), ensure_ascii=False, default=str)

    def _leaves(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): "[redacted:secret]"
                if _SECRET_KEY.search(str(key))
                else self._leaves(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._leaves(inner) for inner in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            told = self.text(str(value))
            return value if told == str(value) else told
        return value
