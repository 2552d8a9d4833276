"""What `model` may name: a policy, a pinned version, the base, an agent; the same on each route."""

from __future__ import annotations

from typing import Any

import pytest

from tests.endpoint.conftest import Site
from tests.endpoint.test_token_truth import ASK

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_models_lists_every_kind_of_name(site: Site) -> None:
    listed = {model.id: model.to_dict() for model in (await site.client.models.list()).data}
    kinds = {name: model["kind"] for name, model in listed.items()}
    assert kinds == {
        "pocket": "base", "desk": "policy", "desk@v1": "version", "desk@v2": "version",
        "agent:desk": "agent",
    }  # fmt: skip
    assert listed["desk"]["adapter"] == "desk@v2"
    for name in kinds:
        assert (await site.client.models.retrieve(name)).id == name


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("desk", "desk@v2"),
        ("desk@v2", "desk@v2"),
        ("desk@v1", "desk@v1"),
        ("desk@v0", "desk@v0"),
        ("pocket", "base@v0"),
        ("base", "base@v0"),
    ],
)
@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
async def test_a_name_is_answered_by_its_adapter(
    site: Site, route: str, model: str, adapter: str
) -> None:
    reply: Any
    if route == "chat":
        reply = await site.client.chat.completions.create(
            model=model, messages=ASK, temperature=0, max_completion_tokens=6
        )
    elif route == "completions":
        reply = await site.client.completions.create(
            model=model, prompt="Order", temperature=0, max_tokens=6
        )
    else:
        reply = await site.client.responses.create(
            model=model, input=ASK, temperature=0, max_output_tokens=6
        )
    assert reply.model == ("pocket" if adapter.endswith("@v0") else adapter)
    episode = await site.episode(reply.metadata["episode_id"])
    assert episode["model"] == adapter
    [said] = site.said
    [turn] = episode["turns"]
    assert turn["token_ids"] == said.token_ids


async def test_an_agent_is_run_under_its_policys_live_version(site: Site) -> None:
    chat = await site.client.chat.completions.create(model="agent:desk", messages=ASK)
    response = await site.client.responses.create(model="agent:desk", input=ASK)
    pinned = await site.client.responses.create(
        model="agent:desk", input=ASK, metadata={"pin": "desk@v1"}
    )
    assert [chat.model, response.model, pinned.model] == ["desk@v2", "desk@v2", "desk@v1"]
    for reply in (chat, response, pinned):
        assert reply.metadata is not None
        episode = await site.episode(reply.metadata["episode_id"])
        assert (episode["agent"], episode["model"]) == ("desk", reply.model)
