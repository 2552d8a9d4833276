"""`hone export` and `hone prune`: the record itself, beside a running server or without one.

They open the database of the settings, so they are for whoever may do that; over HTTP a tenant's
admin has `GET /v1/export`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from feedback.database import read_url
from feedback.errors import RecordUnavailable
from feedback.export import ExportQuery, pages
from feedback.pruning import Pruning
from feedback.removal import Pruned
from feedback.store import Store
from policy.releases import Releases
from server.agents.spec import AgentFileError, AgentSpec, learning_of, load_agents
from server.commands.client import CommandError
from server.export.files import Add, Format, ParquetMissing, Table, whole_file, writing_rows
from server.export.rows import Contents, episode_row, feedback_rows
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export came to."""

    episodes: int
    events: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Targets:
    """Where an export goes."""

    format: Format
    episodes: Path | None
    """None: standard output."""
    feedback: Path | None
    """None: nowhere."""


def export(
    settings: Settings, query: ExportQuery, targets: Targets, contents: Contents
) -> Exported:
    """Write what is asked for. Raises CommandError; then no file has its name."""
    agents = agents_of(settings)
    store = open_record(settings)
    try:
        return _export(store, agents, query, targets, contents)
    except BrokenPipeError:
        # Whoever read had enough, as `head` does. Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandError("standard output was closed before the end") from None
    except OSError as error:
        raise CommandError(f"cannot write the export: {error}") from error
    except (ParquetMissing, RecordUnavailable) as error:
        raise CommandError(str(error)) from error
    finally:
        store.close()


def prune(
    settings: Settings, *, keep_days: float | None, keep_parked_days: float | None, is_trial: bool
) -> Pruned:
    """Delete what is old, or only count it; days default to the settings'. Raises CommandError."""
    storage = settings.storage
    if keep_days is None and keep_parked_days is None:
        keep_days, keep_parked_days = storage.keep_days, storage.keep_parked_days
    specs = {spec.policy: spec.learning for spec in agents_of(settings).values()}
    store = open_record(settings)
    try:
        pruning = Pruning(
            store, Releases(store.database), specs,
            keep_days=keep_days, keep_parked_days=keep_parked_days,
        )  # fmt: skip
        if not pruning.is_on:
            raise CommandError(
                "nothing is ever deleted: storage.keep_days is not set; say --days, for example "
                "`hone prune --days 90 --dry-run`"
            )
        batches = pruning.batches(time.time(), is_trial=is_trial)
        return sum(batches if is_trial else _paced(batches), start=Pruned())
    except RecordUnavailable as error:
        raise CommandError(str(error)) from error
    finally:
        store.close()


def target_format(named: Format | None, output: Path | None) -> Format:
    """The format that is asked for, else what the file's name says. Raises CommandError."""
    by_name: Format = "parquet" if output and output.suffix == ".parquet" else "jsonl"
    format = named or by_name
    if format == "parquet" and output is None:
        raise CommandError("Parquet cannot go to standard output; name a file with --output")
    return format


def moment(option: str, text: str | None) -> float | None:
    """Unix seconds of a time in ISO 8601, UTC unless it says otherwise. Raises CommandError."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(
            f"{option} is {text!r}; expected a time such as 2026-11-25 or 2026-11-25T09:30:00Z"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def agents_of(settings: Settings) -> dict[str, AgentSpec]:
    """The agents of the settings' folder, which say what a reward is. Raises CommandError."""
    if "agents" not in settings.model_fields_set and not settings.agents.is_dir():
        return {}
    try:
        return load_agents(settings.agents)
    except AgentFileError as error:
        raise CommandError(str(error)) from error


def open_record(settings: Settings) -> Store:
    """The record of the settings, which must be there. Raises CommandError."""
    url = read_url(settings.storage.database)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise CommandError(
            f"there is no record at {url.database!r}; run this where the server runs, or set "
            "storage.database"
        )
    try:
        return Store.open(settings.storage.database)
    except (RecordUnavailable, ValueError) as error:
        raise CommandError(str(error)) from error


def _paced(batches: Iterator[Pruned]) -> Iterator[Pruned]:
    """With a pause as long as each took: SQLite has one writer at a time, and no queue of them."""
    began = time.monotonic()
    for pruned in batches:
        yield pruned
        time.sleep(time.monotonic() - began)
        began = time.monotonic()


def _export(
    store: Store,
    agents: Mapping[str, AgentSpec],
    query: ExportQuery,
    targets: Targets,
    contents: Contents,
) -> Exported:
    episodes = events = 0
    began = time.monotonic()
    found = pages(
        store.database,
        query,
        lambda policy, agent: learning_of(agents, policy, agent).reward,
        now=time.time(),
    )
    with ExitStack() as stack:
        add_episodes = _open(stack, targets.episodes, targets.format, "episodes")
        add_events: Add | None = None
        if targets.feedback is not None:
            add_events = _open(stack, targets.feedback, targets.format, "feedback")
        for page in found:
            add_episodes([episode_row(one, contents) for one in page])
            episodes += len(page)
            if add_events is not None:
                said = [row for one in page for row in feedback_rows(one, contents)]
                add_events(said)
                events += len(said)
    return Exported(episodes, events, time.monotonic() - began)


def _open(stack: ExitStack, path: Path | None, format: Format, table: Table) -> Add:
    file = sys.stdout.buffer if path is None else stack.enter_context(whole_file(path))
    if path is None:
        stack.callback(sys.stdout.buffer.flush)
    return stack.enter_context(writing_rows(file, format, table))
