"""Processes that share an update, a rank each: how they find one another, and what they exchange.

The first rank alone knows the record, and tells the others what to do; each has a model of its own.
One process by itself is a group of one, in which all of this does nothing. What is exchanged when
is `orders`' and the learner's.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

FOR_EVER = timedelta(days=365)
"""How long a rank waits to be told something: episodes may be long in coming."""
MEETING = timedelta(minutes=2)
"""How long ranks wait for one another where none has anything else to do."""
LAST_WORDS_SECONDS = 10.0
MEETING_PLACE = "TRAINER_RANKS_MEET_AT"
"""The variable that tells those whom the first rank started."""


class Dismissed(Exception):
    """Something failed at some rank; the first one has the error, and decides what is next."""


class Ranks:
    """A process by itself."""

    number, count = 0, 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def tell(self, order: object) -> None:
        """From the first rank to all others, which are in `told`."""

    def told(self) -> Any:
        """What the first rank tells next."""
        raise RuntimeError("a process by itself is told nothing")

    def gathered(self, item: T) -> list[T]:
        """Each rank's item, in order of rank, at every rank."""
        return [item]

    def added_up(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place, the same bits at every rank."""
        return tensor

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around work between two exchanges: what fails at one rank fails at all of them.

        Otherwise the others would wait for it for ever. The first rank raises the error, whosever
        it is; the others raise Dismissed. Nothing may be exchanged inside.
        """
        yield


ALONE = Ranks()


class Group(Ranks):
    """Several processes, over torch.distributed."""

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self._words = dist.new_group(backend="gloo", timeout=FOR_EVER)

    def tell(self, order: object) -> None:
        dist.broadcast_object_list([order], src=0, group=self._words)

    def told(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def gathered(self, item: T) -> list[T]:
        box: list[Any] = [None] * self.count
        dist.all_gather_object(box, item, group=self._words)
        return box

    def added_up(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def in_step(self) -> Iterator[None]:
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        failed = [error for error in self.gathered(_portable(own)) if error is not None]
        if not failed:
            return
        if not self.is_first:
            raise Dismissed(str(failed[0])) from own
        raise failed[0] if own is None else own


@contextmanager
def joined(processes: int, device: str) -> Iterator[tuple[Ranks, str]]:
    """The group that this process is of, and its own device; the others are let go at the end.

    Under torchrun the group is what its variables say. Else `processes` is how many there are to
    be: this one is the first, and starts the others, which end when it does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _met(os.environ.get(MEETING_PLACE, "env://"), device) as group:
            yield group
    elif processes > 1:
        with _started(processes) as place, _met(place, device) as group:
            yield group
    else:
        yield ALONE, device


@contextmanager
def _met(place: str, device: str) -> Iterator[tuple[Ranks, str]]:
    own = _own_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, init_method=place, rank=rank, world_size=count, timeout=MEETING
    )
    group = Group()
    yield group, own
    # Not in a `finally`: to those who wait, the end of a process that failed says it better.
    if group.is_first:
        group.tell(None)
    dist.destroy_process_group()


@contextmanager
def _started(count: int) -> Iterator[str]:
    """All ranks but the first, which this process becomes; gives the place where they meet."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{folder}/meeting"
        os.environ.update(_variables(0, count, place))
        command = [sys.executable, "-m", "trainer", *sys.argv[1:]]
        others = [
            subprocess.Popen(command, env=os.environ | _variables(rank, count, place))  # noqa: S603 - this very program
            for rank in range(1, count)
        ]
        try:
            yield place
            for other in others:
                with suppress(subprocess.TimeoutExpired):
                    other.wait(LAST_WORDS_SECONDS)
        finally:
            for other in others:
                other.kill()
                other.wait()


def _variables(rank: int, count: int, place: str) -> dict[str, str]:
    """As torchrun sets them, and ours."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        MEETING_PLACE: place,
    }


def _own_device(device: str) -> str:
    """`cuda` becomes the rank's own of this machine's."""
    if device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(
            f"trainer.device is {device!r}, expected 'cpu' or 'cuda' for several processes: each "
            "takes the device of its own number"
        )
    own = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def _portable(error: Exception | None) -> Exception | None:
    """One that another process can be sent."""
    try:
        pickle.dumps(plain := copy.copy(error))  # without its frames, which hold the update
        return plain
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
