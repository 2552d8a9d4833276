"""`/v1/models`: every name that `model` may be, in OpenAI's shape, with what it stands for."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from server.access.caller import CallerOf
from server.errors import NotFound
from server.refusals import refusals
from server.routing import Model, ModelKind
from server.services import Services, ServicesOf
from server.wire import BodyOut

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelOut(BodyOut):
    """A name that `model` may be: of the base model, which has no adapter."""

    id: str = Field(description="The name.")
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, Unix seconds.")
    owned_by: Literal["hone"] = "hone"
    kind: ModelKind = Field(
        description="base; policy: its live version, or its canary; version: that one; agent."
    )
    max_model_len: int = Field(
        description="Tokens, at most, of a prompt and what is sampled after it."
    )


class AdapterModelOut(ModelOut):
    """A name that `model` may be: of a policy, or of a version that the engine holds."""

    adapter: str = Field(description="The version that is meant now, `policy@vN`.")


class AgentModelOut(AdapterModelOut):
    """A name that `model` may be: of an agent."""

    runs: str = Field(description="The path where it can be run with more than a chat tells.")


AnyModelOut = AgentModelOut | AdapterModelOut | ModelOut


class ModelsOut(BodyOut):
    """Names."""

    object: Literal["list"] = "list"
    data: list[AnyModelOut] = Field(description="The base model first.")


@router.get("")
async def list_models(services: ServicesOf, caller: CallerOf) -> ModelsOut:
    """The base model, policies, resident versions and agents."""
    known = services.routing.models(caller.tenant)
    return ModelsOut(data=[_card(model, services) for model in known])


@router.get("/{model:path}", responses=refusals(NotFound))
async def get_model(model: str, services: ServicesOf, caller: CallerOf) -> AnyModelOut:
    """One of them."""
    for known in services.routing.models(caller.tenant):
        if known.id == model:
            return _card(known, services)
    raise NotFound(
        f"model {model[:140]!r} does not exist; GET /v1/models lists those that do",
        code="model_not_found",
        param="model",
    )


def _card(model: Model, services: Services) -> AnyModelOut:
    plain = ModelOut(
        id=model.id,
        created=int(services.started_at),
        kind=model.kind,
        max_model_len=services.engine.max_model_len,
    )
    if model.adapter is None:
        return plain
    adapted = AdapterModelOut(**plain.model_dump(), adapter=str(model.adapter))
    if model.agent is None:
        return adapted
    return AgentModelOut(**adapted.model_dump(), runs=f"/v1/agents/{model.agent}/runs")
