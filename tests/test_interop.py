"""What the stages leave is read by others: Transformers, PEFT, lm-eval, datasets."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from runs import TINY, Finished, completed
from selfcritique.checkpoints import adapter_base, plain_checkpoint
from selfcritique.config import EngineConfig
from selfcritique.records import Message, Prompt
from selfcritique.stages import open_engine

QUESTION = "Tom has 3 pens. Tom buys 2 more. How many pens does Tom have now?"
ANSWERS = ("#### 5", "#### 4", "3 + 2 = 5\n#### 5")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Critic, RFT and DPO as adapters; whatever trains moves far, so that a lost adapter shows."""
    more = ("model.lora={rank:4,alpha:64}", "critic.train.lr=2e-2", "rft.train.lr=2e-2", "dpo.train.lr=2e-2")
    return completed(tmp_path_factory.mktemp("lora"), *TINY, *more, "until=dpo")


def logps(model: Any, folder: Path) -> list[float]:
    """Of each answer to the question, its EOS included, by Transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(asked, add_special_tokens=False).input_ids
    found = []
    for answer in ANSWERS:
        ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.inference_mode():
            rows = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        found.append(sum(rows[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)))
    return found


def by_engine(folder: Path) -> list[float]:
    with open_engine(EngineConfig(max_batch_tokens=400), folder, folder) as engine:
        (batch,) = engine.continuation_logprobs([Prompt((Message("user", QUESTION),))], ANSWERS)
    return list(batch.scores[0].logps)


@pytest.mark.parametrize("stage", ["base", "critic", "rft", "dpo"])
def test_a_full_checkpoint_loads_plainly(smoke: Finished, stage: str) -> None:
    folder = smoke.artifact(stage)
    assert not (folder / "adapter_config.json").exists()
    found = logps(AutoModelForCausalLM.from_pretrained(folder).eval(), folder)
    assert found == pytest.approx(by_engine(folder), abs=1e-4)


@pytest.mark.parametrize("stage", ["critic", "rft", "dpo"])
def test_an_adapter_loads_plainly(lora: Finished, stage: str) -> None:
    """On its base, which for DPO is the merged RFT model."""
    folder = lora.artifact(stage)
    assert not (folder / "model.safetensors").exists()
    base = adapter_base(folder)
    assert base == (lora.artifact("rft") if stage == "dpo" else lora.artifact("base"))
    plain = AutoModelForCausalLM.from_pretrained(plain_checkpoint(base)).eval()
    before = logps(plain, folder)
    found = logps(PeftModel.from_pretrained(plain, str(folder)).eval(), folder)
    assert max(abs(x - y) for x, y in zip(found, before, strict=True)) > 0.1
    assert found == pytest.approx(by_engine(folder), abs=1e-4)
    merged = plain_checkpoint(folder)
    assert logps(AutoModelForCausalLM.from_pretrained(merged).eval(), merged) == pytest.approx(
        found, abs=1e-3
    )


def test_dpo_on_adapters_starts_at_ln_2(lora: Finished) -> None:
    first = json.loads((lora.artifact("dpo") / "metrics.jsonl").read_text().splitlines()[0])
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_lm_eval_measures_a_checkpoint(smoke: Finished, tmp_path: Path) -> None:
    """A task of four questions with three choices: its accuracy is that of the likeliest by Transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = smoke.artifact("dpo")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    choices, rows = ["4", "5", "6"], []
    for n in range(4):
        question = f"Tom has {n + 1} pens and buys 2 more.\n####"
        scores = []
        for choice in choices:
            context = tokenizer(question, add_special_tokens=False).input_ids
            whole = tokenizer(f"{question} {choice}", add_special_tokens=False).input_ids
            with torch.inference_mode():
                values = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(values[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        likeliest = scores.index(max(scores))
        label = likeliest if n != 3 else (likeliest + 1) % 3  # the last one is answered wrongly
        rows.append({"question": question, "choices": choices, "label": label})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "pens",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "pens.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32,add_bos_token=False", tasks=["pens"],
        task_manager=manager, device="cpu", batch_size=1, bootstrap_iters=0,
    )  # fmt: skip
    assert result["results"]["pens"]["acc,none"] == 0.75


def test_datasets_reads_the_scored_pool(smoke: Finished, tmp_path: Path) -> None:
    file = smoke.artifact("scores_rft") / "scored.parquet"
    table = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
    expected = pl.read_parquet(file)
    assert table.column_names == expected.columns and table.to_list() == expected.to_dicts()
    assert len(table) > 0
