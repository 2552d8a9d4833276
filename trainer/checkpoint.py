"""What training needs beside the adapter to go on from a version: one folder a published version.

The adapter's own weights are the registry's, which never change; here are the optimizer's moments,
the tracked baseline, the value head and the seed. Written aside, fsynced and renamed, so that a
folder that has its name is whole.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policy.durable import make_folder, sync
from policy.types import AdapterRef
from trainer.baseline import Baseline
from trainer.critic import CriticState
from trainer.progress import logger

_DAMAGE = (
    FileNotFoundError, ValueError, KeyError, TypeError, RuntimeError, EOFError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What reading a file that is not what was written may raise."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of training just after a version was made."""

    ref: AdapterRef
    adapter_digest: str
    """Of the published adapter that this belongs to."""
    optimizer: dict[str, Any]
    """AdamW's `state_dict`."""
    baseline: Baseline
    seed: int
    """All randomness of the update that made it."""
    critic: CriticState | None = None
    """The value head, under algorithms that have one."""


class Checkpoints:
    """Checkpoints of all policies under one folder, `<root>/<policy>/vN/`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one, durably. A version has one; a try that failed may be repeated."""
        final = self._folder(checkpoint.ref)
        make_folder(final.parent)
        aside = final.with_name(f".{final.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        torch.save(checkpoint.optimizer, aside / "optimizer.pt")
        paths = [aside / "optimizer.pt", aside / "state.json", aside]
        if checkpoint.critic is not None:
            torch.save(checkpoint.critic, aside / "critic.pt")
            paths.insert(0, aside / "critic.pt")
        state = {
            "adapter_digest": checkpoint.adapter_digest,
            "seed": checkpoint.seed,
            "baseline": checkpoint.baseline.to_json(),
        }
        (aside / "state.json").write_text(json.dumps(state))
        for path in paths:
            sync(path)
        if final.exists():  # of an earlier try, whose last sync failed
            shutil.rmtree(final)
        aside.rename(final)
        sync(final.parent)
        return final

    def load(self, ref: AdapterRef) -> Checkpoint | None:
        """The checkpoint of a version, or None: it may have been made elsewhere, pruned, or
        damaged, which the log tells. Training goes on without; raises OSError if it may pass."""
        folder = self._folder(ref)
        if not folder.is_dir():
            return None
        critic = folder / "critic.pt"
        try:
            state = json.loads((folder / "state.json").read_text())
            return Checkpoint(
                ref,
                state["adapter_digest"],
                _loaded(folder / "optimizer.pt"),
                Baseline.from_json(state["baseline"]),
                state["seed"],
                _loaded(critic) if critic.exists() else None,
            )
        except _DAMAGE as error:
            logger.error(
                "the checkpoint in %r is damaged: %r; going on without", str(folder), error
            )
            return None

    def prune(self, policy: str, *, keep: set[int], newest: int = 8) -> None:
        """Delete all but the `newest` and the versions in `keep`, such as the live one."""
        folders = sorted((self._root / policy).glob("v*"), key=lambda path: int(path.name[1:]))
        for folder in folders[:-newest]:
            if int(folder.name[1:]) not in keep:
                shutil.rmtree(folder)

    def _folder(self, ref: AdapterRef) -> Path:
        return self._root / ref.policy / f"v{ref.version}"


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
