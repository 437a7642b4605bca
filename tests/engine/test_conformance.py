"""What every engine must do alike. A new engine adds one line to ENGINES.

An entry opens the engine on a checkpoint's directory; its batches hold few prompts. One engine is opened
for the whole module, so it answers many calls, some after calls that were given up half way. The expected
texts and scores are plain Transformers' in float64, one prompt at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import exp
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scripted import ScriptedEngine
from selfcritique.config import EngineConfig, EngineKind, RayConfig, ServerConfig
from selfcritique.engine.base import BatchResult, Completion, Engine, SamplingParams
from selfcritique.engine.hf import HfEngine
from selfcritique.engine.openai import OpenAIEngine
from selfcritique.engine.ray import RayEngine
from selfcritique.engine.vllm import VllmEngine
from selfcritique.errors import UserError
from selfcritique.prompts import PromptEncoder
from selfcritique.records import Message, Prompt
from servers import serve_vllm


def open_vllm(path: Path) -> VllmEngine:
    pytest.importorskip("vllm")
    return VllmEngine(path, EngineConfig(max_batch_tokens=512, kv_cache_gb=0.1), path.parent / "vllm.log")


@contextmanager
def open_openai(path: Path) -> Iterator[OpenAIEngine]:
    """vLLM's own server on loopback."""
    pytest.importorskip("vllm")
    with serve_vllm(path, path.parent / "server.log") as (url, _):
        yield OpenAIEngine(ServerConfig(url, cache=""), path)


@contextmanager
def open_ray(path: Path, config: EngineConfig) -> Iterator[RayEngine]:
    ray = pytest.importorskip("ray")
    with RayEngine(path, config, path.parent) as engine:
        yield engine
    ray.shutdown()


def open_ray_vllm(path: Path) -> AbstractContextManager[RayEngine]:
    pytest.importorskip("vllm")
    one = RayConfig(replicas=1)
    return open_ray(path, EngineConfig(EngineKind.vllm, max_batch_tokens=512, kv_cache_gb=0.1, ray=one))


ENGINES: dict[str, Callable[[Path], AbstractContextManager[Engine]]] = {
    "hf": lambda path: HfEngine(path, max_batch_tokens=200),
    "vllm": open_vllm,
    "openai": open_openai,
    "ray": lambda path: open_ray(path, EngineConfig(max_batch_tokens=200, ray=RayConfig(replicas=2))),
    "ray_vllm": open_ray_vllm,
    "scripted": lambda path: ScriptedEngine(lambda p, s: f"{p.messages[-1].content} {s} " + "x " * 5 * s),
}
MODELS = [name for name in ENGINES if name != "scripted"]
SEEDED = ["hf", "ray", "scripted"]  # a batch sampled again has the same texts
GREEDY = SamplingParams(n=1, temperature=0, max_tokens=8, seed=0)
SAMPLED = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=0)
SCORES = [str(score) for score in range(1, 11)]  # "10" is two tokens
EOS = {2: "</s>", 9: "f", 13: "j"}  # the tokenizer's, and two that only the generation config names


def user(content: str) -> Prompt:
    return Prompt((Message("user", content),))


