"""A tiny Qwen2 on disk, and short ways to write episodes by hand."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, Turn
from policy.registry import Registry
from policy.releases import ReleaseConflict, Releases
from policy.types import Adapter, AdapterRef
from trainer.__main__ import build
from trainer.model import LoraModel
from trainer.settings import TrainerSettings, load_specs
from trainer.stop import Stop
from trainer.train import Trainer

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Episode]


def write_base(folder: Path) -> None:
    """Random weights: vocabulary 32, hidden 32, 2 layers, grouped-query attention as in Qwen2."""
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        Qwen2ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


@pytest.fixture
def turn() -> MakeTurn:
    def make(
        prompt: Sequence[int],
        sampled: Sequence[int],
        logprobs: Sequence[float] | None = None,
        index: int = 0,
    ) -> Turn:
        values = [-1.0] * len(sampled) if logprobs is None else list(logprobs)
        return Turn(index, list(prompt), list(sampled), values, "", "stop")

    return make


@pytest.fixture
def episode() -> MakeEpisode:
    def make(
        id: str,
        turns: Sequence[Turn],
        *,
        task_key: str = "task/1",
        version: int = 0,
        temperature: float = 1.0,
    ) -> Episode:
        return Episode(
            id, "line", version, task_key, 0.0,
            temperature=temperature, turns=tuple(turns), stop_reason="finished", ended_at=1.0,
        )  # fmt: skip

    return make


CONFIG = """
agents = "{folder}/agents"
[model]
path = "{base}"
adapters = "{folder}/adapters"
max_lora_rank = 8
[storage]
database = "sqlite:///{folder}/hone.db"
[trainer]
checkpoints = "{folder}/checkpoints"
poll_seconds = 0.1
gate_seconds = 30
[http]
port = 1
"""

AGENT = """
name: line
policy: line
system: You answer.
training: {min_episodes: 24, minibatch_episodes: 8, rank: 4, alpha: 8, learning_rate: 0.001}
"""


def record_episodes(store: Store, base_folder: Path, *, first: int, shift: float = 0.0) -> None:
    """24 rewarded episodes of the base model, of which half are in groups of 2.

    With `shift` they are those of an engine that is so many nats off.
    """
    model = LoraModel(base_folder)
    model.attach(rank=1, alpha=1, seed=0, start=None)
    rng = random.Random(first)
    for number in range(first, first + 24):
        id = f"episode-{number:02d}"
        paired = number - first < 12
        key = f"pair/{number // 2}" if paired else f"single/{number}"
        ids = [rng.randrange(2, 32) for _ in range(20)]
        logprobs = [value + shift for value in model.probe(ids).logprobs[9:]]
        store.begin(Episode(id, "line", 0, key, float(number), agent="line"))
        store.append_turn(id, Turn(0, ids[:10], ids[10:], logprobs, "", "stop"))
        store.end(id, "finished", float(number) + 0.5)
        reward = float(number % 2) if paired else float(rng.random() < 0.5)
        store.add_feedback(
            [FeedbackEvent(f"e{number}", "test", id, "success", reward, number + 0.6, number + 0.6)]
        )


@pytest.fixture
def more_episodes(base_folder: Path) -> Callable[[Store], None]:
    return lambda store: record_episodes(store, base_folder, first=24)


@pytest.fixture(scope="session")
def world_template(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of 24 rewarded episodes: 6 groups of 2 and 12 singles, with true logprobs."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "agents").mkdir()
    (folder / "agents" / "line.yaml").write_text(AGENT)
    store = Store.open(f"sqlite:///{folder}/hone.db")
    record_episodes(store, base_folder, first=0)
    store.close()
    return folder


@pytest.fixture
def make_world(world_template: Path, base_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of the record in a folder of its own, with the settings file that names it."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(world_template, folder)
        (folder / "hone.toml").write_text(CONFIG.format(folder=folder, base=base_folder))
        return folder

    return make


class StandInController:
    """Plays the server's part in a release: says that each candidate was loaded and proven."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._stores = [Store.open(f"sqlite:///{folder}/hone.db") for folder in folders]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for store in self._stores:
            store.close()

    def _follow(self) -> None:
        while not self._done.wait(0.05):
            for releases in (Releases(store.database) for store in self._stores):
                for ref in releases.state("line").candidates:
                    # As in the server: somebody else may have decided on it meanwhile.
                    with contextlib.suppress(ReleaseConflict):
                        releases.record(
                            "line", ref.version, "loaded", actor="server", reason="probe passed",
                            figures={"parity_gap": 1e-6, "shift": 0.01},
                        )  # fmt: skip


@pytest.fixture
def controller() -> type[StandInController]:
    return StandInController


class World:
    """A trainer over a record of its own, and eyes on what it did."""

    def __init__(self, folder: Path, base_folder: Path, **options: Any) -> None:
        """`options` change the settings' section `trainer`."""
        self.folder = folder
        self.base_folder = base_folder
        self.stop = Stop()
        settings = TrainerSettings()
        settings.trainer = settings.trainer.model_copy(update=options)
        self.trainer: Trainer = build(settings, self.stop)
        self.registry: Registry = self.trainer._registry
        self.store = Store.open(settings.storage.database)
        self.releases = Releases(self.store.database)
        self.spec = load_specs(folder / "agents")["line"]

    def again(self, **options: Any) -> World:
        """Started anew, under other settings."""
        self.store.close()
        return World(self.folder, self.base_folder, **options)

    def run(self) -> None:
        self.trainer.run(lambda: {"line": self.spec}, once=True)

    def adapter(self, version: int) -> Adapter:
        return self.registry.get(AdapterRef("line", version))

    def ready(self) -> int:
        live = self.releases.state("line").live.version
        return self.store.readiness(self.spec, live_version=live).ready


@pytest.fixture
def world(
    make_world: Callable[[str], Path],
    base_folder: Path,
    controller: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    folder = make_world("world")
    monkeypatch.setenv("HONE_CONFIG", str(folder / "hone.toml"))
    world = World(folder, base_folder)
    with controller([folder]):
        yield world
    world.store.close()
