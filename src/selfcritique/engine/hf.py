"""Sampling and scoring with any Transformers decoder, in this process.

One prompt is prefilled once whatever its number of samples; the loop then runs all rows of a batch in
step, drops finished rows, and writes keys and values into memory set aside beforehand. Each batch draws
its random numbers at once from its own seed, so a batch redone gives the same texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from selfcritique.engine.base import (
    BatchResult,
    Completion,
    ContinuationScores,
    PlannedBatch,
    SamplingParams,
    ScoreBatch,
    plan_batches,
)
from selfcritique.engine.local import CheckpointEngine, Tails
from selfcritique.errors import UserError

LOGITS_PER_BATCH = 2**26  # floats; 256 MB bound the rows where the vocabulary is large
COMPACT_BELOW = 0.8  # share of unfinished rows at which finished ones are dropped


class HfEngine(CheckpointEngine):
    """A checkpoint in this process.

    `max_batch_tokens` bounds rows x (prompt + new tokens) and so the memory of keys and values.
    """

    def __init__(
        self, model_dir: Path | str, max_batch_tokens: int, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        super().__init__(model_dir)
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = max(1, LOGITS_PER_BATCH // self.text_config.vocab_size)
        self.eos_ids = torch.tensor(self.end_ids, device=device)

    @cached_property
    def model(self) -> Any:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.model_dir,
                dtype=self.dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                **self.options,
            )
        except OSError as error:
            raise UserError(
                f"No usable checkpoint (safetensors) at {str(self.model_dir)!r}: {error}"
            ) from error
        return model.to(self.device).eval()

    def close(self) -> None:
        vars(self).pop("model", None)

    def plan(
        self, ids: Sequence[Sequence[int]], rows: int, new_tokens: int, logits: int, salt: str
    ) -> list[PlannedBatch]:
        max_rows = max(1, self.max_rows // logits)
        return plan_batches(ids, rows, new_tokens, self.max_batch_tokens, max_rows, salt)

    def sampled(self, batches: Sequence[PlannedBatch], params: SamplingParams) -> Iterator[BatchResult]:
        for batch in batches:
            with torch.inference_mode():
                tokens, lengths = self._sample(batch.prompts, params, batch.seed)
            yield BatchResult(batch.batch_id, self._completions(batch, params, tokens, lengths))

    def scored(self, batches: Sequence[PlannedBatch], tails: Tails) -> Iterator[ScoreBatch]:
        tree = _Tree.build(tails, self.device)
        for batch in batches:
            with torch.inference_mode():
                logps = self._score(batch.prompts, tree).tolist()
                missing = [max(0.0, 1.0 - sum(map(exp, row))) for row in logps]
            scores = map(ContinuationScores, batch.indices, map(tuple, logps), missing)
            yield ScoreBatch(batch.batch_id, list(scores))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(prompts, width) ids with zeros on the left, and lengths."""
        width = len(prompts[0])  # planned longest first
        ids = [[0] * (width - len(p)) + list(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(
            list(map(len, prompts)), device=self.device
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], repeats: int, new_tokens: int) -> "_Prefilled":
        """One pass over left-padded prompts; keys and values repeated for each prompt's samples."""
        ids, lengths = self._padded(prompts)
        width = ids.shape[1]
        slots = torch.arange(width + new_tokens, device=self.device)
        positions = slots - (width - lengths)[:, None]  # (prompts, width + new), negative at padding
        mask = positions >= 0 if bool((lengths < width).any()) else None
        n_layers = self.text_config.num_hidden_layers
        cache = Cache([_PreallocatedLayer(width + new_tokens, repeats) for _ in range(n_layers)])
        logits = self.model(
            input_ids=ids,
            attention_mask=None if mask is None else mask[:, :width],
            position_ids=positions[:, :width].clamp_min(0),
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        return _Prefilled(
            logits=logits.repeat_interleave(repeats, 0),
            cache=cache,
            mask=None if mask is None else mask.repeat_interleave(repeats, 0),
            positions=positions.repeat_interleave(repeats, 0),
            width=width,
        )

    def _sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens (rows, max_tokens) and lengths (rows,), EOS included, 0 where none came.

        Rows are ordered by prompt, then sample.
        """
        n_rows = len(prompts) * params.n
        generator = torch.Generator(device=self.device).manual_seed(seed)
        noise = torch.rand(
            (params.max_tokens, n_rows), dtype=torch.float64, generator=generator, device=self.device
        )
        tokens = torch.zeros((n_rows, params.max_tokens), dtype=torch.long, device=self.device)
        lengths = torch.zeros(n_rows, dtype=torch.long, device=self.device)
        rows = torch.arange(n_rows, device=self.device)  # of the batch, still in the cache
        state = self._prefill(prompts, params.n, params.max_tokens)
        for step in range(params.max_tokens):
            new = choose_tokens(state.logits, params, noise[step, rows])
            tokens[rows, step] = new
            lengths[rows] = torch.where(
                (lengths[rows] == 0) & torch.isin(new, self.eos_ids), step + 1, lengths[rows]
            )
            unfinished = (lengths[rows] == 0).nonzero().squeeze(1)
            if len(unfinished) == 0 or step + 1 == params.max_tokens:
                break
            if len(unfinished) < COMPACT_BELOW * len(rows):
                rows, new = rows[unfinished], new[unfinished]
                state.keep(unfinished)
            slot = state.width + step
            state.logits = self.model(
                input_ids=new[:, None],
                attention_mask=None if state.mask is None else state.mask[:, : slot + 1],
                position_ids=state.positions[:, slot : slot + 1],
                past_key_values=state.cache,
            ).logits[:, -1]
        return tokens, lengths

    def _completions(
        self, batch: PlannedBatch, params: SamplingParams, tokens: Tensor, lengths: Tensor
    ) -> list[Completion]:
        counts = lengths.tolist()
        rows = [row[: n - 1] if n else row for row, n in zip(tokens.tolist(), counts, strict=True)]
        texts = self.encoder.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(batch.indices[row // params.n], row % params.n, text, n or params.max_tokens, not n)
            for row, (text, n) in enumerate(zip(texts, counts, strict=True))
        ]

    def _score(self, prompts: Sequence[Sequence[int]], tree: "_Tree") -> Tensor:
        """(prompts, candidates) summed log-probs, prompts and candidates in one pass.

        Shared beginnings of candidates ("1", "10") are one token: each token sees the prompt and its own
        ancestors alone.
        """
        ids, lengths = self._padded(prompts)
        width, new = ids.shape[1], len(tree.tokens)
        slots = torch.arange(width, device=self.device) - (width - lengths)[:, None]  # negative at padding
        positions = torch.cat([slots.clamp_min(0), lengths[:, None] + tree.depths], dim=1)
        seen = torch.ones(width + new, width + new, dtype=torch.bool, device=self.device).tril()
        seen[width:, width:] = tree.ancestors
        real = torch.nn.functional.pad(slots >= 0, (0, new), value=True)
        own = torch.eye(width + new, dtype=torch.bool, device=self.device)  # padding sees itself, not nothing
        logits = self.model(
            input_ids=torch.cat([ids, tree.tokens.expand(len(prompts), -1)], dim=1),
            attention_mask=((seen & real[:, None]) | own)[:, None],
            position_ids=positions,
            logits_to_keep=new + 1,
            use_cache=False,
        ).logits  # (prompts, 1 + tree, vocabulary)
        edges = logits.float().log_softmax(-1)[:, tree.parents, tree.targets]
        return edges.new_zeros(len(prompts), tree.n_candidates).index_add_(1, tree.owners, edges)


def choose_tokens(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    """(rows,) next tokens: the likeliest, or by inverting the distribution function at `noise` in [0, 1).

    One uniform number a row is several times faster on CPU than `torch.multinomial`, which draws one
    for each word of the vocabulary.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        worst = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    probs = logits.softmax(-1)
    if params.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= params.top_p
        probs = probs.masked_fill(beyond.gather(-1, index.argsort(-1)), 0)
    below = probs.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(below, noise[:, None] * below[:, -1:], right=True)
    return found.squeeze(1).clamp_max(probs.shape[-1] - 1)


@dataclass
class _Prefilled:
    """A batch between two tokens."""

    logits: Tensor  # (rows, vocabulary) of the next token
    cache: Cache
    mask: Tensor | None  # (rows, slots), False at padding; None where no prompt is padded
    positions: Tensor  # (rows, slots), counted from each prompt's first token
    width: int  # slots of the prompts

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows (their logits too: the next step replaces them)."""
        self.positions = self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _PreallocatedLayer(CacheLayerMixin):
    """Keys and values (rows, heads, slots, head size), written in place rather than concatenated.

    The first update holds the prompts, whose rows are repeated for their samples.
    """

    is_sliding = False  # full length also under sliding attention: the model's mask does the hiding
    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, repeats: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.repeats = repeats
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def space(like: Tensor) -> Tensor:
            rows, heads, _, size = like.shape
            return like.new_empty(rows * self.repeats, heads, self.slots, size)

        self.keys, self.values = space(key_states), space(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys[:, :, : self.length] = key_states.repeat_interleave(self.repeats, 0)
            self.values[:, :, : self.length] = value_states.repeat_interleave(self.repeats, 0)
            return key_states, value_states
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.slots


@dataclass(frozen=True)
class _Tree:
    """Candidates as a tree of tokens; node 0 is the prompt's last token, node i is `tokens[i - 1]`."""

    tokens: Tensor  # (nodes,) inputs; a candidate's last token (EOS) is only a target
    depths: Tensor  # (nodes,) 0 for a candidate's first token
    ancestors: Tensor  # (nodes, nodes) bool: may row see column?
    parents: Tensor  # (edges,) node whose logits predict ...
    targets: Tensor  # (edges,) ... this token
    owners: Tensor  # (edges,) ... of this candidate
    n_candidates: int

    @classmethod
    def build(cls, tails: Sequence[Sequence[int]], device: torch.device) -> "_Tree":
        nodes: dict[tuple[int, ...], int] = {(): 0}
        edges = []
        for owner, tail in enumerate(tails):
            for i, token in enumerate(tail):
                edges.append((nodes.setdefault(tuple(tail[:i]), len(nodes)), token, owner))
        paths = list(nodes)[1:]
        parents, targets, owners = torch.tensor(edges, device=device).T
        return cls(
            tokens=torch.tensor([p[-1] for p in paths], dtype=torch.long, device=device),
            depths=torch.tensor([len(p) - 1 for p in paths], dtype=torch.long, device=device),
            ancestors=torch.tensor([[p[: len(q)] == q for q in paths] for p in paths], device=device),
            parents=parents,
            targets=targets,
            owners=owners,
            n_candidates=len(tails),
        )
