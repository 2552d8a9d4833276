"""After an update that failed: the next try in smaller pieces, after a longer pause.

Owns how many tokens this process sends through the model at once, and when a line is worked on
again. What becomes of a batch is the loop's decision.
"""

from __future__ import annotations

import time

import torch

FLOOR = 256
"""Tokens at once that are not halved any more: rows longer than that go alone anyway."""
TRIES_AT_FLOOR = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 300.0
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What allocators say in a plain RuntimeError: the CPU's, CUDA's and cuBLAS'."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device had no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in told for sign in _SIGNS)


class Budget:
    """Tokens that go through the model at once: as many as set, until they do not fit.

    They never become more again in this process: to find out costs an update that fails, while
    smaller pieces cost an update little.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._set = tokens
        self._floor = min(FLOOR, tokens)
        self._failed_at_floor = 0

    def shrink(self) -> bool:
        """After work that did not fit: halve. False: it did not, TRIES_AT_FLOOR times in a row, in
        the smallest pieces either."""
        if self.tokens > self._floor:
            self.tokens = max(self._floor, self.tokens // 2)
            return True
        self._failed_at_floor = (self._failed_at_floor + 1) % TRIES_AT_FLOOR
        return self._failed_at_floor > 0

    def shrink_after(self, error: BaseException) -> tuple[str, bool]:
        """What is said of work that did not fit, and whether to try it again."""
        before, again = self.tokens, self.shrink()
        told = (
            f"out of memory with {before} tokens going through the model at once, of "
            f"microbatch_tokens = {self._set}: {str(error)[:200]}"
        )
        return f"{told}; the next try has {self.tokens}" if again else told, again

    def resume(self, tries: int) -> None:
        """For a batch whose earlier `tries` - 1 ended with the process, which tells nothing: the
        kernel ends what is too large, too. The first time may have been anybody's doing."""
        self.tokens = max(self._floor, min(self.tokens, self._set >> max(0, tries - 2)))

    def fitted(self) -> None:
        self._failed_at_floor = 0


class Backoff:
    """When each line is worked on again: at once after one failure, then ever later."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._until: dict[str, float] = {}

    def failed(self, line: str) -> float:
        """Seconds that it has to wait: 0, 1, 2, 4 and so on, up to LONGEST_PAUSE."""
        before = self._failures.get(line, 0)
        self._failures[line] = before + 1
        pause = min(FIRST_PAUSE * 2.0 ** min(before - 1, 30), LONGEST_PAUSE) if before else 0.0
        self._until[line] = time.monotonic() + pause
        return pause

    def went_well(self, line: str) -> None:
        self._failures.pop(line, None)
        self._until.pop(line, None)

    def waits(self, line: str) -> bool:
        return time.monotonic() < self._until.get(line, 0.0)
