"""Schedules, micro-batches and collation by what they promise."""

import pytest
import torch

from selfcritique.config import Layout
from selfcritique.errors import UserError
from selfcritique.train.batch import Schedule, collate, micro_batches

LENGTHS = [(7 * i) % 23 + 1 for i in range(75)]  # 75 examples: the last group of batches is not full


def steps(schedule: Schedule) -> list[list[int]]:
    return [schedule[i] for i in range(len(schedule))]


def test_every_example_once_an_epoch() -> None:
    schedule = Schedule(LENGTHS, batch_size=4, epochs=2, seed=0)
    batches = steps(schedule)
    assert len(batches) == 2 * 19  # ceil(75 / 4) an epoch
    first, second = batches[:19], batches[19:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(75))
    assert first != second
    assert len(Schedule(LENGTHS, 4, 0.5, 0)) == 10  # half of 19 steps, rounded
    assert [sorted(batch) for batch in steps(Schedule(LENGTHS, 100, 1, 0))] == [list(range(75))]


def test_a_step_depends_on_the_seed_and_its_number_alone() -> None:
    batches = steps(Schedule(LENGTHS, 4, 2, seed=0))
    assert steps(Schedule(LENGTHS, 4, 2, seed=0)) == batches
    assert [Schedule(LENGTHS, 4, 2, seed=0)[i] for i in (30, 3, 37)] == [batches[i] for i in (30, 3, 37)]
    assert steps(Schedule(LENGTHS, 4, 2, seed=1)) != batches


def test_batches_hold_similar_lengths() -> None:
    """Sorted in groups of 16 batches, 64 of 23 lengths: a batch spans few of them."""
    full = [batch for batch in steps(Schedule(LENGTHS, 4, 1, 0)) if len(batch) == 4]
    spans = sorted(max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in full)
    assert spans[len(spans) // 2] <= 2


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("budget", [1, 20, 46, 10_000])
def test_micro_batches_keep_to_the_budget(budget: int, rows: int) -> None:
    indices = [3, 1, 4, 15, 9, 26, 5, 35, 8]
    groups = micro_batches(indices, LENGTHS, budget, rows)
    assert sorted(i for group in groups for i in group) == sorted(indices)
    for group in groups:  # an example over the budget stands alone
        assert len(group) == 1 or max(LENGTHS[i] for i in group) * rows * len(group) <= budget
    assert len(groups) == (len(indices) if budget == 1 else 1 if budget == 10_000 else len(groups))


def test_collate() -> None:
    """Two sequences, by hand. Pad and EOS are both 2: EOS is trained and counted, padding is not."""
    batch = collate([([1, 7, 8], [5, 2]), ([1], [2])], pad_id=2)
    assert batch.input_ids.tolist() == [[1, 7, 8, 5, 2], [1, 2, 2, 2, 2]]
    assert batch.position_ids is None and batch.attention_mask() is None
    assert batch.at.tolist() == [2, 3, 5]  # the prompt's last token predicts the response's first
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.labels.tolist() == [5, 2, 2]
    assert batch.lengths.tolist() == [2, 1]


PAIRS = [([1, 7], [5, 6, 2], [9, 2]), ([1], [2], [8, 2])]


def test_two_responses_share_their_prompt() -> None:
    """By hand: the second response stands at the positions of the first and does not see it."""
    batch = collate(PAIRS, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 7, 5, 6, 2, 9, 2], [1, 2, 8, 2, 0, 0, 0]]
    assert batch.position_ids is not None and batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch.at.tolist() == [1, 2, 3, 7, 1, 5, 7, 9]  # chosen of both rows, then rejected of both
    assert batch.labels.tolist() == [5, 6, 2, 2, 9, 2, 8, 2]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 1, 2, 2]
    mask = batch.attention_mask()
    assert mask is not None and mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]


def test_packed_and_padded_rows_of_pairs() -> None:
    packed = collate(PAIRS, 0, Layout.packed)
    assert packed.input_ids.tolist() == [[1, 7, 5, 6, 2, 1, 2, 1, 7, 9, 2, 1, 8, 2]]
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    padded = collate(PAIRS, 0, Layout.padded)
    assert padded.input_ids.tolist() == [[1, 7, 5, 6, 2], [1, 2, 0, 0, 0], [1, 7, 9, 2, 0], [1, 8, 2, 0, 0]]
    for batch in (packed, padded):
        shared = collate(PAIRS, 0)
        for name in ("labels", "sequence", "lengths"):
            assert getattr(batch, name).tolist() == getattr(shared, name).tolist()
        ids = batch.input_ids.flatten()
        assert ids[batch.at].tolist() == [7, 5, 6, 1, 7, 9, 1, 8]  # the token before each


def test_collate_without_any_response_token() -> None:
    batch = collate([([1, 7], []), ([1], [])], pad_id=0)
    assert batch.lengths.tolist() == [0, 0]
    assert {t.dtype for t in batch if t is not None} == {torch.int64} and batch.labels.numel() == 0


def test_collate_refuses_an_empty_prompt() -> None:
    """Its response's first token would be predicted from padding."""
    with pytest.raises(UserError, match="prompt has no tokens"):
        collate([([1], [2]), ([], [5, 2])], pad_id=0)