PROMPTS = [user(" ".join("abcdefghij"[: 1 + i % 7]) + f" {i}") for i in range(12)]
UNICODE = [user(text) for text in ("三 + 三 = ½", "é 😀 a", "½ 三 é b")]


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with three tokens that end an answer."""
    path = tmp_path_factory.mktemp("conformance") / "model"
    copytree(tiny_dir, path)
    GenerationConfig(eos_token_id=list(EOS), pad_token_id=0, bos_token_id=1).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, checkpoint: Path):
    with ENGINES[request.param](checkpoint) as engine:
        yield engine


class Reference:
    """Float64, without batches, padding or a cache."""

    def __init__(self, path: Path) -> None:
        self.encoder = PromptEncoder(AutoTokenizer.from_pretrained(path))
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float64")

    def logps(self, ids: list[int]) -> torch.Tensor:
        """(tokens, vocabulary)"""
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def greedy(self, ids: list[int], max_tokens: int) -> tuple[str, int, bool]:
        """Text without its end, tokens with it, truncated."""
        new: list[int] = []
        while len(new) < max_tokens and (not new or new[-1] not in EOS):
            new.append(int(self.logps(ids + new)[-1].argmax()))
        ended = new[-1] in EOS
        text = self.encoder.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
        return text, len(new), not ended

    def score(self, prompt: Prompt, prefix: str, candidate: str) -> float:
        """log p(candidate and its end | prompt, prefix), where prefix and candidate share no token."""
        given = self.encoder.prompt_ids(prompt) + self.encoder.response_ids(prefix, eos=False)
        ids = self.encoder.prompt_ids(prompt) + self.encoder.response_ids(prefix + candidate)
        assert ids[: len(given)] == given
        logps = self.logps(ids)
        return sum(float(logps[i - 1, ids[i]]) for i in range(len(given), len(ids)))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def by_sample(batches: list[BatchResult]) -> dict[tuple[int, int], Completion]:
    """Completions by (prompt, sample); none may come twice."""
    completions = [c for batch in batches for c in batch.completions]
    table = {(c.prompt_index, c.sample): c for c in completions}
    assert len(table) == len(completions)
    return table


def greedy_texts(engine: Engine, prompts: list[Prompt], max_tokens: int) -> list[tuple[str, int, bool]]:
    """As `Reference.greedy`, in the prompts' order."""
    batches = list(engine.generate(prompts, SamplingParams(1, 0, max_tokens, 0)))
    return [(c.text, c.n_tokens, c.truncated) for _, c in sorted(by_sample(batches).items())]


# ---- completions: all, once ------------------------------------------------------------------------------


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
def test_resume_loses_and_repeats_nothing(engine: Engine, params: SamplingParams, stop: int) -> None:
    whole = list(engine.generate(PROMPTS, params))
    stream = engine.generate(PROMPTS, params)
    first = [next(stream) for _ in range(stop)]
    done = {b.batch_id for b in first}
    rest = list(engine.generate(PROMPTS, params, done=done))
    assert done.isdisjoint(b.batch_id for b in rest)
    assert {b.batch_id for b in first + rest} == {b.batch_id for b in whole}
    assert by_sample(first + rest).keys() == by_sample(whole).keys()
    if params is GREEDY:
        assert by_sample(first + rest) == by_sample(whole)


@pytest.mark.parametrize("engine", SEEDED, indirect=True)
def test_resumed_samples_equal_those_of_an_uninterrupted_run(engine: Engine) -> None:
    whole = list(engine.generate(PROMPTS, SAMPLED))
    rest = list(engine.generate(PROMPTS, SAMPLED, done={whole[0].batch_id}))
    assert by_sample(whole[:1] + rest) == by_sample(whole)


def test_changed_prompts_or_settings_are_other_batches(engine: Engine) -> None:
    def ids(prompts: list[Prompt], params: SamplingParams) -> set[str]:
        return {b.batch_id for b in engine.generate(prompts, params)}

    known = ids(PROMPTS, SAMPLED)
    other_settings = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=1)
    assert known.isdisjoint(ids(PROMPTS, other_settings))
    changed = [user("j " + p.messages[0].content) for p in PROMPTS]
    assert known.isdisjoint(ids(changed, SAMPLED))


def test_the_same_prompt_twice_is_two_prompts(engine: Engine) -> None:
    twice = by_sample(list(engine.generate([PROMPTS[0]] * 2, SAMPLED)))
    assert twice.keys() == {(i, s) for i in range(2) for s in range(3)}


