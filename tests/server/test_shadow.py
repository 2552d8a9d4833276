"""Shadow mode: copies go to the canary, are logged, are never served, and give way to traffic."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console

from feedback.outcomes import Copies
from feedback.spec import CanarySpec, ShadowSpec
from feedback.types import Turn
from policy.engine import EngineError
from policy.releases import Canary
from policy.scripted import ScriptedEngine
from policy.types import AdapterRef, Delta, Sampling
from server.canary_evidence import weigh_copies
from server.commands.views import releases_view
from server.shadow import drawn
from server.shadow_figures import Copied, ShadowFigures
from tests.server.house import (
    AGENT,
    House,
    byte_chat,
    running,
    scripted_engine,
    scripted_parts,
    settings_in,
    write_agent,
)

TRIED = AdapterRef("desk", 1)
SHADOWED = {"stages": [0, 0.5, 1.0], "min_episodes": 5, "shadow": {"share": 1.0}}


class Fragile(ScriptedEngine):
    """Fails whenever version 1 is asked, if told to."""

    fails = False

    async def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, adapter: AdapterRef
    ) -> AsyncIterator[Delta]:
        if adapter == TRIED and self.fails:
            raise EngineError("it lost the request")
        async for delta in super().stream(prompt_ids, sampling, adapter=adapter):
            yield delta


def fragile(seconds_per_token: float = 0.0) -> Fragile:
    like = scripted_engine()
    return Fragile(
        like._script, byte_chat().text, eos_id=like._eos_id, max_model_len=4096,
        seconds_per_token=seconds_per_token,
    )  # fmt: skip


@pytest.fixture
def open_house(tmp_path: Path) -> Callable[..., Any]:
    """A server whose agent has a canary with the given spec."""

    def make(canary: dict[str, Any], engine: ScriptedEngine | None = None) -> Any:
        agent = yaml.safe_load(AGENT)
        agent["training"]["canary"] = canary
        write_agent(tmp_path, yaml.safe_dump(agent))
        parts = scripted_parts(tmp_path, engine=lambda *_: engine or scripted_engine())
        return running(settings_in(tmp_path), parts)

    return make


def on_trial(house: House, share: float) -> None:
    releases = house.services.releases
    house.publish()
    house.until(lambda: releases.state("desk").loaded == (TRIED,))
    releases.try_out(TRIED, share, actor="trainer", reason="gate passed")
    house.until(lambda: house.services.controller.on_trial("desk") is not None)


def run(house: House, said: str, **body: Any) -> dict[str, Any]:
    answer = house.http.post("/v1/agents/desk/runs", json={"input": said, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def copies(house: House) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = house.http.get("/v1/episodes?purpose=shadow&limit=100").json()
    return listed["data"]  # type: ignore[call-overload,no-any-return]  # JSON


def test_copies_are_logged_and_never_served_trained_on_or_given_tools(
    open_house: Callable[..., Any],
) -> None:
    with open_house({**SHADOWED, "min_episodes": 1000}) as house:
        on_trial(house, 0.0)
        served = run(house, 'CALL look_up {"order_id": "7"}')
        assert served["model"] == "desk@v0"
        house.until(lambda: [c["status"] for c in copies(house)] == ["ended"])
        [listed] = copies(house)
        copy = house.episode(listed["id"])
        assert (copy["model"], copy["stop_reason"]) == ("desk@v1", "finished")
        assert copy["metadata"] == {"shadow_of": served["id"]}
        [turn] = copy["turns"]
        first = house.episode(served["id"])["turns"][0]
        assert turn["prompt_token_ids"] == first["prompt_token_ids"]
        assert "look_up" in turn["text"]
        assert turn["tool_calls"] == [], "one turn, and nothing is called"

        assert house.chat("desk", [{"role": "user", "content": "hello"}]).status_code == 200
        house.until(lambda: len(copies(house)) == 2)
        house.until(lambda: policy(house)["canary"]["shadow"]["copies"] == 2)
        figures = policy(house)["canary"]["shadow"]
        assert (figures["agreement"], figures["failed"], figures["skipped"]) == (1.0, 0.0, 0.0)
        assert figures["tokens"] == figures["served_tokens"] > 0
        assert figures["logprob_gap"] != 0

        console = Console(record=True, width=200)
        console.print(releases_view(policy(house)))
        assert "shadow: copies=2 failed=0 skipped=0 agreement=1" in console.export_text()

        run(house, "an exam", purpose="evaluation")
        run(house, "pinned", model="desk@v1")
        time.sleep(0.2)
        assert len(copies(house)) == 2, (
            "held-out tasks and the canary's own episodes are not copied"
        )
        readiness = house.http.get("/v1/training").json()["policies"][0]["counts"]
        assert readiness["waiting_for_outcome"] == 2, "the two that were served live, and no copy"
        refused = house.http.post("/v1/agents/desk/runs", json={"input": "x", "purpose": "shadow"})
        assert refused.status_code == 400, "a client cannot make one"
        asked = {"metadata": {"purpose": "shadow"}}
        assert house.chat("desk", [{"role": "user", "content": "x"}], **asked).status_code == 400


def policy(house: House) -> dict[str, Any]:
    told: dict[str, Any] = house.http.get("/v1/policies/desk").json()
    return told


def test_after_enough_copies_a_canary_at_stage_0_gets_traffic(
    open_house: Callable[..., Any],
) -> None:
    with open_house(SHADOWED) as house:
        on_trial(house, 0.0)
        releases = house.services.releases
        for number in range(5):
            assert releases.state("desk").canary == Canary(TRIED, 0.0)
            run(house, f"question {number}")
            house.until(lambda n=number: len(copies(house)) == n + 1)
        house.until(lambda: releases.state("desk").canary == Canary(TRIED, 0.5))
        assert releases.events("desk")[-1].reason == "0 of 5 copies failed"


def test_a_canary_that_fails_its_copies_goes_back_and_costs_nobody_an_answer(
    open_house: Callable[..., Any],
) -> None:
    engine = fragile()
    with open_house(SHADOWED, engine) as house:
        on_trial(house, 0.0)
        engine.fails = True
        for number in range(5):
            run(house, f"question {number}")
            house.until(lambda n=number: len(copies(house)) == n + 1)
        assert {copy["stop_reason"] for copy in copies(house)} == {"engine_error"}
        house.until(lambda: house.services.releases.state("desk").canary is None)
        assert "5 of 5 copies failed" in house.services.releases.events("desk")[-1].reason


def test_copies_are_bounded_and_traffic_does_not_wait_for_them(
    open_house: Callable[..., Any],
) -> None:
    spec = {**SHADOWED, "min_episodes": 1000, "shadow": {"share": 1.0, "max_concurrent": 1}}
    with open_house(spec, fragile(seconds_per_token=0.02)) as house:
        on_trial(house, 0.0)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: run(house, f"question {number}"), range(4)))
        assert len(house.services.shadow._running["desk"]) <= 1
        house.until(lambda: policy(house)["canary"]["shadow"]["copies"] >= 1)
        figures = policy(house)["canary"]["shadow"]
        assert figures["copies"] + figures["skipped"] == 4
        assert figures["skipped"] >= 2


def test_without_a_shadow_nothing_is_copied(house: House) -> None:
    on_trial(house, 0.5)
    for number in range(6):
        run(house, f"question {number}")
    time.sleep(0.2)
    assert copies(house) == []
    assert policy(house)["canary"]["shadow"] is None


def test_the_figures_by_hand() -> None:
    def turn(tokens: int) -> Turn:
        return Turn(0, (1,), (2,) * tokens, None, "", "stop")

    figures = ShadowFigures(TRIED, failed=1, skipped=2)
    figures.add(Copied(True, turn(4), turn(6), gap=0.5))
    figures.add(Copied(False, turn(2), turn(1), gap=None))
    figures.add(Copied(True, turn(3), turn(2), gap=-0.1))
    assert figures.summary() == {
        "copies": 4, "failed": 1, "skipped": 2, "agreement": pytest.approx(2 / 3),
        "tokens": 3.0, "served_tokens": 3.0, "logprob_gap": pytest.approx(0.2),
    }  # fmt: skip
    assert ShadowFigures(TRIED).summary() == {"copies": 0, "failed": 0, "skipped": 0}


def test_what_copies_decide() -> None:
    spec = CanarySpec(stages=(0, 1), min_episodes=20, shadow=ShadowSpec(max_failed=0.05))
    assert weigh_copies(Copies(19, 0), spec).step == "hold"
    assert weigh_copies(Copies(20, 1), spec).step == "forward"
    assert weigh_copies(Copies(20, 2), spec).step == "back"


def test_stage_0_needs_a_shadow_and_the_share_is_drawn_by_episode() -> None:
    with pytest.raises(ValidationError, match="no shadow is set"):
        CanarySpec(stages=(0, 0.5, 1))
    for stages in ((0,), (), (0, 0, 1), (0.005, 1), (0.5,)):
        with pytest.raises(ValidationError, match="expected shares"):
            CanarySpec(stages=stages, shadow=ShadowSpec())
    taken = sum(drawn(f"e{number}", 0.25) for number in range(4000))
    assert 900 < taken < 1100
