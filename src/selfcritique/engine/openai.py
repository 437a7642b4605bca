"""Sampling and scoring by any server with OpenAI's interface: teacher, judge, critic or policy.

A batch is one request, journaled as its reply comes. Requests run side by side, are spaced by the rate
limits, and are asked again after what passes (429, 5xx, time-outs, cut or broken replies). Replies are kept
by request, so that neither a rerun nor another stage pays for the same one twice.
"""

import asyncio
import json
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp
from pathlib import Path
from typing import Any, TypeVar

from selfcritique.config import ServerConfig
from selfcritique.engine.base import (
    BatchResult,
    Closes,
    Completion,
    ContinuationScores,
    SamplingParams,
    ScoreBatch,
    check_context,
)
from selfcritique.errors import UserError
from selfcritique.prompts import PromptEncoder
from selfcritique.records import Prompt, content_id

T = TypeVar("T")
Reply = Mapping[str, Any]  # the JSON object of a response
_PASSING = (408, 409, 425, 429)  # statuses that another try may mend, beside all from 500
_WAITS_S = (0.5, 60.0)  # of our own back-off, first and longest; a Retry-After may ask for more
# Openings of what templates use as control tokens: a space after them makes them text to any server.
_CONTROL = re.compile(
    r"<(?=[|｜]|/?(?:s|bos|eos|pad|unk|sop|eop|think|\w+_of_turn)>)|\[(?=/?(?:INST|gMASK)\])"
)


@dataclass(frozen=True)
class _Request:
    path: str  # below the server's URL
    body: dict[str, Any]
    slots: Sequence[tuple[int, int]]  # (prompt, sample) that its reply answers
    batch_id: str
    key: str  # of the reply among those kept


