"""The record for asyncio: many awaiting tasks, one writer thread, one transaction a batch.

An await returns only after COMMIT, so that what was acknowledged is on disk; sharing a commit
among everybody who waits is what makes that cheap. An episode's calls keep their order. Reads, and
all that is not on the serving path, go to `feedback.store`. While the database cannot be reached,
writes wait for some seconds; then they fail with RecordUnavailable, and none was recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from feedback import episodes, events, run_record
from feedback.database import has_committed, transaction_id, writing
from feedback.episodes import Ending
from feedback.errors import DiskFailed, OutcomeUnknown, RecordError, RecordUnavailable
from feedback.events import Receipt
from feedback.runs import NewRun, Run, RunCall
from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, ToolCall, Turn
from feedback.wakeup import InProcess, Wakeup

_MOST = 256
"""Writes that share a transaction: enough to spread the commit's cost, few enough to be quick."""

_PATIENCE_SECONDS = 10.0
"""How long a batch waits for a database that cannot be reached: a restart of it takes less."""
_PAUSE_SECONDS = 0.2

_REFUSALS = (
    RecordError,
    ValueError,
    TypeError,
    OverflowError,
    IntegrityError,
    DataError,
    ProgrammingError,
)
"""What one malformed write causes, and what leaves its neighbours' writes in place."""


class LogClosed(Exception):
    """The log takes no more writes."""


class _Kind(IntEnum):
    """Of writes, in the order in which a batch records them.

    All but steps are recorded together, several times quicker than one by one. An episode's begin
    comes before its steps, its end after them; what feedback says does not depend on order.
    """

    BEGIN = auto()
    STEP = auto()
    END = auto()
    FEEDBACK = auto()


_OUTCOMES = (_Kind.END, _Kind.FEEDBACK)
"""What somebody may wait for."""


@dataclass(slots=True)
class _Write:
    """One awaited call, and then its outcome."""

    kind: _Kind
    items: Sequence[Any]
    """What is recorded; a step has none."""
    apply: Callable[[Connection, Sequence[Any]], Any]
    """Records items, also those of other writes of its kind; what it returns is in their order."""
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    result: Any = None
    error: BaseException | None = None


class Log:
    """Group commit over a store. A refused write fails alone; the rest of its batch is kept.

    A task that is cancelled while it awaits does not take its write back. What an episode's `owner`
    writes is refused (EpisodeTaken) once another has taken it over; None asks for no owner.
    """

    def __init__(
        self, store: Store, wakeup: Wakeup | None = None, *, owner: str | None = None
    ) -> None:
        self._owner = owner
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        # A daemon: a process that fails before it closes its log must end, and what is lost then
        # was acknowledged to nobody.
        self._thread = threading.Thread(
            target=_write_batches,
            args=(writing(store.database), self._queue, wakeup or InProcess()),
            name="hone-log",
            daemon=True,
        )
        self._thread.start()

    async def begin(self, episode: Episode) -> None:
        """As `Store.begin`."""
        await self._submit(_Kind.BEGIN, [episode], partial(episodes.begin, owner=self._owner))

    async def append_turn(self, episode_id: str, turn: Turn) -> None:
        """As `Store.append_turn`."""
        await self._step(partial(episodes.append_turn, episode_id=episode_id, turn=turn))

    async def end(self, episode_id: str, stop_reason: str, ended_at: float) -> None:
        """As `Store.end`."""
        ending = Ending(episode_id, stop_reason, ended_at)
        await self._submit(_Kind.END, [ending], partial(run_record.end, owner=self._owner))

    async def begin_run(self, episode: Episode, run: NewRun) -> None:
        """As `begin`, for an agent's run."""
        await self._step(partial(run_record.begin, episode=episode, run=run))

    async def resume_run(self, run: Run) -> None:
        """A run that was queued, waited, or lost its server goes on."""
        await self._step(partial(run_record.start, episode_id=run.episode.id))

    async def intend(self, episode_id: str, turn: Turn, calls: Sequence[RunCall]) -> None:
        """As `append_turn`, before the turn's calls are made."""
        await self._step(partial(run_record.intend, episode_id=episode_id, turn=turn, calls=calls))

    async def make(self, episode_id: str, call_ids: Sequence[str]) -> None:
        """Calls that were approved are made now."""
        await self._step(partial(run_record.make, episode_id=episode_id, call_ids=call_ids))

    async def answer(self, episode_id: str, call: ToolCall) -> None:
        """One call of a turn is answered; others are under way."""
        await self._step(partial(run_record.answer, episode_id=episode_id, call=call))

    async def complete(self, episode_id: str, turn: Turn) -> None:
        """All calls of a turn are answered."""
        await self._step(partial(run_record.complete, episode_id=episode_id, turn=turn))

    async def pause(self, episode_id: str, waits_until: float) -> list[RunCall]:
        """As `feedback.run_record.pause`."""
        calls: list[RunCall] = await self._step(
            partial(run_record.pause, episode_id=episode_id, waits_until=waits_until)
        )
        return calls

    async def add_feedback(self, said: Sequence[FeedbackEvent]) -> list[Receipt]:
        """As `Store.add_feedback`."""
        receipts: list[Receipt] = await self._submit(_Kind.FEEDBACK, said, events.add)
        return receipts

    def close(self) -> None:
        """Write what was submitted, then stop; later writes raise LogClosed. May be repeated."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    async def _step(self, apply: Callable[..., Any]) -> Any:
        """Submit what is recorded by itself, under our owner's name."""
        return await self._submit(
            _Kind.STEP, (), lambda connection, _: apply(connection, owner=self._owner)
        )

    async def _submit(
        self,
        kind: _Kind,
        items: Sequence[Any],
        apply: Callable[[Connection, Sequence[Any]], Any],
    ) -> Any:
        loop = asyncio.get_running_loop()
        write = _Write(kind, items, apply, loop.create_future(), loop)
        with self._closing:  # nothing may enter the queue behind its end mark
            if self._closed:
                raise LogClosed("the log is closed; the server is shutting down")
            self._queue.put(write)
        return await write.future


