"""From what an owner declared to the algorithm that runs: the one file that knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from feedback.spec import OPTIONS, TrainingSpec
from trainer.algorithms import Algorithm
from trainer.algorithms.cispo import Cispo
from trainer.algorithms.dpo import Dpo
from trainer.algorithms.dr_grpo import DrGrpo
from trainer.algorithms.grpo import Grpo
from trainer.algorithms.kto import Kto
from trainer.algorithms.loop import Loop
from trainer.algorithms.positive import Positive
from trainer.algorithms.ppo import Ppo
from trainer.algorithms.reinforce_pp import ReinforcePlusPlus
from trainer.algorithms.rloo import Rloo
from trainer.algorithms.sft import Sft
from trainer.algorithms.spo import Spo

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "loop": Loop,
    "rloo": Rloo,
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "reinforce_pp": ReinforcePlusPlus,
    "spo": Spo,
    "cispo": Cispo,
    "positive": Positive,
    "ppo": Ppo,
    "kto": Kto,
    "dpo": Dpo,
    "sft": Sft,
}


def chosen(training: TrainingSpec) -> Algorithm:
    """The declared algorithm, with those of the settings that it reads."""
    options = {name: getattr(training, name) for name in OPTIONS[training.algorithm]}
    return ALGORITHMS[training.algorithm](**options)
