"""Credited episodes to samples: one each, or two as a pair of a better and a worse one.

A pair is a sample like any other: all its rows, with credit +1 for the better one's tokens and -1
for the other's. Owners' own preferences and corrections come in as `Pair`; what a sample weighs is
decided in `grouping`, and tensors are made in `batch`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from feedback.ideals import Correction, Preference
from feedback.types import Episode, Turn
from trainer.algorithms import Needs
from trainer.baseline import Baseline
from trainer.batch import Row, Sample, rows_of
from trainer.grouping import NO_SIGNAL, Credited, Rewarded


@dataclass(frozen=True, slots=True)
class Pair:
    """The same task done better and worse."""

    chosen: tuple[Row, ...]
    rejected: tuple[Row, ...]
    temperature: float
    stale: bool
    weight: float = 1.0


def replayed(
    successes: Iterable[Rewarded], baseline: Baseline, *, live_version: int
) -> list[Sample]:
    """Successes of earlier batches, by how much they are above what their task gives now: the more
    it was forgotten, the more they weigh. What goes well anyway is left out."""
    samples = []
    for item in successes:
        advantage = item.reward - baseline.value(item.episode.task_key)
        if advantage >= NO_SIGNAL and _sampled(item.episode):
            rows = rows_of(item.episode.turns)
            stale = item.episode.version != live_version
            temperature = item.episode.temperature
            samples.append(Sample(rows, advantage, temperature, stale, replayed=True))
    return samples


def sampled_by(episodes: Iterable[Episode], version: int, *, most: int) -> list[Sample]:
    """The latest episodes of a version, to be looked at only: they have no advantage."""
    own = [episode for episode in episodes if episode.version == version and _sampled(episode)]
    own.sort(key=lambda episode: (episode.started_at, episode.id))
    return [
        Sample(rows_of(episode.turns), 0.0, episode.temperature, stale=False)
        for episode in own[-most:]
    ]


def samples_of(
    credited: Sequence[Credited],
    needs: Needs,
    *,
    live_version: int,
    pairs: Iterable[Pair] = (),
) -> list[Sample]:
    """What an algorithm with these needs is trained on; `pairs` are those that somebody stated."""
    if needs.pairs == "both":
        return [_joined(pair) for pair in (*pairs, *_ranked(credited, live_version))]
    better = [
        Sample(pair.chosen, 1.0, pair.temperature, pair.stale, pair.weight)
        for pair in pairs
        if needs.pairs == "better"
    ]
    return better + [
        Sample(
            rows=rows_of(item.episode.turns, error_weight=needs.error_weight),
            advantage=item.advantage,
            temperature=item.episode.temperature,
            stale=item.episode.version != live_version,
            weight=item.weight,
        )
        for item in credited
    ]


def stated_pairs(
    episodes: Iterable[Episode],
    preferences: Iterable[Preference],
    corrections: Iterable[Correction],
    encode: Callable[[str], list[int]],
    *,
    live_version: int,
) -> list[Pair]:
    """What people said of these episodes. `encode`: an answer's text to ids, without end of turn.

    What is about other episodes, or about one that was not sampled, is passed over.
    """
    known = {episode.id: episode for episode in episodes if _sampled(episode)}
    pairs = [
        preferred(known[one.better_id], known[one.worse_id], live_version=live_version)
        for one in preferences
        if one.better_id in known and one.worse_id in known
    ]
    for one in corrections:
        if one.episode_id not in known:
            continue
        episode = known[one.episode_id]
        logged = _turn(episode, episode.turns[-1].index if one.turn is None else one.turn)
        if logged is not None:
            # A turn that was cut off for its length has no end-of-turn token to take over.
            end = [] if logged.stop_reason == "length" else [logged.token_ids[-1]]
            ids = [*encode(one.text), *end]
            pairs.append(corrected(episode, logged.index, ids, live_version=live_version))
    return pairs


def _sampled(episode: Episode) -> bool:
    turns = episode.turns
    whole = all(turn.logprobs is not None and turn.token_ids for turn in turns)
    return bool(turns) and whole and episode.temperature > 0


def _turn(episode: Episode, index: int) -> Turn | None:
    return next((turn for turn in episode.turns if turn.index == index), None)


def preferred(better: Episode, worse: Episode, *, live_version: int, weight: float = 1.0) -> Pair:
    """Somebody, or their rewards, said that one episode of a task is better than another."""
    return Pair(
        rows_of(better.turns),
        rows_of(worse.turns),
        better.temperature,
        any(episode.version != live_version for episode in (better, worse)),
        weight,
    )


def corrected(episode: Episode, turn: int, token_ids: Sequence[int], *, live_version: int) -> Pair:
    """Somebody said what should have been sampled in a turn, end-of-turn token included.

    Raises ValueError for a turn that the episode does not have, or for nothing to say.
    """
    logged = _turn(episode, turn)
    if logged is None or not token_ids:
        raise ValueError(
            f"the correction of turn {turn} of episode {episode.id!r} has {len(token_ids)} ids, "
            f"and the episode {len(episode.turns)} turns; expected one of these, and at least 1 id"
        )
    # Nobody sampled it: the algorithm must need `start`, which finds out its log-probabilities.
    better = replace(logged, token_ids=list(token_ids), logprobs=[float("nan")] * len(token_ids))
    return Pair(_row(better), _row(logged), episode.temperature, episode.version != live_version)


def _row(turn: Turn) -> tuple[Row, ...]:
    row = Row()
    row.append(turn)
    return (row,)


def _ranked(credited: Sequence[Credited], live_version: int) -> Iterator[Pair]:
    """In each group the best with the worst, the second best with the second worst, and so on, as
    long as their rewards differ: no episode is in two pairs."""
    groups: dict[tuple[str, str, int], list[Credited]] = defaultdict(list)
    for item in credited:
        episode = item.episode
        groups[episode.tenant, episode.task_key, episode.version].append(item)
    for group in groups.values():
        ranked = sorted(group, key=lambda item: (item.reward, item.episode.id))
        for worse, better in zip(ranked, reversed(ranked), strict=True):
            if worse.reward >= better.reward:
                break
            weight = (worse.weight + better.weight) / 2
            yield preferred(better.episode, worse.episode, live_version=live_version, weight=weight)


def _joined(pair: Pair) -> Sample:
    rows = [replace(row, credit=[1.0] * len(row.trained)) for row in pair.chosen]
    rows += [replace(row, credit=[-1.0] * len(row.trained)) for row in pair.rejected]
    return Sample(tuple(rows), 1.0, pair.temperature, pair.stale, pair.weight)