def test_nothing_to_do(engine: Engine) -> None:
    assert list(engine.generate([], GREEDY)) == []
    assert list(engine.continuation_logprobs([], SCORES)) == []
    done = {b.batch_id for b in engine.generate(PROMPTS, GREEDY)}
    assert list(engine.generate(PROMPTS, GREEDY, done=done)) == []


# ---- texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_greedy_texts_counts_and_ends_are_the_references(engine: Engine, reference: Reference) -> None:
    """Texts that end at each of the ends and texts that are cut, the last of them in other company."""
    prompts = PROMPTS + UNICODE
    expected = [reference.greedy(reference.encoder.prompt_ids(p), 20) for p in prompts]
    assert {cut for *_, cut in expected} == {True, False}
    assert any(not text.isascii() for text, *_ in expected)
    assert greedy_texts(engine, prompts, 20) == expected
    assert greedy_texts(engine, prompts[-4:], 20) == expected[-4:]


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_samples_of_a_prompt_differ(engine: Engine) -> None:
    params = SamplingParams(n=8, temperature=1.0, max_tokens=12, seed=3)
    texts = {c.text for b in engine.generate(PROMPTS[:1], params) for c in b.completions}
    assert len(texts) > 4


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_control_tokens_in_a_users_text_are_text(engine: Engine, reference: Reference) -> None:
    prompts = [user(f"a {control} b") for control in ("</s>", "<s>", "<pad>")]
    expected = [reference.greedy(reference.encoder.prompt_ids(p), 20) for p in prompts]
    tokenizer = reference.encoder.tokenizer
    as_control = [reference.greedy([1, *tokenizer.encode(p.messages[0].content + "\n")], 20) for p in prompts]
    assert all(map(tuple.__ne__, expected, as_control))
    assert greedy_texts(engine, prompts, 20) == expected


@pytest.mark.parametrize("engine", MODELS, indirect=True)
def test_a_prompt_that_is_too_long_is_named(engine: Engine) -> None:
    with pytest.raises(UserError, match="context of 128"):
        list(engine.generate([*PROMPTS, user("a " * 121)], GREEDY))
    assert len(greedy_texts(engine, PROMPTS, 8)) == len(PROMPTS)  # and the engine goes on


# ---- scores of candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", MODELS, indirect=True)
@pytest.mark.parametrize(
    ("prefix", "candidates"),
    [("Score: ", SCORES), ("", SCORES), ("", ["a b c", "a b", "", "½ = 三"]), ("a ", ["j"])],
)
def test_candidate_scores_are_the_references(
    engine: Engine, reference: Reference, prefix: str, candidates: list[str]
) -> None:
    """Of one and more tokens, one the beginning of another, the empty one, and one alone."""
    prompts = [*PROMPTS, user("a " * 100)]
    rows = {
        s.prompt_index: s
        for b in engine.continuation_logprobs(prompts, candidates, prefix=prefix)
        for s in b.scores
    }
    assert rows.keys() == set(range(len(prompts)))
    for i, row in rows.items():
        expected = [reference.score(prompts[i], prefix, c) for c in candidates]
        assert row.logps == pytest.approx(expected, abs=1e-4)
        assert row.missing_mass == pytest.approx(1 - sum(map(exp, expected)), abs=1e-4)


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
    whole = {b.batch_id: b.scores for b in engine.continuation_logprobs(PROMPTS, SCORES)}
    stream = engine.continuation_logprobs(PROMPTS, SCORES)
    first = next(stream)
    rest = list(engine.continuation_logprobs(PROMPTS, SCORES, done={first.batch_id}))
    assert [*whole] != [first.batch_id] and first.batch_id not in {b.batch_id for b in rest}
    found = {b.batch_id: b.scores for b in [first, *rest]}
    assert found.keys() == whole.keys() and len(found) == 1 + len(rest)
    for batch_id, scores in found.items():
        for score, expected in zip(scores, whole[batch_id], strict=True):
            assert score.prompt_index == expected.prompt_index
            assert score.logps == pytest.approx(expected.logps, abs=1e-4)
