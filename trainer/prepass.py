"""What is found out about samples before the first step: one forward pass without gradient.

Log-probabilities under the version that training starts from, for algorithms that compare with it,
and a critic's values, from which turns get their advantages. The learner decides whether a pass is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.advantages import gae, whitened
from trainer.batch import Microbatch, Row, Sample, microbatches
from trainer.critic import Critic
from trainer.model import LoraModel, TokenLogprobs
from trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Found:
    """Of one row."""

    logprobs: list[float]
    """Of its trained tokens."""
    hidden: Tensor
    """What each of its turns begins from, [turns, H]."""

    def to(self, device: str) -> Found:
        return replace(self, hidden=self.hidden.to(device))


def look(
    model: LoraModel,
    samples: Sequence[Sample],
    *,
    token_budget: int,
    on_batch: Callable[[Microbatch, TokenLogprobs], None],
) -> dict[int, Found]:
    """By the id of each row of `samples`."""
    found: dict[int, Found] = {}
    shared = model.shares_prefixes
    for batch in microbatches(samples, token_budget=token_budget, shared=shared):
        with torch.no_grad():
            scored = model.logprobs(batch)
        starts = scored.hidden[batch.starts.to(scored.hidden.device)]
        logprobs = scored.logprobs.tolist()
        token, turn = 0, 0
        for row in batch.rows:
            n_turns = sum(row.turn_starts)
            found[id(row)] = Found(
                logprobs[token : token + len(row.trained)], starts[turn : turn + n_turns]
            )
            token += len(row.trained)
            turn += n_turns
        on_batch(batch, scored)
    return found


def exchanged(
    samples: Sequence[Sample], found: dict[int, Found], ranks: Ranks, device: str
) -> dict[int, Found]:
    """What all ranks found, each of its share of `samples`, by the id of each row."""
    if ranks.count == 1:
        return found
    rows = [row for sample in samples for row in sample.rows]
    mine = {place: found[id(row)].to("cpu") for place, row in enumerate(rows) if id(row) in found}
    return {
        id(rows[place]): one.to(device)
        for part in ranks.gathered(mine)
        for place, one in part.items()
    }


def from_the_start(samples: Sequence[Sample], found: dict[int, Found]) -> list[Sample]:
    """The version that training starts from, in place of whoever sampled."""
    return [
        replace(
            sample,
            rows=tuple(replace(row, logprobs=found[id(row)].logprobs) for row in sample.rows),
        )
        for sample in samples
    ]


def criticised(
    samples: Sequence[Sample], found: dict[int, Found], critic: Critic
) -> tuple[list[Sample], dict[str, float]]:
    """Samples whose turns have advantages of their own, white over all of them; and the figures.

    A sample's advantage comes in as what the whole episode was worth. The critic judges before it
    learns from what it judged.
    """
    runs = [_runs(sample) for sample in samples]
    sizes = [len(own) for own in runs]
    hidden = torch.stack(
        [
            found[id(sample.rows[row])].hidden[run]
            for sample, own in zip(samples, runs, strict=True)
            for _, row, run in own
        ]
    )
    with torch.no_grad():
        values = critic.values(hidden).cpu()
    options = critic.options
    advantages = torch.cat(
        [
            gae(own, _at_the_end(s.advantage, size), gamma=options.gamma, lam=options.gae_lambda)
            for s, own, size in zip(samples, torch.split(values, sizes), sizes, strict=True)
        ]
    )
    earned = torch.tensor([s.advantage for s in samples]).repeat_interleave(torch.tensor(sizes))
    loss = critic.fit(hidden, values, values + advantages)
    made = [
        _with_turns(sample, own, credit)
        for sample, own, credit in zip(
            samples, runs, torch.split(whitened(advantages), sizes), strict=True
        )
    ]
    return made, {"explained_variance": _explained(earned, values), "value_loss": loss}


def _explained(earned: Tensor, values: Tensor) -> float:
    """1 - var(R - V) / var R, [U], [U]: 1 if values are right, 0 if they are all alike."""
    spread = earned.var(correction=0).clamp(min=1e-8)
    return 1.0 - float((earned - values).var(correction=0) / spread)


def _runs(sample: Sample) -> list[tuple[int, int, int]]:
    """(turn, row, number in the row) of all runs of sampled tokens, in the order of time."""
    found: list[tuple[int, int, int]] = []
    for number, row in enumerate(sample.rows):
        starting = [t for t, start in zip(row.turns, row.turn_starts, strict=True) if start]
        found.extend((turn, number, run) for run, turn in enumerate(starting))
    return sorted(found)


def _at_the_end(reward: float, turns: int) -> Tensor:
    rewards = torch.zeros(turns)
    rewards[-1] = reward
    return rewards


def _with_turns(sample: Sample, runs: Sequence[tuple[int, int, int]], credit: Tensor) -> Sample:
    of = {(row, run): number for number, (_, row, run) in enumerate(runs)}
    rows: list[Row] = []
    for number, row in enumerate(sample.rows):
        own = [of[number, run] for run in range(sum(row.turn_starts))]
        run_of = torch.tensor(row.turn_starts).cumsum(0) - 1
        rows.append(replace(row, credit=credit[own][run_of].tolist()))
    return replace(sample, rows=tuple(rows), advantage=1.0)
