"""vLLM in a process of its own: the other end of `VllmEngine`.

In come the settings, then jobs; out goes True when the model is loaded, then each request's outputs as they
finish. A new job ends the one before. When the other end closes, however its process died, this process
ends with its whole group.
"""

import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

CPU_BLOCK = 32  # tokens; prefixes are shared in whole blocks, and vLLM's 128 exceed most of our prompts


@dataclass(frozen=True)
class Request:
    index: int
    ids: list[int]
    params: dict[str, Any]  # of vllm.SamplingParams


@dataclass(frozen=True)
class Job:
    number: int
    seed: int
    requests: list[Request]


@dataclass(frozen=True)
class Output:
    ids: list[int]  # what ended the text included
    ended: bool  # by one of the stop tokens
    logps: dict[int, float]  # of `logprob_token_ids` as first token, and of the one chosen


@dataclass(frozen=True)
class Answer:
    job: int
    index: int  # of the request
    outputs: list[Output]  # one a sample
    cached: int  # tokens of the prompt that were not computed again


def main(descriptor: int) -> None:
    """The process's whole life; it ends with code 1, and the pipe with it, not before it."""
    pipe = Connection(descriptor)
    try:
        _serve(pipe)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _serve(pipe: Connection) -> None:
    jobs: SimpleQueue[Job] = SimpleQueue()
    settings = pipe.recv()
    Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    engine = load(settings)
    pipe.send(True)
    while True:
        for answer in _answers(engine, jobs.get(), jobs):
            pipe.send(answer)


def _receive(pipe: Connection, jobs: "SimpleQueue[Job]") -> None:
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def load(settings: dict[str, Any]) -> Any:
    """An LLMEngine; `settings` are EngineArgs, of which a CPU has its own."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if current_platform.is_cpu():
        settings.pop("gpu_memory_utilization")
        settings |= {
            "block_size": CPU_BLOCK,
            "enforce_eager": True,  # compiling takes longer than most stages
            "enable_chunked_prefill": False,  # slower
            "max_num_batched_tokens": max(settings["max_num_batched_tokens"], settings["max_model_len"]),
        }
    else:
        settings.pop("kv_cache_memory_bytes")
    return LLMEngine.from_engine_args(EngineArgs(**settings), UsageContext.LLM_CLASS)


def _answers(engine: Any, job: Job, jobs: "SimpleQueue[Job]") -> Iterator[Answer]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(job.seed)
    whole = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
    waiting = {f"{job.number}/{request.index}": request for request in job.requests}
    for name, asked in waiting.items():
        params = SamplingParams(**asked.params, **whole)
        engine.add_request(name, {"prompt_token_ids": asked.ids}, params)
    while waiting:
        for said in engine.step():
            request = waiting.pop(said.request_id, None)
            if request is None:  # of a job that was ended
                continue
            outputs = [
                Output(
                    list(o.token_ids),
                    o.finish_reason == "stop",
                    {t: p.logprob for t, p in (o.logprobs[0] if o.logprobs else {}).items()},
                )
                for o in sorted(said.outputs, key=lambda o: o.index)
            ]
            yield Answer(job.number, request.index, outputs, said.num_cached_tokens or 0)
        if not jobs.empty():
            engine.abort_request(list(waiting))
            return
