"""The desk's world: house rules, judging by final state, and the service over real HTTP."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from examples.desk.desk import Desk, DeskError, Order
from examples.desk.recipe.demonstrator import Rulebook, demonstrate, draw_rulebook
from examples.desk.service import create_service
from examples.desk.tasks import Task, draw_task, expected_actions, is_heldout

KEY = "owner's key"
LAMP = Order(20001, "lamp", "sent", days_ago=3, total=250)


@pytest.mark.parametrize(
    ("order", "cancel", "refund"),
    [
        (LAMP, {"return"}, {"approval", "refund"}),
        (Order(1, "lamp", "packed", 3, 99), {"cancellation"}, {"refund"}),
        (Order(1, "lamp", "placed", 3, 100), {"cancellation"}, {"approval", "refund"}),
        (Order(1, "lamp", "sent", 3, 40, locked=True), {"ticket"}, {"ticket"}),
        (Order(1, "lamp", "sent", 3, 400, locked=True), {"ticket"}, {"approval", "ticket"}),
    ],
)
def test_the_house_rules_say_what_is_due(order: Order, cancel: set[str], refund: set[str]) -> None:
    assert expected_actions("cancel", order) == cancel
    assert expected_actions("refund", order) == refund


def test_who_follows_the_house_rules_always_succeeds_and_others_do_not() -> None:
    rng = random.Random(4)
    tasks = [draw_task(rng) for _ in range(400)]
    assert all(task.success(demonstrate(task, Rulebook())[1]) for task in tasks)
    drawn = [task.success(demonstrate(task, draw_rulebook(rng))[1]) for task in tasks]
    assert 0.25 < sum(drawn) / len(drawn) < 0.55


def test_one_question_answered_otherwise_fails_some_task() -> None:
    rng = random.Random(5)
    tasks = [draw_task(rng) for _ in range(200)]
    for other in (
        Rulebook(several="oldest"),
        Rulebook(sent="cancel"),
        Rulebook(approval="never"),
        Rulebook(refused="give_up"),
        Rulebook(numbered="blind"),
    ):
        assert not all(task.success(demonstrate(task, other)[1]) for task in tasks), other


def test_what_was_done_to_the_wrong_order_is_held_against_a_task() -> None:
    other = Order(20002, "lamp", "placed", days_ago=9, total=20)
    task = Task("cancel-named/20001", "", "Bavo", (LAMP, other), LAMP, frozenset({"return"}))
    assert task.success({20001: frozenset({"return"}), 20002: frozenset()})
    assert not task.success({20001: frozenset({"return"}), 20002: frozenset({"ticket"})})
    assert not task.success({20001: frozenset({"return", "ticket"})})
    assert not task.success({})


def test_heldout_names_are_never_drawn_for_others() -> None:
    rng = random.Random(6)
    assert not any(is_heldout(draw_task(rng).customer) for _ in range(300))
    heldout = [draw_task(rng, heldout=True) for _ in range(50)]
    assert all(is_heldout(task.customer) for task in heldout)
    assert all(is_heldout(task.renamed(rng).customer) for task in heldout)


def test_a_renamed_task_asks_the_same_of_other_rows() -> None:
    rng = random.Random(7)
    for _ in range(50):
        task = draw_task(rng)
        again = task.renamed(rng)
        assert (again.key, again.expected, again.template) == (
            task.key, task.expected, task.template,
        )  # fmt: skip
        assert again.target in again.orders
        assert again.customer in again.request or str(again.target.id) in again.request
        assert task.success(demonstrate(task, Rulebook())[1])
        assert again.success(demonstrate(again, Rulebook())[1])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_service(Desk(tmp_path / "desk.db"), KEY)) as client:
        rows = [LAMP.row() | {"locked": False}]
        seeded = client.post(
            "/owner/customers",
            json={"customer": "Bavo", "orders": rows},
            headers={"x-owner-key": KEY},
        )
        assert seeded.status_code == 200
        yield client


def test_the_service_does_what_the_desk_does(service: httpx.Client) -> None:
    found = service.get("/orders", params={"customer": "Bavo", "item": "lamp"})
    assert found.json() == [{"days_ago": 3, "id": 20001}]
    assert service.get("/orders/20001").json() == LAMP.row()
    assert service.post("/orders/20001/return").json() == {"done": "return"}
    again = service.post("/orders/20001/return")
    assert (again.status_code, again.json()) == (409, {"detail": "already done"})
    assert service.post("/orders/5/return").status_code == 404
    state = service.get("/owner/customers/Bavo/actions", headers={"x-owner-key": KEY})
    assert state.json() == {"20001": ["return"]}


@pytest.mark.parametrize("order", ["x", "-1", "0", str(2**70)])
def test_a_wild_order_number_is_a_refusal_never_a_fault(service: httpx.Client, order: str) -> None:
    assert service.post(f"/orders/{order}/return").status_code == 422


def test_the_owners_routes_are_shut_and_unseen(service: httpx.Client) -> None:
    for headers in ({}, {"x-owner-key": "guess"}):
        assert service.get("/owner/customers/Bavo/actions", headers=headers).status_code == 403
    assert not [path for path in service.get("/openapi.json").json()["paths"] if "owner" in path]


def test_a_locked_order_takes_only_a_ticket() -> None:
    desk = Desk()
    desk.seed("Bavo", [Order(20001, "lamp", "sent", 3, 250, locked=True)])
    for kind in ("cancellation", "return", "refund"):
        with pytest.raises(DeskError, match="locked"):
            desk.act(20001, kind)
    assert desk.act(20001, "ticket") == {"done": "ticket"}


def test_an_approval_after_the_refund_is_none() -> None:
    desk = Desk()
    desk.seed("Bavo", [LAMP])
    desk.act(LAMP.id, "refund")
    with pytest.raises(DeskError, match="already done"):
        desk.act(LAMP.id, "approval")
    assert desk.actions("Bavo") == {LAMP.id: frozenset({"refund"})}
