"""From token ids to batches: which examples a step trains on, and how they are cut for the model.

A global batch (one optimiser step) is a function of the seed and the step alone, so training goes on
exactly where it stopped. Within it, micro-batches hold sequences of similar length under a token budget;
nothing about them changes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfcritique.config import Layout
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
        """Tokens of the longer of its two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def shared(self) -> int:
        """Tokens of both sequences with the prompt once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def tokens(self) -> int:
        """Tokens of both sequences."""
        return self.shared + len(self.prompt_ids)


# NamedTuples: Lightning's precision plugins rebuild what a step receives, and refuse frozen dataclasses.


class TokenBatch(NamedTuple):
    """Sequences laid out for the model, and their response tokens.

    Padding stands at the end of rows and is never read: attention is causal and only the listed places are.
    """

    input_ids: Tensor  # (rows, longest)
    position_ids: Tensor | None  # (rows, longest); None: as they stand
    branch: Tensor | None  # (rows, longest) 0 prompt, n its n-th response, which sees the prompt and itself
    at: Tensor  # (tokens,) where each response token is predicted, in the flattened input: one before it
    sequence: Tensor  # (tokens,) which response it belongs to
    labels: Tensor  # (tokens,) the response token itself
    lengths: Tensor  # (sequences,) response tokens, EOS included
    examples: Tensor  # (rows of the caller,) whose they are

    def to(self, device: torch.device) -> "TokenBatch":
        tensors: Any = (tensor if tensor is None else tensor.to(device) for tensor in self)
        return TokenBatch(*tensors)

    def attention_mask(self) -> Tensor | None:
        """(rows, 1, longest, longest), true where a token sees another; None: all before it."""
        if self.branch is None:
            return None
        seen = (self.branch[:, None] == 0) | (self.branch[:, None] == self.branch[:, :, None])
        return seen.tril()[:, None]


class Step(NamedTuple):
    """One optimiser step: a global batch, cut."""

    micros: list[Any]  # TokenBatch (SFT), or TokenBatch and reference log-probs (2, pairs) (DPO)
    whole: Denominators
    tokens: int  # of prompts and responses of the global batch, padding not counted
    idle: int = 0  # last micro-batches that do not count: every process runs as many


def collate(
    rows: Sequence[Sequence[list[int]]],
    pad_id: int,
    layout: Layout = Layout.shared,
    examples: Sequence[int] = (),
) -> TokenBatch:
    """One batch of rows (prompt ids, response ids of one or more responses), each with as many responses.

    Sequences are numbered by response, then by row: all first responses, then all second ones. A response
    may be empty, a prompt may not.
    """
    if not all(row[0] for row in rows):
        raise UserError("A prompt has no tokens, so nothing predicts its response's first one.")
    if layout is not Layout.shared:
        rows = [(row[0], row[side]) for side in range(1, len(rows[0])) for row in rows]
    ids = [[token for part in row for token in part] for row in rows]
    longest = max(map(len, ids))
    packed = layout is Layout.packed
    starts = list(accumulate(map(len, ids), initial=0)) if packed else range(0, longest * len(ids), longest)
    at, labels, lengths = [], [], []
    for side in range(1, len(rows[0])):
        for start, row in zip(starts, rows, strict=False):
            response = row[side]
            own = start + sum(map(len, row[:side]))
            at += [start + len(row[0]) - 1, *range(own, own + len(response) - 1)][: len(response)]
            labels += response
            lengths.append(len(response))
    together = len(rows[0]) > 2
    position_ids = branch = None
    if packed or together:
        position_ids = _matrix([_positions(row) for row in rows], 0, packed)
    if together:
        branch = _matrix([[n for n, part in enumerate(row) for _ in part] for row in rows], -1, packed)
    counts = torch.tensor(lengths)
    return TokenBatch(
        _matrix(ids, pad_id, packed),
        position_ids,
        branch,
        torch.tensor(at, dtype=torch.long),
        torch.repeat_interleave(torch.arange(len(counts)), counts),
        torch.tensor(labels, dtype=torch.long),
        counts,
        torch.tensor(examples, dtype=torch.long),
    )


def _positions(row: Sequence[list[int]]) -> list[int]:
    """Each response stands right after the prompt."""
    prompt = len(row[0])
    return [*range(prompt), *(i for part in row[1:] for i in range(prompt, prompt + len(part)))]


def _matrix(rows: Sequence[list[int]], pad: int, packed: bool) -> Tensor:
    """Rows padded at their ends, or one after another in a single row."""
    if packed:
        return torch.tensor([[value for row in rows for value in row]])
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


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
