"""From token ids to batches: which examples a step trains on, and how they are cut for the model.

A global batch (one optimiser step) is a function of the seed and the step alone, so training goes on
exactly where it stopped. Within it, micro-batches hold sequences of similar length under a token budget;
nothing about them changes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfcritique.errors import UserError
from selfcritique.train.loss import Denominators

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

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


# NamedTuples: Lightning's precision plugins rebuild what a step receives, and refuse frozen dataclasses.


class TokenBatch(NamedTuple):
    """Right-padded sequences and their response tokens. Padding is never read: attention is causal and
    only the listed positions are."""

    input_ids: Tensor  # (sequences, longest)
    rows: Tensor  # (tokens,) sequence of each response token
    positions: Tensor  # (tokens,) where it is predicted: one before it stands
    labels: Tensor  # (tokens,) the response token itself
    lengths: Tensor  # (sequences,) response tokens, EOS included

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(tensor.to(device) for tensor in self))


class Step(NamedTuple):
    """One optimiser step: a global batch, cut."""

    micros: list[Any]  # TokenBatch (SFT), or TokenBatch and reference log-probs (2, pairs) (DPO)
    whole: Denominators
    tokens: int  # of prompts and responses of the global batch, padding not counted
    idle: int = 0  # last micro-batches that do not count: every process runs as many


def collate(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    """One batch of (prompt ids, response ids). A response may be empty, a prompt may not."""
    if not all(prompt for prompt, _ in sequences):
        raise UserError("A prompt has no tokens, so nothing predicts its response's first one.")
    longest = max(len(p) + len(r) for p, r in sequences)
    input_ids = torch.tensor([p + r + [pad_id] * (longest - len(p) - len(r)) for p, r in sequences])
    lengths = torch.tensor([len(r) for _, r in sequences])
    rows = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    positions = [i for p, r in sequences for i in range(len(p) - 1, len(p) + len(r) - 1)]
    labels = [token for _, r in sequences for token in r]
    at, tokens = (torch.tensor(values, dtype=torch.long) for values in (positions, labels))
    return TokenBatch(input_ids, rows, at, tokens, lengths)


class Schedule:
    """Which examples each step trains on: shuffled epochs, cut into global batches of similar lengths."""

    def __init__(self, lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, min(batch_size, len(lengths)), seed
        self.per_epoch = -(-len(lengths) // self.batch_size)
        self.steps = max(1, round(self.per_epoch * epochs))
        self._cut = (-1, [[0]])  # an epoch and its batches

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[int]:
        """Indices of the examples of a step, from 0."""
        epoch, place = divmod(step, self.per_epoch)
        if self._cut[0] != epoch:
            self._cut = epoch, self._batches(epoch)
        return self._cut[1][place]

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), self.batch_size * GROUP):
            group = sorted(order[start : start + self.batch_size * GROUP], key=self.lengths.__getitem__)
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
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


def micro_batches_of(
    rank: int, processes: int, indices: Sequence[int], lengths: Sequence[int], budget: int, rows: int = 1
) -> tuple[list[list[int]], int]:
    """One process's share of a global batch, and how many micro-batches at its end are idle.

    Every process takes an equal share of each length, and all run equally many micro-batches.
    """
    by_length = sorted(indices, key=lambda i: -lengths[i])
    shares = [micro_batches(by_length[r::processes], lengths, budget, rows) for r in range(processes)]
    idle = max(map(len, shares)) - len(shares[rank])
    return shares[rank] + [[by_length[-1]]] * idle, idle
