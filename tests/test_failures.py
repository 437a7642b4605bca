"""Failures that a run can meet, each induced once: `diagnose` names it and the setting that was wrong."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl

from runs import SMOKE, Finished, completed


def findings(summary: dict[str, Any]) -> dict[str, str]:
    """Signature -> the setting to change."""
    return {finding["signature"]: finding["setting"] for finding in summary["diagnosis"]}


def spoiled(smoke: Finished, folder: Path, *words: str) -> Finished:
    """The smoke run with other settings, from a copy of its store."""
    shutil.copytree(smoke.store, folder / "store", symlinks=True)
    return completed(folder, *SMOKE, *words)


def test_a_critic_under_its_gate(smoke: Finished) -> None:
    """That of the smoke run, which has learned from a few hundred answers; its card read anew."""
    rows = pl.read_parquet(smoke.artifact("gate") / "rows.parquet")
    decided = rows.filter(pl.col("verdict").is_in(["correct", "incorrect"]))
    right = (pl.col("score") >= 6) == (pl.col("verdict") == "correct")
    balanced = decided.group_by("verdict").agg(right=right.fill_null(False).mean())["right"].mean()
    assert isinstance(balanced, float) and balanced < 0.7
    (found,) = (f for f in smoke.summary["diagnosis"] if f["signature"] == "critic_below_gate")
    assert found["setting"] == "critic.train.epochs" and f"{balanced:.3f}" in found["evidence"]


def test_a_threshold_too_strict(smoke: Finished, tmp_path: Path) -> None:
    scores = pl.read_parquet(smoke.artifact("scores_rft") / "scored.parquet")["score"]
    assert 0 < (scores == 10).sum() < 0.05 * scores.len()  # some are left to select
    strict = spoiled(smoke, tmp_path, "rft.select.threshold=10", "until=select")
    assert findings(strict.summary)["yield_collapse"] == "rft.select.threshold"
    assert "yield_collapse" not in findings(smoke.summary)


def test_a_learning_rate_of_dpo_too_high(smoke: Finished, tmp_path: Path) -> None:
    fast = spoiled(smoke, tmp_path, "dpo.train={lr:0.3,epochs:4}", "until=dpo")
    assert findings(fast.summary)["dpo_diverged"] == "dpo.train.lr"
    assert "dpo_diverged" not in findings(smoke.summary)


def test_where_dpo_starts_and_whose_pairs_it_has_is_known(smoke: Finished, tmp_path: Path) -> None:
    based = spoiled(smoke, tmp_path, "dpo.start=base", "until=dpo")
    assert (based.summary["dpo"]["start"], based.summary["pairs"]["policy"]) == ("base", "rft")


def test_trained_on_one_register_only(tmp_path: Path) -> None:
    """Tested on both; the critic's part is as small as it can be."""
    finished = completed(
        tmp_path, *SMOKE, "data.mix.0.registers=[plain]", "data.mix.0.test_registers=[plain,chatty]",
        "data.splits={critic_train:8,critic_dev:8,pool_rft:40,test:200}", "arms=[]",
        "critic.ask={mode:logit,samples:1,temperature:0.0}", "critic.train={epochs:1,batch_size:8}",
        "rft.select={threshold:1,by:random}", "eval.sampled_questions=0", "until='eval_base,eval_rft'",
    )  # fmt: skip
    (found,) = (f for f in finished.summary["diagnosis"] if f["signature"] == "one_register")
    assert found["setting"] == "data.mix" and "register chatty too" in found["advice"]
    by = finished.summary["models"]["rft"]["by_register"]
    assert (
        f"plain {100 * by['plain']['value']:.1f} %, chatty {100 * by['chatty']['value']:.1f} %"
        in found["evidence"]
    )
