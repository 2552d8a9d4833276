"""How the commands talk to a running server, and what they say if it does not answer."""

from __future__ import annotations

from typing import Any

import httpx

from server.settings import Settings


class CommandError(Exception):
    """A command cannot do what was asked; the message is for the operator."""


class Client:
    """A running server's own API."""

    def __init__(self, settings: Settings, url: str | None) -> None:
        http = settings.http
        self.url = (url or http.url).rstrip("/").removesuffix("/v1")
        key = http.api_key
        self.headers = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
        self._http = httpx.Client(base_url=self.url, headers=self.headers, timeout=30)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        given = {key: value for key, value in query.items() if value is not None}
        return self._answer("GET", path, params=given)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer("POST", path, json=body)

    def _answer(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
            answer = response.json()
        except httpx.HTTPError as error:
            raise CommandError(
                f"no server answers at {self.url} ({error}); start one with `hone serve`, or "
                "point to it with --url"
            ) from error
        except ValueError as error:
            raise CommandError(f"{self.url} is no Hone server: it answers no JSON") from error
        if response.is_error:
            told = answer.get("error", {}) if isinstance(answer, dict) else {}
            raise CommandError(told.get("message") or f"{method} {path}: {response.status_code}")
        if not isinstance(answer, dict):
            raise CommandError(f"{self.url} is no Hone server: {method} {path} answers no object")
        return answer
