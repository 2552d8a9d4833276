"""The short form: some kills, power losses and failing calls of each scenario; `make faults` has
more. What must fail does: the controls show that the method sees a loss."""

from __future__ import annotations

from typing import Any

from tests.faults.conftest import Campaign

RECORD = (
    "kill:ingest:10", "kill:claim:8", "kill:publish:10",
    "power:ingest:30", "power:ingest-checkpointing:20", "power:claim:12", "power:publish:30",
    "fail:ingest:1", "fail:claim:1", "fail:publish:1",
)  # fmt: skip
TRAINER = ("kill:checkpoint:6", "kill:update:1", "power:checkpoint:20", "power:update:2")
CONTROLS = ("power:ingest-normal:40", "power:publish-unsynced:20")
CLEAR = {"DiskFailed", "OutcomeUnknown", "RecordUnavailable", "OSError", "OperationalError"}
"""Errors that say what is wrong with the disk. The last one only as the record is opened."""


def check(figures: dict[str, Any]) -> None:
    assert figures["broken"] and not any(figures["broken"].values()), figures["examples"]
    assert figures["faults"] > 0
    assert set(figures["told"]) <= CLEAR, figures["told"]


def test_the_record_and_publications_keep_their_promises(campaign: Campaign) -> None:
    for figures in campaign(*RECORD):
        check(figures)
        assert figures["acknowledged"] > 0


def test_the_trainer_keeps_its_promises(campaign: Campaign) -> None:
    for figures in campaign(*TRAINER):
        check(figures)


def test_the_method_sees_what_is_lost_without_a_sync(campaign: Campaign) -> None:
    ingest, publish = campaign(*CONTROLS)
    assert ingest["broken"]["acknowledged lost"] > 10, "a database that commits without an fsync"
    assert publish["broken"]["acknowledged lost"] > 0
    assert publish["broken"]["torn"] > 0, "a name for a folder whose files are not on disk yet"
