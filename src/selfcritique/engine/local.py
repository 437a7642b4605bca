"""Engines of a checkpoint: what is planned on token ids with the tokenizer alone, and the work on batches.

The model is loaded with the first batch to do. So a complete journal loads none, and a plan made here can be
worked off elsewhere (`ray`).
"""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from selfcritique.checkpoints import has_code
from selfcritique.config import EngineConfig, EngineKind
from selfcritique.engine.base import (
    BatchResult,
    Closes,
    PlannedBatch,
    SamplingParams,
    ScoreBatch,
    check_context,
    end_ids,
)
from selfcritique.errors import UserError
from selfcritique.prompts import PromptEncoder
from selfcritique.records import Prompt

Tails = list[list[int]]  # each candidate's tokens after what is given, EOS included


class CheckpointEngine(Closes):
    """A checkpoint directory (or hub name) with its tokenizer."""

    shard = 1  # batches that fill the engine when it is given no more at once

    def __init__(self, model_dir: Path | str) -> None:
        self.model_dir = model_dir
        self.options = {"trust_remote_code": has_code(Path(model_dir))}
        try:
            self.encoder = PromptEncoder(AutoTokenizer.from_pretrained(model_dir, **self.options))
            settings: Any = AutoConfig.from_pretrained(model_dir, **self.options)
        except OSError as error:
            raise UserError(
                f"No usable checkpoint (config, tokenizer) at {str(model_dir)!r}: {error}"
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(model_dir)
        except OSError:
            generation = GenerationConfig.from_model_config(settings)
        self.end_ids = end_ids(generation, self.encoder)
        self.text_config = settings.get_text_config()
        self.context: int | None = getattr(self.text_config, "max_position_embeddings", None)

    def plan(
        self, ids: Sequence[Sequence[int]], rows: int, new_tokens: int, logits: int, salt: str
    ) -> list[PlannedBatch]:
        """`rows` a prompt, each of `new_tokens` beyond it and of `logits` vectors in memory at once."""
        raise NotImplementedError

    def sampled(self, batches: Sequence[PlannedBatch], params: SamplingParams) -> Iterator[BatchResult]:
        raise NotImplementedError

    def scored(self, batches: Sequence[PlannedBatch], tails: Tails) -> Iterator[ScoreBatch]:
        raise NotImplementedError

    def work(self, batches: Sequence[PlannedBatch], task: SamplingParams | Tails) -> Iterator[Any]:
        """The result of each batch as it is done."""
        if isinstance(task, SamplingParams):
            return self.sampled(batches, task)
        return self.scored(batches, task)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, done: Container[str] = frozenset()
    ) -> Iterator[BatchResult]:
        ids = self.encoder.prompt_ids_many(prompts)
        check_context(ids, params.max_tokens, self.context)
        plan = self.plan(ids, params.n, params.max_tokens, 1, f"generate {params}")
        if rest := [batch for batch in plan if batch.batch_id not in done]:
            yield from self.work(rest, params)

    def continuation_logprobs(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[str],
        prefix: str = "",
        done: Container[str] = frozenset(),
    ) -> Iterator[ScoreBatch]:
        if len(set(candidates)) < len(candidates):
            raise ValueError(f"Candidates repeat: {candidates}")
        given, tails = self.encoder.candidate_ids(prefix, candidates)
        ids = [prompt + given for prompt in self.encoder.prompt_ids_many(prompts)]
        check_context(ids, max(map(len, tails)), self.context)
        inner = len(
            {tuple(tail[:i]) for tail in tails for i in range(1, len(tail))}
        )  # tokens with a next one
        plan = self.plan(ids, 1, inner, inner + 1, f"score {tails}")
        if rest := [batch for batch in plan if batch.batch_id not in done]:
            yield from self.work(rest, tails)


def open_local(model_dir: Path, config: EngineConfig, logs: Path) -> CheckpointEngine:
    """The engine of `config.kind`, hf or vllm; what a process of its own prints is kept in `logs`."""
    if config.kind is EngineKind.vllm:
        from selfcritique.engine.vllm import VllmEngine

        return VllmEngine(model_dir, config, logs / "vllm.log")
    from selfcritique.engine.hf import HfEngine

    return HfEngine(model_dir, config.max_batch_tokens, config.dtype, config.device)
