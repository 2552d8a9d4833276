"""`python -m trainer`: the trainer's own process, wired from settings.

The one place of this room that constructs stores, registries and models.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from feedback.settings import TrainerSection
from feedback.spec import LearningSpec
from feedback.store import Store
from feedback.wakeup import open_wakeup
from policy.base_model import resolve_base_model
from policy.chat import load_chat_format
from policy.registry import Registry
from policy.releases import Releases
from trainer.backoff import Budget
from trainer.checkpoint import Checkpoints
from trainer.gate import Gate, Parity
from trainer.gate_episodes import OnEpisodes
from trainer.gate_heldout import HeldOut
from trainer.gate_weights import BoundedNorm, FiniteWeights, Moved
from trainer.job import Encode
from trainer.model import LoraModel
from trainer.orders import follow
from trainer.progress import log_to_stderr, logger
from trainer.ranks import ALONE, Ranks, joined
from trainer.settings import TrainerSettings, load_specs
from trainer.sharing import BESIDE, InPauses, ServerPauses, Sharing
from trainer.sinks import Shown, open_sink
from trainer.stop import Stop
from trainer.train import Trainer


def build(
    settings: TrainerSettings, stop: Stop, ranks: Ranks = ALONE, show: Shown | None = None
) -> Trainer:
    """Everything that `settings` name, opened and loaded; `ranks` follow our orders."""
    section = settings.trainer
    torch.set_num_threads(section.threads)
    base = resolve_base_model(settings.model.path)
    store = Store.open(settings.storage.database)
    wakeup = open_wakeup(settings.storage.redis)
    releases = Releases(store.database, on_change=lambda: wakeup.notify("releases"))
    model = _model(base.path, settings)
    budget = Budget(section.microbatch_tokens)
    gate = Gate(
        [
            FiniteWeights(),
            Moved(),
            BoundedNorm(model.weight_norm),
            OnEpisodes(store, model, stop, budget=budget),
            Parity(releases, stop, seconds=section.gate_seconds),
            HeldOut(section.base_url, stop, seconds=section.gate_seconds, seed=section.seed),
        ]
    )
    return Trainer(
        store=store,
        releases=releases,
        registry=Registry(
            settings.model.adapters,
            base.digest,
            settings.model.max_lora_rank,
            base_folder=base.path,
        ),
        checkpoints=Checkpoints(section.checkpoints),
        model=model,
        gate=gate,
        settings=section,
        budget=budget,
        stop=stop,
        wakeup=wakeup,
        encode=_encoder(base.path),
        ranks=ranks,
        sharing=_sharing(section, ranks),
        show=show,
    )


def _model(base: Path, settings: TrainerSettings) -> LoraModel:
    section = settings.trainer
    if section.device.startswith("cuda"):
        # What does not fit then fails here, as an update that is tried again in smaller pieces,
        # and not in the engine that has the rest of the GPU.
        torch.cuda.set_per_process_memory_fraction(section.gpu_memory_share, section.device)
    return LoraModel(
        base, device=section.device, dtype=settings.model.dtype, borrow=section.borrow_base
    )


def _sharing(section: TrainerSection, ranks: Ranks) -> Sharing:
    if section.share == "beside":
        return BESIDE
    if ranks.count > 1:
        logger.warning("trainer.share is 'pause', which is for one process: training beside")
        return BESIDE
    key = os.environ.get("HONE_HTTP__API_KEY")
    ask = ServerPauses(section.base_url, key, longest_seconds=section.pause_seconds)

    def settle() -> None:
        if section.device.startswith("cuda"):
            torch.cuda.synchronize(section.device)

    return InPauses(ask, serve_seconds=section.serve_seconds, settle=settle)


def _encoder(base: Path) -> Encode:
    """Loads the tokenizer when somebody first corrects an answer."""
    load = cache(load_chat_format)
    return lambda text: load(base).answer_ids(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="trainer", description="Train adapters from outcomes.")
    parser.add_argument("--once", action="store_true", help="end when nothing is left to do")
    parser.add_argument("--config", help="TOML file of settings (default: hone.toml)")
    arguments = parser.parse_args()
    if arguments.config is not None:
        os.environ["HONE_CONFIG"] = arguments.config
    log_to_stderr()
    settings = TrainerSettings()
    _stand_back(settings.trainer.nice)
    section = settings.trainer
    with joined(section.processes, section.device) as (ranks, section.device):
        if ranks.is_first:
            _train(settings, ranks, once=arguments.once)
        else:
            _follow(settings, ranks)


def _stand_back(nice: int) -> None:
    """Before torch has threads: those that exist keep the niceness that they have."""
    own = os.getpriority(os.PRIO_PROCESS, 0)  # whoever is started by another one has its already
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, own))


def _train(settings: TrainerSettings, ranks: Ranks, *, once: bool) -> None:
    stop = Stop()
    stop.listen()

    def specs() -> Mapping[str, LearningSpec]:
        return load_specs(settings.agents)

    section = settings.trainer
    show = None
    if section.metrics is not None:
        show = Shown(open_sink(section.metrics, section.metrics_folder, section.metrics_project))
    trainer = build(settings, stop, ranks, show)
    # What is loaded stays: looking through it again takes seconds, at the latest when we end.
    gc.freeze()
    logger.info("watching %s", ", ".join(specs()) or f"no agents in {settings.agents}")
    trainer.run(specs, once=once)
    if show is not None:
        show.close()


def _follow(settings: TrainerSettings, ranks: Ranks) -> None:
    # Whoever stops a group tells all of it: it is the first rank that ends the others.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    section = settings.trainer
    torch.set_num_threads(section.threads)
    follow(_model(resolve_base_model(settings.model.path).path, settings), ranks)


if __name__ == "__main__":
    main()
