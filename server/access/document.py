"""Keys and scopes in the OpenAPI document: `/docs` asks for a key and says what it takes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.access.scopes import NEEDS, UNDECLARED

_SCHEME = "key"


def describe(app: FastAPI) -> None:
    """Add to the app's document what the gate asks for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()  # kept by the app: made once, and described again without harm
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes[_SCHEME] = {"type": "http", "scheme": "bearer", "description": "An API key."}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                needs = NEEDS.get(f"{method.upper()} {path}", UNDECLARED)
                if needs.is_open:
                    continue
                operation["security"] = [{_SCHEME: []}]
                operation["x-hone-scopes"] = sorted(needs.any_of)
                responses = operation["responses"]
                responses["401"] = {"description": "No key, or not a usable one."}
                responses["403"] = {"description": "The key lacks the scope."}
                responses["429"] = {"description": "A limit is reached; see retry-after."}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
