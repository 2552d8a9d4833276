"""What runs inside the engine process: its executor, and LoRA products that a CPU gets right."""

# vllm is read as Any (see pyproject.toml), and its classes are made to be extended.
# mypy: allow-subclassing-any

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from policy.collection import collect_rarely
from policy.punica_math import Group, add_lora_, expand_, group_rows, shrink_


class GroupedPunica(PunicaWrapperCPU):
    """LoRA products on a CPU, one GEMM per adapter present.

    The stock wrapper reads index -1 ("no adapter") as Python does, so that base-model rows of a
    mixed batch get the last slot's adapter.
    """

    _token_groups: tuple[Group, ...] = ()
    _sampler_groups: tuple[Group, ...] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._token_groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    # Signatures are vLLM's. `add_inputs` is always true and `buffer` never given on this platform.

    def add_lora_linear(  # noqa: PLR0917 - vLLM passes these by position
        self, y: Any, x: Any, a: Any, b: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        add_lora_(y, x, a, b, scale, output_slices, self._token_groups)

    def add_shrink(self, y: Any, x: Any, a: Any, scale: float, **_: Any) -> None:
        for part, stacked in zip(y, a, strict=True):
            shrink_(part, x.flatten(0, -2), stacked, scale, self._token_groups)

    def add_expand(
        self, y: Any, x: Any, b: Any, output_slices: Any, offset_start: int = 0, **_: Any
    ) -> None:
        left, rows = offset_start, y.flatten(0, -2)
        for part, stacked, width in zip(x, b, output_slices, strict=True):
            expand_(rows[:, left : left + width], part, stacked, self._token_groups)
            left += width

    def add_lora_embedding(self, y: Any, x: Any, b: Any, **_: Any) -> None:
        expand_(y, x, b, self._token_groups)

    def add_lora_logits(self, y: Any, x: Any, a: Any, b: Any, scale: float, **_: Any) -> None:
        y, x = y.flatten(0, -2), x.flatten(0, -2)
        groups = self._sampler_groups
        if len(y) != len(self.sampler_indices) and any(g.rows is not None for g in groups):
            # Scoring a prompt beside other adapters: vLLM does not say whose rows these are.
            groups = ()
        add_lora_(y, x, (a,), (b,), scale, (y.shape[1],), groups)


class TiedExecutor(UniProcExecutor):
    """The stock executor in an engine process that cannot outlive the process that started it."""

    def _init_executor(self) -> None:
        die_with_parent()
        # Ctrl-C reaches the whole process group; the parent decides when the engine stops.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if current_platform.is_cpu():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            qualified_name = f"{GroupedPunica.__module__}.{GroupedPunica.__qualname__}"
            current_platform.get_punica_wrapper = lambda: qualified_name
        super()._init_executor()
        collect_rarely()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies (prctl PR_SET_PDEATHSIG, Linux only).

    The signal is bound to the *thread* that forked: it must be one that lives as long as we do.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.get("HONE_ENGINE_PARENT", os.getppid()))
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # It died before we asked.
        os._exit(1)
