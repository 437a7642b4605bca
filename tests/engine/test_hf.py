"""The hf engine against plain Transformers, one prompt at a time, and against exact probabilities."""

from collections import Counter
from math import sqrt
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scripted import EngineDied, ScriptedEngine
from selfcritique.engine.base import SamplingParams, plan_batches
from selfcritique.engine.hf import HfEngine, choose_tokens
from selfcritique.errors import UserError
from selfcritique.records import Message, Prompt

SCORES = [str(score) for score in range(1, 11)]


def user(content: str) -> Prompt:
    return Prompt((Message("user", content),))


PROMPTS = [user(" ".join("abcdefghijklmnop"[i % 5 : i % 5 + 1 + i % 9])) for i in range(24)]


@pytest.fixture(scope="module")
def hf(tiny_dir: Path) -> HfEngine:
    return HfEngine(tiny_dir, max_batch_tokens=400)


@pytest.fixture(scope="module")
def gpt2_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned absolute positions: wrong position ids show here, while rotary ones forgive a shift."""
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer = HfEngine(tiny_dir, 1).encoder.tokenizer
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
        initializer_range=0.4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def generate_alone(engine: HfEngine, prompt: Prompt, max_tokens: int) -> list[int]:
    """Greedy continuation by Transformers' own `generate`, EOS included."""
    ids = torch.tensor([engine.encoder.prompt_ids(prompt)])
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
        eos_token_id=engine.eos_ids.tolist(),
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("extra_eos", [[], [24, 25, 26, 27, 28]])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_texts_equal_generate_one_by_one(
    tiny_dir: Path, gpt2_dir: Path, family: str, extra_eos: list[int]
) -> None:
    """Padded batches with rows that end early and are dropped; several EOS tokens end more of them."""
    engine = HfEngine(tiny_dir if family == "llama" else gpt2_dir, max_batch_tokens=400)
    engine.eos_ids = torch.tensor([2, *extra_eos])
    params = SamplingParams(n=1, temperature=0, max_tokens=20, seed=0)
    batches = list(engine.generate(PROMPTS, params))
    assert 1 < len(batches) < len(PROMPTS) // 3
    for completion in (c for b in batches for c in b.completions):
        alone = generate_alone(engine, PROMPTS[completion.prompt_index], 20)
        ended = alone[-1] in engine.eos_ids.tolist()
        text = engine.encoder.tokenizer.decode(alone[:-1] if ended else alone, skip_special_tokens=True)
        assert (completion.text, completion.n_tokens) == (text, len(alone))
        assert completion.truncated is not ended


def test_eos_is_read_from_generation_config_and_tokenizer(tiny_dir: Path, tmp_path: Path) -> None:
    engine = HfEngine(tiny_dir, 100)
    engine.model.generation_config.eos_token_id = [9, 5]
    engine.model.save_pretrained(tmp_path)
    engine.encoder.tokenizer.save_pretrained(tmp_path)
    assert HfEngine(tmp_path, 100).eos_ids.tolist() == [2, 5, 9]


def exact_probs(engine: HfEngine, ids: list[int]) -> torch.Tensor:
    """(vocabulary,) next-token probabilities in float64."""
    with torch.inference_mode():
        return engine.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def test_samples_follow_the_models_distribution(hf: HfEngine) -> None:
    """Pairs of first and second token from two padded prompts, 6,000 samples each, at temperature 1.

    Pearson's statistic over the k outcomes expected at least 5 times (the rest as one) has mean k - 1 and
    variance 2 (k - 1); six standard deviations above would be an accident of about one in a million.
    """
    n, engine = 6000, HfEngine.__new__(HfEngine)
    engine.__dict__.update(hf.__dict__, max_batch_tokens=10**9, max_rows=10**9, eos_ids=torch.tensor([10**6]))
    prompts = [engine.encoder.prompt_ids(user(text)) for text in ("a b c d e", "b")]
    params = SamplingParams(n=n, temperature=1.0, max_tokens=2, seed=5)
    with torch.inference_mode():
        tokens, _ = engine._sample(prompts, params, seed=5)
    for prompt, drawn in zip(prompts, tokens.split(n), strict=True):
        first = exact_probs(hf, prompt)
        joint = torch.stack([p * exact_probs(hf, [*prompt, t]) for t, p in enumerate(first)])
        counts = Counter(map(tuple, drawn.tolist()))
        common = [(a, b) for a, b in (joint * n >= 5).nonzero().tolist()]
        expected = [float(joint[pair]) * n for pair in common]
        seen = [counts[pair] for pair in common]
        expected.append(n - sum(expected))
        seen.append(n - sum(seen))
        statistic = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
        freedom = len(expected) - 1
        assert freedom > 20
        assert statistic < freedom + 6 * sqrt(2 * freedom)