def _write_batches(
    database: Engine, waiting: queue.SimpleQueue[_Write | None], wakeup: Wakeup
) -> None:
    """The writer thread: take what has queued up while the last batch was committed, and commit."""
    open_ = True
    while open_:
        first = waiting.get()
        batch = list(_drain(first, waiting))
        open_ = None not in batch
        writes = [write for write in batch if write is not None]
        _commit(database, writes)
        if any(write.kind in _OUTCOMES and write.error is None for write in writes):
            wakeup.notify("outcomes")


def _drain(
    first: _Write | None, waiting: queue.SimpleQueue[_Write | None]
) -> Iterable[_Write | None]:
    yield first
    for _ in range(_MOST - 1):
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


def _commit(database: Engine, batch: Sequence[_Write]) -> None:
    """Record a batch, and only then answer. What the database cannot take now is tried again."""
    if not batch:
        return
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            _record(database, batch, give_up_at)
        except RecordUnavailable as error:
            is_hopeless = isinstance(error, (DiskFailed, OutcomeUnknown))
            if time.monotonic() < give_up_at and not is_hopeless:
                time.sleep(_PAUSE_SECONDS)
                continue
            _fail(batch, error)
        except Exception as error:
            _fail(batch, error)
        break
    for write in batch:
        _answer(write)


def _fail(batch: Sequence[_Write], error: Exception) -> None:
    for write in batch:
        write.error = error


def _record(database: Engine, batch: Sequence[_Write], give_up_at: float) -> None:
    """Apply a batch in one transaction, each write in a savepoint or with others of its kind."""
    for write in batch:
        write.result = write.error = None
    transaction = None
    try:
        with database.begin() as connection:
            for kind in _Kind:
                writes = [write for write in batch if write.kind is kind]
                if kind is _Kind.STEP or not _are_applied(connection, writes):
                    for write in writes:
                        write.result, write.error = _attempt(connection, write.apply, write.items)
            transaction = transaction_id(connection)
    except OutcomeUnknown as error:
        if transaction is None:
            raise
        is_on_disk = _is_on_disk(database, transaction, give_up_at)
        if is_on_disk is None:
            raise
        if not is_on_disk:
            raise RecordUnavailable("the database lost the commit; try again") from error


def _is_on_disk(database: Engine, transaction: str, give_up_at: float) -> bool | None:
    """Whether a transaction whose commit got no answer is on disk; None if nobody can say."""
    while time.monotonic() < give_up_at:
        try:
            with contextlib.suppress(RecordUnavailable), database.connect() as connection:
                is_on_disk = has_committed(connection, transaction)
                if is_on_disk is not None:
                    return is_on_disk
        except DataError:
            # A new primary that has not come as far: later the id would be another transaction's.
            return None
        time.sleep(_PAUSE_SECONDS)
    return None


def _are_applied(connection: Connection, writes: Sequence[_Write]) -> bool:
    """Record writes of one kind in one go; False, with nothing recorded, if any is refused."""
    if not writes:
        return True
    together = [item for write in writes for item in write.items]
    results, refusal = _attempt(connection, writes[0].apply, together)
    if refusal is not None:
        return False
    given = iter(results or ())
    for write in writes:
        write.result = list(islice(given, len(write.items)))
    return True


def _attempt(
    connection: Connection,
    apply: Callable[[Connection, Sequence[Any]], Any],
    items: Sequence[Any],
) -> tuple[Any, Exception | None]:
    """(result, refusal). A refusal is the write's own. Anything else (disk full, I/O error) fails
    the batch: SQLite may have rolled the transaction back by itself, earlier writes included."""
    savepoint = connection.begin_nested()
    try:
        result = apply(connection, items)
    except _REFUSALS as error:
        savepoint.rollback()
        return None, error
    savepoint.commit()
    return result, None


def _answer(write: _Write) -> None:
    def settle() -> None:
        if write.future.done():
            return
        if write.error is None:
            write.future.set_result(write.result)
        else:
            write.future.set_exception(write.error)

    try:
        write.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        # The loop was closed while its task still waited: nobody is left to answer.
        return