class OpenAIEngine(Closes):
    """The model that `server` names, asked in chats; else the one that it serves under the name of the
    `checkpoint` folder, asked in tokens as training spells them (vLLM, SGLang)."""

    def __init__(self, server: ServerConfig, checkpoint: Path | None = None) -> None:
        self.server = server
        self.model = server.model or str(checkpoint)
        self.chats = bool(server.model)
        if not self.chats:
            if checkpoint is None:
                raise UserError(f"The server {server.url} is told no model's name: set server.model.")
            self.encoder, self.context = _tokenizer(checkpoint)
        self.key = os.environ.get(server.key_env, "")
        self.pace = Pace(server.requests_per_minute, server.tokens_per_minute)
        self.kept = _Replies(server.cache)
        self.reached = False
        self.counts = {"requests": 0, "cached": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def close(self) -> None:
        self.kept.close()

    def usage(self) -> dict[str, float]:
        """Requests and tokens of all batches so far, kept and journaled ones included, and their price."""
        prices = (self.server.price_prompt, self.server.price_completion)
        tokens = (self.counts["prompt_tokens"], self.counts["completion_tokens"])
        return {**self.counts, "cost": sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6}

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, done: Container[str] = frozenset()
    ) -> Iterator[BatchResult]:
        """One request a sample, since only then does a reply say how long each text is.

        Equal greedy prompts share one.
        """
        asked: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {}
        for i, body in enumerate(self._bodies(prompts, params)):
            for sample in range(params.n):
                if params.temperature == 0:
                    asked.setdefault(json.dumps(body), (body, []))[1].append((i, sample))
                else:
                    seed = int(content_id(params.seed, i, sample)[:7], 16)  # 28 bits fit any server's integer
                    asked[f"{i} {sample}"] = {**body, "seed": seed}, [(i, sample)]
        path = "/chat/completions" if self.chats else "/completions"
        requests = [self._request(path, body, slots) for body, slots in asked.values()]
        for request, (text, n_tokens, cut) in self._replies(requests, done, _read_text):
            yield BatchResult(
                request.batch_id, [Completion(i, sample, text, n_tokens, cut) for i, sample in request.slots]
            )

    def continuation_logprobs(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[str],
        prefix: str = "",
        done: Container[str] = frozenset(),
    ) -> Iterator[ScoreBatch]:
        """By vLLM's `logprob_token_ids`: one request a prompt, which the server prefills once."""
        if self.chats:
            raise self._unscored("its tokenizer is not here")
        given, tails = self.encoder.candidate_ids(prefix, candidates)
        nodes = list(dict.fromkeys(tuple(tail[:i]) for tail in tails for i in range(len(tail))))
        targets = sorted({token for tail in tails for token in tail})

        def read(reply: Reply) -> tuple[float, ...]:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            found = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
            if any(f"token_id:{token}" not in logps for logps in found for token in targets):
                raise self._unscored("it knows no logprob_token_ids")
            at = {
                (*node, token): logps[f"token_id:{token}"]
                for node, logps in zip(nodes, found, strict=True)
                for token in targets
            }
            return tuple(sum(at[tuple(tail[: i + 1])] for i in range(len(tail))) for tail in tails)

        asked = {
            "model": self.model,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "logprob_token_ids": targets,
            "return_tokens_as_token_ids": True,
        }
        requests = []
        rows = self.encoder.prompt_ids_many(prompts)
        check_context(rows, len(given) + max(map(len, tails)), self.context)
        for i, ids in enumerate(rows):
            body = asked | {"prompt": [[*ids, *given, *node] for node in nodes]}
            requests.append(self._request("/completions", body, [(i, 0)]))
        for request, logps in self._replies(requests, done, read):
            missing = max(0.0, 1.0 - sum(map(exp, logps)))
            yield ScoreBatch(request.batch_id, [ContinuationScores(request.slots[0][0], logps, missing)])

    def _bodies(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[dict[str, Any]]:
        """What is asked of each prompt, apart from the seed."""
        body = {
            "model": self.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if not self.chats:  # what is said here, the server takes from no generation_config.json
            ids = self.encoder.prompt_ids_many(prompts)
            check_context(ids, params.max_tokens, self.context)
            return [{**body, "prompt": row, "top_k": params.top_k, "repetition_penalty": 1.0} for row in ids]
        if params.top_k:
            body["top_k"] = params.top_k
        talks = [
            [{"role": m.role, "content": _CONTROL.sub(r"\g<0> ", m.content)} for m in prompt.messages]
            for prompt in prompts
        ]
        return [{**body, "messages": talk} for talk in talks]

    def _request(self, path: str, body: Mapping[str, Any], slots: Sequence[tuple[int, int]]) -> _Request:
        given = {name: value for name, value in {**body, **self.server.body}.items() if value is not None}
        text = json.dumps(given, sort_keys=True)
        sample = body.get("seed")  # tells samples apart even where `server.body` takes the seed out
        batch_id = content_id("request", path, text, sample, slots)
        return _Request(path, given, slots, batch_id, content_id(self.server.url, path, text, sample))

    def _unscored(self, why: str) -> UserError:
        return UserError(
            f"{self.server.url} cannot score given continuations ({why}): have the critic write critiques "
            "(critic.ask.mode=generate), use engine=hf, or serve the model by vLLM."
        )

    def _replies(
        self, requests: Iterable[_Request], done: Container[str], read: Callable[[Reply], T]
    ) -> Iterator[tuple[_Request, T]]:
        """Each request that is not done, with what `read` finds in its reply."""
        missing = []
        for request in requests:
            reply = self.kept.get(request.key)
            if reply is not None:
                self._count(reply)
            if request.batch_id in done:
                continue
            if reply is None:
                missing.append(request)
            else:
                self.counts["cached"] += 1
                yield request, read(reply)
        if missing:
            yield from self._ask_all(missing, read)

    def _ask_all(
        self, requests: Sequence[_Request], read: Callable[[Reply], T]
    ) -> Iterator[tuple[_Request, T]]:
        """After a failure nothing new is asked, and what is under way still counts before it is raised."""
        client, queue = self._client(), iter(requests)
        flying: set[asyncio.Task[tuple[_Request, T]]] = set()
        failure: BaseException | None = None
        with asyncio.Runner() as runner:
            try:
                while True:
                    room = 0 if failure else self.server.concurrency - len(flying)
                    asked = (self._ask(client, request, read) for request in islice(queue, room))
                    flying |= set(map(runner.get_loop().create_task, asked))
                    if not flying:
                        break
                    landed, flying = runner.run(asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))
                    for task in landed:
                        failure = failure or task.exception()
                        if task.exception() is None:
                            yield task.result()
            finally:
                runner.run(client.close())
        if failure is not None:
            raise failure

    def _client(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise UserError("Asking a server needs the openai package: pip install openai.") from error
        url, wait_s = self.server.url, self.server.timeout_s
        return AsyncOpenAI(base_url=url, api_key=self.key or "none", timeout=wait_s, max_retries=0)

    async def _ask(self, client: Any, request: _Request, read: Callable[[Reply], T]) -> tuple[_Request, T]:
        from openai import OpenAIError

        tokens = len(json.dumps(request.body)) // 3 + request.body.get("max_tokens", 0)
        for attempt in range(self.server.retries + 1):
            await asyncio.sleep(self.pace.wait(time.monotonic(), tokens))
            try:
                reply = await client.post(request.path, body=request.body, cast_to=object)
                found = read(reply)
                self._count(reply)
            except (OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
                if attempt == self.server.retries or not self._may_pass(error):
                    raise self._explained(error, request, attempt + 1) from None
                asked = _retry_after(error)
                self.pace.hold(time.monotonic() + asked)
                first, longest = _WAITS_S
                await asyncio.sleep(max(asked, min(longest, first * 2**attempt) * random.uniform(0.5, 1)))
            else:
                self.reached = True
                self.kept.put(request.key, reply)
                return request, found
        raise AssertionError("the last attempt returns or raises")

    def _may_pass(self, error: Exception) -> bool:
        from openai import APIStatusError

        if isinstance(error, APIStatusError):
            return error.status_code in _PASSING or error.status_code >= 500
        # Who never let us in has another address or is not running. (httpx's class or httpx2's)
        return self.reached or type(error.__cause__).__name__ != "ConnectError"

    def _explained(self, error: Exception, request: _Request, attempts: int) -> UserError:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        s, said, status = self.server, str(error), 0
        if isinstance(error, APIStatusError):
            status = error.status_code
            said = f"{status}: {error.response.text.strip()[:300]}"
        elif isinstance(error, APIConnectionError):
            said = str(error.__cause__ or error)
        said = said.replace(self.key, "[key]") if self.key else said
        refused = 400 <= status < 500 and status not in _PASSING
        if status in (401, 403):
            state = "the key in it is refused" if self.key else "it is not set"
            why = f"wants a key from the environment variable {s.key_env} (server.key_env): {state}"
        elif status == 404:
            why = f"serves no model {self.model!r}, or is no such server (server.model, server.url)"
        elif refused and "logprob_token_ids" in request.body:
            return self._unscored(said)
        elif refused:
            why = "refuses the request (server.body sets fields of it, and leaves out those that are null)"
        elif isinstance(error, APITimeoutError):
            why = f"did not answer within {s.timeout_s:g} s (server.timeout_s), {attempts} times"
        elif isinstance(error, APIConnectionError):
            why = f"cannot be reached (server.url; {attempts} attempts, server.retries={s.retries})"
        else:
            why = f"gave no usable reply to any of {attempts} attempts (server.retries={s.retries})"
        return UserError(f"The server {s.url} {why}. It said: {said}. What it answered is kept for a rerun.")

    def _count(self, reply: Reply) -> None:
        self.counts["requests"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            self.counts[name] += reply["usage"][name]


def _tokenizer(checkpoint: Path) -> tuple[PromptEncoder, int | None]:
    """With the context's length, where the checkpoint has one."""
    from transformers import AutoTokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    return PromptEncoder(AutoTokenizer.from_pretrained(checkpoint)), config.get("max_position_embeddings")


def _read_text(reply: Reply) -> tuple[str, int, bool]:
    """Text, tokens (EOS included), whether the token limit cut it."""
    (choice,) = reply["choices"]
    text = (choice["message"]["content"] or "") if "message" in choice else choice["text"]
    return text, max(1, reply["usage"]["completion_tokens"]), choice["finish_reason"] == "length"


def _retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait; 0 where it does not say so in seconds."""
    from openai import APIStatusError

    said = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    return float(said) if re.fullmatch(r"\d{1,6}(\.\d+)?", said) else 0.0


class Pace:
    """Spaces requests evenly under two limits; a request's tokens are its prompt and all that it may add."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self.per_request = 60 / requests_per_minute if requests_per_minute else 0.0  # seconds
        self.per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self.free = 0.0  # when the next request may start

    def wait(self, now: float, tokens: int) -> float:
        """Seconds until a request may start, which takes its share of time."""
        start = max(now, self.free)
        self.free = start + max(self.per_request, tokens * self.per_token)
        return start - now

    def hold(self, until: float) -> None:
        """No request starts before `until`."""
        self.free = max(self.free, until)


class _Replies:
    """Replies by request in an SQLite file that several processes may share; none are kept without a path."""

    def __init__(self, path: str) -> None:
        file = Path(path).expanduser()
        if path:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.table = sqlite3.connect(file if path else ":memory:", timeout=60, isolation_level=None)
        self.table.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT)")

    def get(self, request: str) -> Reply | None:
        row = self.table.execute("SELECT reply FROM replies WHERE request = ?", (request,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, request: str, reply: Reply) -> None:
        self.table.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (request, json.dumps(reply)))

    def close(self) -> None:
        self.table.close()