def test_tokens_are_chosen_by_inverting_the_distribution() -> None:
    """Probabilities 0.5, 0, 0.3, 0.2: noise below 0.5 gives 0, below 0.8 gives 2, else 3; never token 1.

    top_k=2 keeps 0.5 and 0.3 (5/8, 3/8); top_p=0.6 too, as 0.5 alone is less than 0.6; top_p=0.5 keeps
    the first alone. Temperature 0.5 squares: 0.25, 0.09, 0.04 of 0.38, so the first ends at 0.658.
    """
    noise = torch.tensor([0.0, 0.49, 0.51, 0.64, 0.67, 0.79, 0.81, 0.999999], dtype=torch.float64)
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(len(noise), -1)

    def chosen(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[int]:
        params = SamplingParams(1, temperature, 1, seed=0, top_p=top_p, top_k=top_k)
        return choose_tokens(logits, params, noise).tolist()

    assert chosen() == [0, 0, 2, 2, 2, 2, 3, 3]
    assert chosen(top_k=2) == chosen(top_p=0.6) == [0, 0, 0, 2, 2, 2, 2, 2]
    assert chosen(top_p=0.5) == chosen(temperature=0) == [0] * 8
    assert chosen(temperature=0.5) == [0, 0, 0, 0, 2, 2, 2, 3]
    impossible_first = torch.tensor([[-torch.inf, 0.0]])
    params = SamplingParams(n=1, temperature=1.0, max_tokens=1, seed=0)
    assert choose_tokens(impossible_first, params, noise[:1]).tolist() == [1]  # noise 0 is no excuse


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("prefix", "given"), [("Score: ", 2), ("", 0)])
def test_candidate_scores_equal_one_forward_each(
    tiny_dir: Path, gpt2_dir: Path, family: str, prefix: str, given: int
) -> None:
    """Sum of log-probs of the candidate's tokens and EOS after prompt and prefix, each run on its own.

    "Score" and ":" are the two given tokens; "10" is two tokens, of which the first is that of "1".
    """
    engine = HfEngine(tiny_dir if family == "llama" else gpt2_dir, max_batch_tokens=300)
    rows = [s for b in engine.continuation_logprobs(PROMPTS, SCORES, prefix) for s in b.scores]
    assert len(rows) == len(PROMPTS)
    for row in rows:
        start = len(engine.encoder.prompt_ids(PROMPTS[row.prompt_index])) + given
        for candidate, logp in zip(SCORES, row.logps, strict=True):
            answer = engine.encoder.response_ids(prefix + candidate)
            ids = engine.encoder.prompt_ids(PROMPTS[row.prompt_index]) + answer
            assert len(ids) - start == len(candidate) + 1
            with torch.inference_mode():
                logps = engine.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(float(logps[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert logp == pytest.approx(expected, abs=1e-4)


def test_seed_changes_samples_and_samples_differ(hf: HfEngine) -> None:
    def texts(seed: int) -> list[str]:
        params = SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=seed)
        return [c.text for b in hf.generate(PROMPTS[:1], params) for c in b.completions]

    assert texts(0) == texts(0) != texts(1)
    assert len(set(texts(0))) == 4


def test_plan_fills_batches_by_their_longest_prompt() -> None:
    """Lengths 5, 3, 1, 4 with 2 rows each and 1 new token, at most 20 tokens: the longest prompt takes
    2 x 6 = 12 alone; 4 takes 10, so two fit (with 3); 1 is left. One row more than fits is its own batch.
    """
    prompts = [[7] * n for n in (5, 3, 1, 4)]
    plan = plan_batches(prompts, rows=2, new_tokens=1, max_tokens=20, max_rows=100, salt="x")
    assert [b.indices for b in plan] == [(0,), (3, 1), (2,)]
    tight = plan_batches(prompts, rows=2, new_tokens=1, max_tokens=1, max_rows=100, salt="x")
    assert [b.indices for b in tight] == [(0,), (3,), (1,), (2,)]
    assert [len(b.indices) for b in plan_batches(prompts, 2, 1, 10**6, max_rows=6, salt="x")] == [3, 1]
    other = plan_batches(prompts, rows=2, new_tokens=1, max_tokens=20, max_rows=100, salt="y")
    assert {b.seed for b in plan}.isdisjoint(b.seed for b in other)


def test_mistakes_are_named_before_sampling(hf: HfEngine, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"n is 0.*max_tokens is 0.*temperature is -1.*top_p is 0.*top_k is -1"
    ):
        SamplingParams(n=0, temperature=-1, max_tokens=0, seed=0, top_p=0, top_k=-1)
    with pytest.raises(UserError, match="set n to 1"):
        SamplingParams(n=2, temperature=0, max_tokens=5, seed=0)
    with pytest.raises(UserError, match="context of 128"):
        next(hf.generate(PROMPTS, SamplingParams(n=1, temperature=0, max_tokens=125, seed=0)))
    with pytest.raises(UserError, match="No usable checkpoint"):
        HfEngine(tmp_path / "missing", 100)


def test_scripted_engine_dies_once_and_finishes_on_rerun() -> None:
    """Three batches of two prompts; death instead of the second leaves one, and the rerun the others."""
    prompts, params = PROMPTS[:6], SamplingParams(n=1, temperature=0, max_tokens=9, seed=0)
    done = []
    dying = ScriptedEngine(lambda p, s: "a", batch_size=2, die_at=1)
    with pytest.raises(EngineDied):
        done.extend(b.batch_id for b in dying.generate(prompts, params))
    rest = ScriptedEngine(lambda p, s: "a", batch_size=2).generate(prompts, params, done=set(done))
    assert (len(done), len(list(rest))) == (1, 2)
