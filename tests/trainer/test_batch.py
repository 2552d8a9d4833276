"""Episodes to rows and rows to tensors, on ids written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from feedback.types import Turn
from trainer.batch import Row, Sample, microbatches, rows_of

MakeTurn = Callable[..., Turn]


def test_turns_that_extend_one_another_are_one_row(turn: MakeTurn) -> None:
    turns = [
        turn([10, 11], [1, 2], [-0.1, -0.2]),
        turn([10, 11, 1, 2, 20, 21], [3], [-0.3]),
    ]
    (row,) = rows_of(turns)
    assert row.token_ids == [10, 11, 1, 2, 20, 21, 3]
    assert row.trained == [2, 3, 6]  # prompt and tool ids (20, 21) are not trained
    assert row.logprobs == [-0.1, -0.2, -0.3]


def test_a_fork_trains_each_sampled_token_once_under_its_own_prompt(turn: MakeTurn) -> None:
    turns = [
        turn([10, 11], [1, 2], [-0.1, -0.2]),
        turn([10, 12], [3], [-0.3]),  # history was rewritten: a second row
        turn([10, 11, 1, 2, 20], [4], [-0.4]),  # back to the first
        turn([10, 12, 3, 30], [5], [-0.5]),
    ]
    first, second = rows_of(turns)
    assert (first.token_ids, first.trained) == ([10, 11, 1, 2, 20, 4], [2, 3, 5])
    assert (second.token_ids, second.trained) == ([10, 12, 3, 30, 5], [2, 4])
    assert first.logprobs + second.logprobs == [-0.1, -0.2, -0.4, -0.3, -0.5]


def test_a_prompt_that_changes_sampled_ids_is_not_an_extension(turn: MakeTurn) -> None:
    # The client's text came back tokenized differently: 2 became 7.
    rows = rows_of([turn([10], [1, 2]), turn([10, 1, 7, 20], [3])])
    assert [row.token_ids for row in rows] == [[10, 1, 2], [10, 1, 7, 20, 3]]
    assert [row.trained for row in rows] == [[1, 2], [4]]


def test_turns_without_context_or_with_ragged_logprobs_are_refused(turn: MakeTurn) -> None:
    with pytest.raises(ValueError, match="0 prompt ids"):
        rows_of([turn([], [1])])
    with pytest.raises(ValueError, match="2 sampled ids but 1 logprobs"):
        rows_of([turn([5], [1, 2], [-0.1])])


def test_tensors_of_two_episodes() -> None:
    long = Sample((Row([5, 6, 7, 8], [2, 3], [-0.1, -0.2]),), 0.5, 0.7, stale=False)
    short = Sample((Row([9, 4], [1], [-0.3]), Row([9, 3], [1], [-0.4])), -1.0, 1.0, stale=True)
    (batch,) = microbatches([short, long], token_budget=100)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 0, 0], [9, 0, 0]]
    assert batch.row.tolist() == [0, 0, 1, 2]
    assert batch.context.tolist() == [1, 2, 0, 0]  # what predicts position p is p - 1
    assert batch.targets.tolist() == [7, 8, 4, 3]
    torch.testing.assert_close(batch.behaviour, torch.tensor([-0.1, -0.2, -0.3, -0.4]))
    torch.testing.assert_close(batch.temperature, torch.tensor([0.7, 0.7, 1.0, 1.0]))
    assert batch.advantages.tolist() == [0.5, 0.5, -1.0, -1.0]
    assert batch.scale.tolist() == [0.5, 0.5, 0.5, 0.5]  # 1 / |a|, over all rows of an episode
    assert batch.episode.tolist() == [1, 1, 0, 0]


def test_microbatches_keep_the_budget_and_lose_nothing() -> None:
    samples = [
        Sample((Row(list(range(1, n + 1)), [n - 1], [-0.1]),), 1.0, 1.0, stale=False)
        for n in (3, 30, 4, 29, 5, 6, 200)
    ]
    batches = list(microbatches(samples, token_budget=60))
    shapes = [tuple(batch.input_ids.shape) for batch in batches]
    assert shapes == [(1, 199), (2, 29), (4, 5)]  # 200 alone; 30 + 29; 6, 5, 4, 3
    assert sorted(i for batch in batches for i in batch.episode.tolist()) == list(range(7))


def test_each_token_knows_its_turn_and_how_much_its_episode_sampled() -> None:
    # Ids 5 and 8 are a prompt and a tool's answer; a row in which nothing stands between two turns
    # has one run of sampled ids.
    forked = Sample(
        (Row([5, 1, 2, 8, 3], [1, 2, 4], [-0.1] * 3), Row([5, 4], [1], [-0.1])),
        1.0, 1.0, stale=False,
    )  # fmt: skip
    whole = Sample((Row([5, 5, 1, 2], [2, 3], [-0.1] * 2),), 1.0, 1.0, stale=False)
    assert (forked.n_turns, whole.n_turns) == (3, 1)
    (batch,) = microbatches([forked, whole], token_budget=100)
    assert batch.turn.tolist() == [0, 0, 1, 2, 2, 3]  # rows of 5, 4 and 2 ids
    assert batch.n_turns.tolist() == [3, 3, 3, 1, 1, 3]
    assert batch.n_tokens.tolist() == [4, 4, 4, 2, 2, 4]


def test_whole_episodes_stay_in_one_microbatch_beyond_the_budget() -> None:
    def rows(*lengths: int) -> Sample:
        made = tuple(Row(list(range(1, n + 1)), [n - 1], [-0.1]) for n in lengths)
        return Sample(made, 1.0, 1.0, stale=False)

    samples = [rows(10, 3), rows(4), rows(30, 30), rows(9)]
    shapes, episodes = [], []
    for batch in microbatches(samples, token_budget=40, whole_episodes=True):
        shapes.append(tuple(batch.input_ids.shape))
        episodes.append(batch.episode.tolist())
    assert shapes == [(2, 29), (4, 9)]  # 60 padded tokens in the first, for one episode
    assert episodes == [[2, 2], [0, 0, 3, 1]]
