"""What every engine must do alike. A new engine adds one factory to ENGINES.

A factory takes the tiny checkpoint's directory and returns an engine whose batches hold few prompts.
"""

from collections.abc import Callable
from math import exp
from pathlib import Path

import pytest

from selfcritique.engine.base import BatchResult, Completion, Engine, SamplingParams
from selfcritique.engine.hf import HfEngine
from selfcritique.engine.scripted import ScriptedEngine
from selfcritique.records import Message, Prompt

Factory = Callable[[Path], Engine]
ENGINES: dict[str, Factory] = {
    "hf": lambda path: HfEngine(path, max_batch_tokens=200),
    "scripted": lambda path: ScriptedEngine(lambda p, s: f"{p.messages[-1].content} {s} " + "x " * 5 * s),
}
GREEDY = SamplingParams(n=1, temperature=0, max_tokens=8, seed=0)
SAMPLED = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=0)
SCORES = [str(score) for score in range(1, 11)]  # "10" is two tokens


def user(content: str) -> Prompt:
    return Prompt((Message("user", content),))


PROMPTS = [user(" ".join("abcdefghij"[: 1 + i % 7]) + f" {i}") for i in range(12)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny_dir: Path):
    with ENGINES[request.param](tiny_dir) as engine:
        yield engine


def by_sample(batches: list[BatchResult]) -> dict[tuple[int, int], Completion]:
    """Completions by (prompt, sample); none may come twice."""
    completions = [c for batch in batches for c in batch.completions]
    table = {(c.prompt_index, c.sample): c for c in completions}
    assert len(table) == len(completions)
    return table


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_each_sample_comes_once_within_its_limit(engine: Engine, params: SamplingParams) -> None:
    batches = list(engine.generate(PROMPTS, params))
    assert len({b.batch_id for b in batches}) == len(batches) > 1
    table = by_sample(batches)
    assert table.keys() == {(i, s) for i in range(len(PROMPTS)) for s in range(params.n)}
    for completion in table.values():
        assert 1 <= completion.n_tokens <= params.max_tokens
        assert completion.n_tokens == params.max_tokens or not completion.truncated
        assert "</s>" not in completion.text


def test_one_token_is_either_an_end_or_truncated(engine: Engine) -> None:
    one = SamplingParams(n=4, temperature=1.0, max_tokens=1, seed=1)
    for completion in by_sample(list(engine.generate(PROMPTS, one))).values():
        assert completion.n_tokens == 1
        assert completion.truncated or completion.text == ""


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resumed_run_equals_an_uninterrupted_one(engine: Engine, params: SamplingParams, stop: int) -> None:
    whole = list(engine.generate(PROMPTS, params))
    stream = engine.generate(PROMPTS, params)
    first = [next(stream) for _ in range(stop)]
    done = {b.batch_id for b in first}
    rest = list(engine.generate(PROMPTS, params, done=done))
    assert done.isdisjoint(b.batch_id for b in rest)
    assert by_sample(first + rest) == by_sample(whole)


def test_changed_prompts_or_settings_are_other_batches(engine: Engine) -> None:
    def ids(prompts: list[Prompt], params: SamplingParams) -> set[str]:
        return {b.batch_id for b in engine.generate(prompts, params)}

    known = ids(PROMPTS, SAMPLED)
    other_settings = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=1)
    assert known.isdisjoint(ids(PROMPTS, other_settings))
    changed = [user("j " + p.messages[0].content) for p in PROMPTS]
    assert known.isdisjoint(ids(changed, SAMPLED))


def test_nothing_to_do(engine: Engine) -> None:
    assert list(engine.generate([], GREEDY)) == []
    assert list(engine.continuation_logprobs([], SCORES)) == []
    done = {b.batch_id for b in engine.generate(PROMPTS, GREEDY)}
    assert list(engine.generate(PROMPTS, GREEDY, done=done)) == []


def test_candidates_are_scored_for_each_prompt_in_their_order(engine: Engine) -> None:
    batches = list(engine.continuation_logprobs(PROMPTS, SCORES, prefix="Score: "))
    rows = {s.prompt_index: s for b in batches for s in b.scores}
    assert rows.keys() == set(range(len(PROMPTS))) and sum(len(b.scores) for b in batches) == len(PROMPTS)
    reverse = list(engine.continuation_logprobs(PROMPTS, SCORES[::-1], prefix="Score: "))
    for score in (s for b in reverse for s in b.scores):
        assert score.logps == pytest.approx(rows[score.prompt_index].logps[::-1], abs=1e-4)
    for row in rows.values():
        assert all(logp < 0 for logp in row.logps)
        assert row.missing_mass == pytest.approx(1 - sum(map(exp, row.logps)), abs=1e-6)


def test_scoring_resumes(engine: Engine) -> None:
    whole = list(engine.continuation_logprobs(PROMPTS, SCORES))
    assert len(whole) > 1
    rest = list(engine.continuation_logprobs(PROMPTS, SCORES, done={whole[0].batch_id}))
    assert rest == whole[1:]
