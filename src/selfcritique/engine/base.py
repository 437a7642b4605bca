"""What every engine promises, whatever samples the text: policy, critic and judge share one Protocol.

`generate` and `continuation_logprobs` plan their batches over *all* prompts before any work and yield
each batch as it finishes. The caller journals a batch whole; a resumed run passes the ids it has as
`done`. Where batches are seeded by their id (hf), it then equals an uninterrupted run.
"""

import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from selfcritique.errors import UserError
from selfcritique.prompts import PromptEncoder
from selfcritique.records import Prompt, content_id


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; part of every batch id."""

    n: int  # samples per prompt
    temperature: float  # 0: greedy
    max_tokens: int  # EOS included
    seed: int
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit

    def __post_init__(self) -> None:
        problems = []
        if self.n < 1:
            problems.append(f"n is {self.n}, must be at least 1")
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}, must be at least 1")
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}, must be 0 (greedy) or positive")
        if self.temperature == 0 and self.n > 1:
            problems.append(f"temperature is 0 with n = {self.n}: greedy samples are all alike, set n to 1")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, must be 0 (no limit) or positive")
        if problems:
            raise UserError("Sampling settings: " + "; ".join(problems))


@dataclass(frozen=True)
class Completion:
    prompt_index: int
    sample: int  # 0-based among the prompt's n
    text: str  # without EOS
    n_tokens: int  # EOS included
    truncated: bool  # stopped by max_tokens


@dataclass(frozen=True)
class BatchResult:
    batch_id: str
    completions: list[Completion]


@dataclass(frozen=True)
class ContinuationScores:
    """How probable each candidate is as the prompt's whole continuation."""

    prompt_index: int
    logps: tuple[float, ...]  # (n_candidates,) log p(candidate's tokens and EOS | prompt, prefix)
    missing_mass: float  # probability of every other continuation: 1 - sum(exp(logps))


@dataclass(frozen=True)
class ScoreBatch:
    batch_id: str
    scores: list[ContinuationScores]


class Engine(Protocol):
    """A model that continues prompts. Order of batches and of items in them is not promised."""

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, done: Container[str] = frozenset()
    ) -> Iterator[BatchResult]:
        """All batches whose id is not in `done`; together with those, n completions of each prompt."""
        ...

    def continuation_logprobs(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[str],
        prefix: str = "",
        done: Container[str] = frozenset(),
    ) -> Iterator[ScoreBatch]:
        """Scores of each candidate, given that the answer begins with `prefix`.

        prefix + candidate is tokenised whole, as in training; what is given is the tokens that this has
        in common with the prefix alone.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Closes:
    """Leaving its block closes an engine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class PlannedBatch:
    batch_id: str
    indices: tuple[int, ...]  # of prompts, longest first
    prompts: tuple[Sequence[int], ...]  # their token ids

    @property
    def seed(self) -> int:
        """63 bits from the id, which covers the settings' seed and the batch's contents."""
        return int.from_bytes(hashlib.sha256(self.batch_id.encode()).digest()[:8], "big") >> 1


def plan_batches(
    prompt_ids: Sequence[Sequence[int]], rows: int, new_tokens: int, max_tokens: int, max_rows: int, salt: str
) -> list[PlannedBatch]:
    """Batches of similar length, longest first, so that too large a batch fails at once.

    Each prompt takes `rows` rows of its batch's longest prompt plus `new_tokens`; a batch holds at most
    `max_tokens` tokens and `max_rows` rows, but always one prompt. `salt` names everything else that
    changes the result: it and the contents make the batch's id.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), i))
    batches: list[PlannedBatch] = []
    start = 0
    while start < len(order):
        width = len(prompt_ids[order[start]]) + new_tokens
        size = max(1, min(max_tokens // (rows * width), max_rows // rows))
        indices = tuple(order[start : start + size])
        contents = [(i, *prompt_ids[i]) for i in indices]
        batch_id = content_id("batch", salt, contents)
        batches.append(PlannedBatch(batch_id, indices, tuple(prompt_ids[i] for i in indices)))
        start += size
    return batches


def check_context(prompt_ids: Sequence[Sequence[int]], new_tokens: int, limit: int | None) -> None:
    """Raise if the longest prompt with its new tokens exceeds the model's context."""
    longest = max(map(len, prompt_ids), default=0)
    if limit is not None and longest + new_tokens > limit:
        raise UserError(
            f"The longest of {len(prompt_ids)} prompts has {longest} tokens; with {new_tokens} new ones it "
            f"exceeds the model's context of {limit}. Lower max_tokens or leave such problems out."
        )


def end_ids(generation_config: Any, encoder: PromptEncoder) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the generation config."""
    configured = generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({encoder.eos_id, *more})
