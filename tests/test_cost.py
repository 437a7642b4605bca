"""FLOPs by hand, and how a plan's estimate follows from the settings."""

from dataclasses import replace
from pathlib import Path

import pytest

from runs import completed, compose
from selfcritique import cost
from selfcritique.config import ShapeConfig
from selfcritique.cost import Cost, describe, estimate, forward_flops
from selfcritique.pipeline import build

SHAPE = ShapeConfig(layers=2, hidden_size=8, intermediate_size=16, heads=2, kv_heads=1, vocabulary=10)
PAPER = ("experiment=paper", "plan=true", "data.mix=[{source:word_problems}]")


def test_forward_flops_by_hand() -> None:
    """A layer: q and o 8 x 8 each, k and v 8 x 4 each, three of 8 x 16: 64 + 64 + 32 + 32 + 384 = 576
    weights, so 2 * 2 * 576 = 2,304 FLOPs a token and, at 5 positions, 4 * 2 layers * 2 heads * 4 * 5 = 320 of
    attention; the head for one of the three tokens: 2 * 8 * 10 = 160."""
    assert forward_flops(SHAPE, tokens=3, context=5, logits=1) == 3 * (2304 + 320) + 160


def test_qwen_has_the_weights_that_it_says() -> None:
    """Its card: 7.61 billion parameters, 6.53 without embedding and head, which are alike."""
    shape = compose("model=qwen2_5_7b").model.shape
    assert shape is not None
    assert forward_flops(shape, 1, 0, 0) / 2 == pytest.approx(6.53e9, rel=0.002)
    assert forward_flops(shape, 0, 0, 1) / 2 == pytest.approx((7.61e9 - 6.53e9) / 2, rel=0.02)


def costs_of(*words: str) -> dict[tuple[str, str], Cost]:
    graph = build(compose(*PAPER, *words))
    return {(c.name, c.kind): c for c in estimate(graph, SHAPE)}


def test_tokens_of_the_paper() -> None:
    """6,000 questions of 150 tokens and 8 answers of half of 512 each; every answer critiqued after question,
    reference and response; half of them trained on, three times."""
    found = costs_of()
    assert found["pool_rft", "read"].tokens == 6000 * 150
    assert found["pool_rft", "sampled"].tokens == 6000 * 8 * 256
    assert found["scores_rft", "read"].tokens == 48_000 * (150 + 150 + 2 * 256)
    assert found["scores_rft", "sampled"].tokens == 48_000 * 256
    assert found["rft", "trained"].tokens == 3 * 24_000 * (150 + 256)
    assert found["critic", "trained"].tokens == 2 * 8000 * 1.5 * (812 + 256)
    assert found["reference", "read"].tokens == found["dpo", "trained"].tokens == 2000 * (150 + 512)
    names = [name for name, _ in found]
    assert len(names) == len(set(found)) and not {"select", "pairs", "eval_dpo"} & set(names)


def test_flops_of_training() -> None:
    """LoRA with layers computed again: forward twice and the gradient of inputs; all weights: that of weights
    too; without recomputation: one pass less. Reading, of the reference: one."""
    flops = {
        words: costs_of(*words.split())["dpo", "trained"].flops
        for words in ("model.lora.rank=8", "model.lora.rank=0", "trainer.gradient_checkpointing=false")
    }
    one = costs_of()["reference", "read"].flops
    assert list(flops.values()) == pytest.approx([3 * one, 4 * one, 2 * one])


def test_logit_scores_need_one_pass() -> None:
    found = costs_of("critic.ask.mode=logit")
    assert found["scores_rft", "read"].tokens == 48_000 * (812 + cost.SCORES)
    assert ("scores_rft", "sampled") not in found


def test_hours_are_of_the_stated_machine() -> None:
    """One hour at 10 % of the peak, sampled; half an hour at 40 %, read."""
    costs = [Cost("a", "sampled", 2e6, 3600 * 989e11), Cost("b", "read", 1e6, 1800 * 0.4 * 989e12)]
    assert [c.gpu_hours for c in costs] == pytest.approx([1, 0.5])
    text = describe(costs)
    assert "About 1.5 GPU-hours" in text and "2.0 M tokens sampled" in text and "10%" in text


def test_a_checkpoint_that_is_here_says_its_own_shape(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(
        '{"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,'
        ' "num_key_value_heads": 1, "vocab_size": 10}'
    )
    run = compose("model=qwen2_5_7b", f"model.path={folder}")
    assert cost.shape_of(run) == SHAPE
    assert cost.shape_of(compose("model=qwen2_5_7b")) == replace(
        SHAPE, layers=28, hidden_size=3584, intermediate_size=18944, heads=28, kv_heads=4, vocabulary=152064
    )
    assert cost.shape_of(compose()) is None


def test_plan_says_what_a_run_costs(tmp_path: Path) -> None:
    """Of the paper's setting with data that needs no network; the checkpoint is not here either."""
    planned = completed(tmp_path, *PAPER)
    assert "GPU-hours of an H100" in " ".join(planned.stdout.split())
