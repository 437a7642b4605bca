"""Sampling and scoring with vLLM's offline engine, in a process of its own.

The process and all that it starts form one group: closing the engine kills it, so that a stage's memory is
free when the stage ends, and it ends by itself when this process dies. It starts with the first work to do.
A batch is one prompt with all its completions, journaled when the last of them ends. Prompts go in the order
of their tokens: those that begin alike (question and reference before the response) share what is computed.
"""

import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from math import exp
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from typing import Any

from selfcritique.config import EngineConfig
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
from selfcritique.engine.vllm_process import Answer, Job, Request, main
from selfcritique.errors import UserError

log = logging.getLogger(__name__)
LOG_LINES = 15  # of the process's log, shown when it failed
# One process rather than three, threads as OMP_NUM_THREADS says, and nothing sent home.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine(CheckpointEngine):
    """A checkpoint in a process of its own, whose output is appended to `log_file`."""

    shard = 128  # prompts: some waves of the sequences that run at once

    def __init__(self, model_dir: Path, config: EngineConfig, log_file: Path) -> None:
        if find_spec("vllm") is None:
            raise UserError("engine=vllm needs the package vllm: run `make setup-vllm`, or set engine=hf.")
        super().__init__(model_dir)
        self.context = config.max_model_len or self.context
        self.log_file = log_file
        self._settings: dict[str, Any] = {
            "model": str(model_dir),
            "dtype": config.dtype,
            "max_model_len": self.context,
            "max_num_batched_tokens": config.max_batch_tokens,
            "tensor_parallel_size": config.tensor_parallel_size,
            "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **self.options,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._loaded = False
        self._job = 0
        self._deaths = 0

    def close(self) -> None:
        """Kill the process with its group."""
        if self._process is not None:
            os.killpg(self._process.pid, SIGKILL)
            self._process.wait()
            self._pipe.close()
            self._process = None

    def plan(
        self, ids: Sequence[Sequence[int]], rows: int, new_tokens: int, logits: int, salt: str
    ) -> list[PlannedBatch]:
        plan = plan_batches(ids, rows=1, new_tokens=1, max_tokens=0, max_rows=1, salt=salt)
        return sorted(plan, key=lambda batch: list(batch.prompts[0]))

    def sampled(self, batches: Sequence[PlannedBatch], params: SamplingParams) -> Iterator[BatchResult]:
        sampling = {
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "stop_token_ids": self.end_ids,
        }
        requests = [Request(k, list(b.prompts[0]), sampling) for k, b in enumerate(batches)]
        # Of these batches, not of the call: what is left of a resumed run, or a shard, draws other numbers.
        for answer in self._answers(requests, batches[0].seed % 2**32):
            batch, outputs = batches[answer.index], answer.outputs
            texts = self.encoder.tokenizer.batch_decode(
                [o.ids[:-1] if o.ended else o.ids for o in outputs], skip_special_tokens=True
            )
            yield BatchResult(
                batch.batch_id,
                [
                    Completion(batch.indices[0], sample, text, len(o.ids), not o.ended)
                    for sample, (text, o) in enumerate(zip(texts, outputs, strict=True))
                ],
            )

    def scored(self, batches: Sequence[PlannedBatch], tails: Tails) -> Iterator[ScoreBatch]:
        """One token after each beginning of a candidate, with the log-probs of those that go on from it."""
        following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for tail in tails:
            for i, token in enumerate(tail):
                following[tuple(tail[:i])].add(token)
        beginnings = list(following)
        requests = [
            Request(
                k * len(beginnings) + node,
                [*batch.prompts[0], *beginning],
                {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": sorted(following[beginning])},
            )
            for k, batch in enumerate(batches)
            for node, beginning in enumerate(beginnings)
        ]
        found: dict[int, dict[tuple[int, ...], float]] = defaultdict(dict)  # log-prob of a path's last token
        n_tokens = sum(map(len, following.values()))
        for answer in self._answers(requests, seed=0):
            k, node = divmod(answer.index, len(beginnings))
            beginning, logps = beginnings[node], answer.outputs[0].logps
            found[k] |= {(*beginning, token): logps[token] for token in following[beginning]}
            if len(found[k]) == n_tokens:
                paths, batch = found.pop(k), batches[k]
                totals = tuple(sum(paths[tuple(t[: i + 1])] for i in range(len(t))) for t in tails)
                missing = max(0.0, 1.0 - sum(map(exp, totals)))
                yield ScoreBatch(batch.batch_id, [ContinuationScores(batch.indices[0], totals, missing)])

    def _answers(self, requests: Sequence[Request], seed: int) -> Iterator[Answer]:
        """Each request's answer as it comes. A process that dies is started once more, with the rest."""
        self._job += 1
        job, waiting = self._job, {request.index: request for request in requests}
        while waiting:
            if self._process is None:
                self._start(seed)
            try:
                self._loaded = self._loaded or self._pipe.recv()
                self._pipe.send(Job(job, seed, list(waiting.values())))
                while waiting:
                    answer = self._pipe.recv()
                    if answer.job == job:  # else of a call that was given up
                        del waiting[answer.index]
                        yield answer
            except (EOFError, OSError):
                self._died()

    def _start(self, seed: int) -> None:
        self._pipe, theirs = Pipe()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {main.__module__} import main; main({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ENVIRONMENT},
            )
        self._loaded = False
        self._pipe.send(self._settings | {"seed": seed})

    def _died(self) -> None:
        """Note the process's end, and go on the first time that one dies at work."""
        assert self._process is not None
        process, at_work = self._process, self._loaded
        self.close()
        self._deaths += 1
        if not at_work or self._deaths > 1:
            lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
            when = "twice" if at_work else "while loading"
            raise UserError(
                f"vLLM's process ended {when} (code {process.returncode}). The same command goes on from "
                "what is done. If memory was short (often code -9), lower engine.kv_cache_gb, "
                "gpu_memory_utilization or max_model_len. "
                f"Last lines of {self.log_file}:\n" + "\n".join(lines)
            )
        log.warning("vLLM's process ended (code %s) and is started again", process.returncode)
