"""From token ids to batches: which examples a step trains on, and how they are cut for the model.

A global batch (one optimiser step) is a function of the seed and the step alone, so training goes on
exactly where it stopped. Within it, micro-batches hold sequences of similar length under a token budget;
nothing about them changes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

GROUP = 16  # global batches whose examples are sorted by length together, to pad less


@dataclass(frozen=True)
class TokenExample:
    """The loss is on `response_ids`, which end with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TokenPair:
    """Two responses to one prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences and their response tokens. Padding is never read: attention is causal and
    only the listed positions are."""

    input_ids: Tensor  # (sequences, longest)
    rows: Tensor  # (tokens,) sequence of each response token
    positions: Tensor  # (tokens,) where it is predicted: one before it stands
    labels: Tensor  # (tokens,) the response token itself
    lengths: Tensor  # (sequences,) response tokens, EOS included

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    """One batch of (prompt ids, response ids)."""
    longest = max(len(p) + len(r) for p, r in sequences)
    input_ids = torch.tensor([p + r + [pad_id] * (longest - len(p) - len(r)) for p, r in sequences])
    lengths = torch.tensor([len(r) for _, r in sequences])
    rows = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    positions = [i for p, r in sequences for i in range(len(p) - 1, len(p) + len(r) - 1)]
    labels = [token for _, r in sequences for token in r]
    return TokenBatch(
        input_ids, rows, torch.tensor(positions, dtype=torch.long), torch.tensor(labels), lengths
    )


class Schedule:
    """Which examples each step trains on: shuffled epochs, cut into global batches of similar lengths."""

    def __init__(self, lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, min(batch_size, len(lengths)), seed
        self.per_epoch = -(-len(lengths) // self.batch_size)
        self.steps = max(1, round(self.per_epoch * epochs))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[int]:
        """Indices of the examples of a step, from 0."""
        epoch, place = divmod(step, self.per_epoch)
        return _epoch(tuple(self.lengths), self.batch_size, self.seed, epoch)[place]


@lru_cache(maxsize=2)
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    rng = Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * GROUP):
        group = sorted(order[start : start + batch_size * GROUP], key=lengths.__getitem__)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    rng.shuffle(batches)
    return batches


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], budget: int, rows: int = 1
) -> list[list[int]]:
    """The indices in groups of similar length; `rows` sequences each, padded to at most `budget` tokens."""
    groups: list[list[int]] = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * rows * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
