"""A fake engine for tests: answers and scores come from functions, and it can die when told to."""

from collections.abc import Callable, Container, Iterator, Sequence
from math import exp

from selfcritique.engine.base import (
    BatchResult,
    Closes,
    Completion,
    ContinuationScores,
    PlannedBatch,
    SamplingParams,
    ScoreBatch,
    plan_batches,
)
from selfcritique.records import Prompt


class EngineDied(RuntimeError):
    """The death that the test asked for."""


class ScriptedEngine(Closes):
    """Answers `answer(prompt, sample)`, one token a word; scores candidates with `logp(prompt, text)`.

    `batch_size` counts prompts. With `die_at` = k the engine raises `EngineDied` instead of yielding its
    (k+1)-th batch, counted over all its calls.
    """

    def __init__(
        self,
        answer: Callable[[Prompt, int], str],
        logp: Callable[[Prompt, str], float] = lambda prompt, text: -float(len(text)) - 2,
        batch_size: int = 4,
        die_at: int | None = None,
    ) -> None:
        self.answer = answer
        self.logp = logp
        self.batch_size = batch_size
        self.die_at = die_at
        self.n_yielded = 0

    def close(self) -> None:
        """Nothing to free."""

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, done: Container[str] = frozenset()
    ) -> Iterator[BatchResult]:
        for batch in self._plan(prompts, f"generate {params}"):
            if batch.batch_id not in done:
                self._live()
                yield BatchResult(
                    batch.batch_id,
                    [self._complete(prompts, i, s, params) for i in batch.indices for s in range(params.n)],
                )

    def continuation_logprobs(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[str],
        prefix: str = "",
        done: Container[str] = frozenset(),
    ) -> Iterator[ScoreBatch]:
        for batch in self._plan(prompts, f"score {prefix!r} {list(candidates)}"):
            if batch.batch_id not in done:
                self._live()
                logps = [tuple(self.logp(prompts[i], c) for c in candidates) for i in batch.indices]
                missing = [max(0.0, 1.0 - sum(map(exp, row))) for row in logps]
                yield ScoreBatch(batch.batch_id, list(map(ContinuationScores, batch.indices, logps, missing)))

    def _plan(self, prompts: Sequence[Prompt], salt: str) -> list[PlannedBatch]:
        contents = [list(str(prompt).encode()) for prompt in prompts]
        return plan_batches(contents, 1, 0, max_tokens=2**62, max_rows=self.batch_size, salt=salt)

    def _live(self) -> None:
        if self.n_yielded == self.die_at:
            raise EngineDied(f"Scripted death at batch {self.n_yielded}")
        self.n_yielded += 1

    def _complete(
        self, prompts: Sequence[Prompt], index: int, sample: int, params: SamplingParams
    ) -> Completion:
        text = self.answer(prompts[index], sample)
        words = text.split()
        if len(words) < params.max_tokens:
            return Completion(index, sample, text, len(words) + 1, truncated=False)
        return Completion(index, sample, " ".join(words[: params.max_tokens]), params.max_tokens, True)
