"""When an update computes: beside serving, or in pauses of it that the server grants.

In a pause the engine computes nothing; when it ends is the server's to say (`server/pauses.py`),
by a timer of its own. This file asks for one, gives it back before a microbatch that would outlast
it, and waits for the next. No update fails for want of pauses: it goes on beside serving.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import httpx

from trainer.learner import OnProgress
from trainer.progress import logger

PATIENCE_SECONDS = 60.0
"""How long the server may say "not yet" before an update goes on without pauses."""
REMEMBERED = 4
"""Microbatches by which the next one's time is judged."""
_SLICE_SECONDS = 0.1
"""Of a wait, between two signs of life."""
_ANSWER_SECONDS = 10.0

Beat = Callable[[], object]
"""A sign of life; may raise to abandon the update."""


class NoPauses(Exception):
    """The server grants none, or does not answer."""


class NotYet(Exception):
    """The server asks to be asked again after `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Held(Protocol):
    """A pause of serving."""

    @property
    def until(self) -> float:
        """When the server ends it, by this process's monotonic clock."""
        ...

    def close(self) -> None:
        """Have serving go on."""
        ...


class Turn:
    """One update beside serving: it computes whenever it likes."""

    @property
    def figures(self) -> dict[str, float]:
        """What its sharing came to."""
        return {}

    def between(self) -> None:
        """Called after each microbatch; returns when the next may compute."""


class Sharing:
    """How updates share the machine with serving: beside it."""

    @contextmanager
    def update(self, beat: Beat) -> Iterator[Turn]:
        """Around one update; `beat` is called while it has to wait."""
        yield Turn()


BESIDE = Sharing()


class InPauses(Sharing):
    """Updates compute in pauses of serving, as long as those are granted."""

    def __init__(
        self, ask: Callable[[], Held], *, serve_seconds: float, settle: Callable[[], None]
    ) -> None:
        """`ask` raises NoPauses or NotYet; `settle` returns once the device has nothing to do."""
        self._ask = ask
        self._serve_seconds = serve_seconds
        self._settle = settle
        self._next_at = 0.0
        self._is_warned = False

    @contextmanager
    def update(self, beat: Beat) -> Iterator[Turn]:
        turn = _PausedTurn(self, beat)
        turn.take()
        try:
            yield turn
        finally:
            turn.give_back()

    def taken(self, beat: Beat) -> Held | None:
        """The next pause, once it is granted; None: there is none, which is told once."""
        _wait(self._next_at, beat)
        patience = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                held = self._ask()
            except NotYet as error:
                again = time.monotonic() + error.seconds
                if again > patience:
                    self._warn(error)
                    return None
                _wait(again, beat)
            except NoPauses as error:
                self._warn(error)
                return None
            else:
                self._is_warned = False
                return held

    def give_back(self, held: Held) -> None:
        try:
            self._settle()
        finally:
            held.close()
            self._next_at = time.monotonic() + self._serve_seconds

    def _warn(self, error: Exception) -> None:
        if not self._is_warned:
            logger.warning("training beside serving, which is not paused for it: %s", error)
        self._is_warned = True


class _PausedTurn(Turn):
    """One update in pauses; after the first that is refused, beside serving."""

    def __init__(self, sharing: InPauses, beat: Beat) -> None:
        self._sharing = sharing
        self._beat = beat
        self._held: Held | None = None
        self._count = 0
        self._seconds = 0.0
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._taken_at = 0.0
        self._since: float | None = None
        """The end of the last microbatch, or of the wait after it."""

    @property
    def figures(self) -> dict[str, float]:
        return {"pauses": float(self._count), "paused_seconds": self._seconds}

    def take(self) -> None:
        self._held = self._sharing.taken(self._beat)
        self._taken_at = time.monotonic()
        self._count += self._held is not None

    def give_back(self) -> None:
        if self._held is None:
            return
        held, self._held = self._held, None
        self._sharing.give_back(held)
        self._seconds += min(time.monotonic(), held.until) - self._taken_at

    def between(self) -> None:
        now = time.monotonic()
        # What comes before the first one's end is more than a microbatch.
        if self._since is not None:
            self._took.append(now - self._since)
        if self._held is not None and now + max(self._took, default=0.0) > self._held.until:
            self.give_back()
            self.take()
            now = time.monotonic()
        self._since = now


def in_turn(on_progress: OnProgress, turn: Turn) -> OnProgress:
    """Progress is told, then the next microbatch waits for its turn."""

    def told(done: int, total: int, figures: Mapping[str, float]) -> None:
        on_progress(done, total, figures)
        turn.between()

    return told


class ServerPauses:
    """Asks a server for pauses, over HTTP; one lasts as long as its answer is read."""

    def __init__(self, base_url: str, key: str | None, *, longest_seconds: float) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_ANSWER_SECONDS, read=longest_seconds + _ANSWER_SECONDS)
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout)

    def __call__(self) -> Held:
        try:
            request = self._http.build_request("POST", "/v1/training/pauses")
            answer = self._http.send(request, stream=True)
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise _refusal(answer)
            return _HeldAnswer(answer)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise NoPauses(f"{self._http.base_url} does not answer: {error!r}") from error


class _HeldAnswer:
    """The server pauses for as long as the connection is open."""

    def __init__(self, answer: httpx.Response) -> None:
        self._answer = answer
        self._lines = answer.iter_lines()  # kept: the connection would be closed with it
        self.until = time.monotonic() + float(json.loads(next(self._lines))["seconds"])

    def close(self) -> None:
        self._answer.close()


def _refusal(answer: httpx.Response) -> NoPauses | NotYet:
    message = f"status {answer.status_code}: {answer.json()['error']['message']}"
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return NotYet(message, float(answer.headers.get("retry-after", "1")))
    return NoPauses(message)


def _wait(until: float, beat: Beat) -> None:
    while (left := until - time.monotonic()) > 0:
        beat()
        time.sleep(min(_SLICE_SECONDS, left))
    beat()
