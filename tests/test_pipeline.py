"""The whole pipeline on `experiment=smoke`: what a run leaves behind, recomputed from its Parquet files."""

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoTokenizer

from runs import SMOKE, TINY, Finished, completed, read_json, run, timeless
from selfcritique.artifacts import Store
from selfcritique.prompts import PromptEncoder

MODELS = ("base", "sft", "rft", "dpo")
STAGES = 40  # of smoke: 9 to the gate, 10 to the re-gate, 5 to DPO, 4 for each of four models


@pytest.fixture(scope="module")
def summary(smoke: Finished) -> dict[str, Any]:
    return smoke.summary


def test_summary_has_every_promised_field(summary: dict[str, Any]) -> None:
    assert (summary["experiment"], summary["seed"]) == ("smoke", 0)
    assert len(summary["commit"].rstrip("+")) == 40 or summary["commit"] == "unknown"
    stages = summary["wall_s"].keys() - {"total"}
    assert stages == summary["cached"].keys() and len(stages) == STAGES
    assert not any(summary["cached"].values())
    assert sum(summary["wall_s"][stage] for stage in stages) <= summary["wall_s"]["total"]
    assert tuple(summary["models"]) == MODELS
    for model in summary["models"].values():
        accuracy = model["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert accuracy["n"] == 60  # data.splits.test
    pairs = [(row["a"], row["b"]) for row in summary["comparisons"]]
    assert sorted(pairs) == sorted((b, a) for i, a in enumerate(MODELS) for b in MODELS[i + 1 :])
    for row in summary["comparisons"]:
        assert row["metric"] == "accuracy" and row["low"] <= row["delta"] <= row["high"]
        assert row["p"] <= row["p_adjusted"] <= 1 and "relative" in row
    critic = summary["critic"]
    assert critic["n"] + critic["undecided"] == 60  # one response to each of data.splits.critic_dev
    assert all(0 <= critic[f] <= 1 for f in ("balanced_accuracy", "auroc", "f1", "parse_failure_rate"))
    assert summary["selection"]["selected"] > 0 and summary["pairs"]["pairs"] > 0
    assert {"critic_below_gate"} <= {finding["signature"] for finding in summary["diagnosis"]}


def test_metrics_have_the_terms_of_the_merged_loss(smoke: Finished, summary: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (smoke.out / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"base", "critic", "sft", "rft", "dpo"}
    dpo = [row for row in rows if row["stage"] == "dpo"]
    assert [row["step"] for row in dpo] == list(range(1, summary["training"]["dpo"]["steps"] + 1))
    # the policy starts as its reference: no reward yet, and -log sigmoid(0)
    assert dpo[0]["rewards_margin"] == pytest.approx(0, abs=1e-4)
    assert dpo[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    for row in dpo:  # conf/dpo/default.yaml: lambda 1 on the DPO term, beta 0.5
        assert row["loss"] == pytest.approx(1.0 * row["dpo_loss"] + row["sft_loss"], rel=1e-5)
        assert row["rewards_margin"] == pytest.approx(
            row["rewards_chosen"] - row["rewards_rejected"], abs=1e-5
        )
        assert row["rewards_chosen"] == pytest.approx(0.5 * row["chosen_logps_drift"], abs=1e-5)
        assert row["chosen_logps"] < 0 and row["rejected_logps"] < 0
        assert row["rejected_length"] > 1
    pairs = pl.read_parquet(smoke.artifact("pairs") / "pairs.parquet")
    responses = pl.read_parquet(smoke.artifact("pool_dpo") / "responses.parquet")
    texts = pairs.join(responses, left_on="chosen_id", right_on="response_id")["text"].to_list()
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(smoke.artifact("rft")))
    trained = sum(map(len, encoder.response_ids_many(texts)))  # sampled tokens may spell a text in more
    sizes = [min(32, pairs.height - start) for start in range(0, pairs.height, 32)]  # of the batches
    tokens = [
        sum(row["chosen_length"] * n for row, n in zip(dpo, order, strict=True))
        for order in permutations(sizes)
    ]
    assert pytest.approx(trained) in tokens


def test_lineage_names_artifacts_that_exist(smoke: Finished, summary: dict[str, Any]) -> None:
    lineage = read_json(smoke.out / "lineage.json")
    assert lineage.keys() == summary["cached"].keys()
    keys = {entry["key"] for entry in lineage.values()}
    for entry in lineage.values():
        found = Store(smoke.store).find(entry["stage"], entry["key"], None)
        assert found is not None and found.digest == entry["digest"]
        assert {source["key"] for source in found.manifest["inputs"].values()} <= keys


def test_accuracies_and_comparisons_follow_from_the_answers(smoke: Finished, summary: dict[str, Any]) -> None:
    gold = pl.read_parquet(smoke.artifact("problems") / "problems.parquet").filter(split="test")
    right: dict[str, pl.DataFrame] = {}
    for model in MODELS:
        rows = pl.read_parquet(smoke.artifact(f"eval_{model}") / "eval.parquet").filter(kind="greedy")
        rows = gold.select("problem_id", gold="answer").join(rows, on="problem_id", how="left")
        right[model] = rows.select(
            "problem_id", right=(pl.col("answer").str.strip_chars() == pl.col("gold")).fill_null(False)
        )
        assert rows.height == gold.height
        assert summary["models"][model]["accuracy"]["value"] == pytest.approx(right[model]["right"].mean())
    for row in summary["comparisons"]:
        both = right[row["a"]].join(right[row["b"]], on="problem_id", suffix="_b")
        delta = both["right"].cast(pl.Int8) - both["right_b"].cast(pl.Int8)
        assert row["delta"] == pytest.approx(delta.mean())


def test_selection_follows_from_the_scores(smoke: Finished, summary: dict[str, Any]) -> None:
    """Threshold 4, mean of two critiques; per question one of each text and equation list, at most four."""
    critiques = pl.read_parquet(smoke.artifact("scores_rft") / "critiques.parquet")
    scores = critiques.group_by("response_id").agg(pl.col("score").mean())
    responses = pl.read_parquet(smoke.artifact("pool_rft") / "responses.parquet")
    pool = responses.join(scores, on="response_id").filter(pl.col("score") >= 4, ~pl.col("truncated"))
    selected: list[str] = []
    for (_,), rows in pool.group_by("problem_id"):
        seen: set[str | None] = set()
        kept = 0
        for row in sorted(rows.to_dicts(), key=lambda r: (-r["score"], r["n_tokens"], r["response_id"])):
            new = row["text_hash"] not in seen and (
                row["equations_hash"] is None or row["equations_hash"] not in seen
            )
            seen |= {row["text_hash"], row["equations_hash"]}
            if new and kept < 4:
                kept += 1
                selected.append(row["response_id"])
    stored = pl.read_parquet(smoke.artifact("select") / "selected.parquet")
    assert set(selected) == set(stored.filter("selected")["response_id"])
    report = summary["selection"]
    assert report["selected"] == len(selected) == report["reasons"]["selected"]
    assert report["responses"] == stored.height == sum(report["reasons"].values()) == 160
    right = responses.filter(pl.col("response_id").is_in(selected))["verdict"] == "correct"
    assert report["precision"] == pytest.approx(right.mean())
    examples = pl.read_parquet(smoke.artifact("rft_data") / "examples.parquet")
    assert set(examples.filter(pl.col("response_id") != "")["response_id"]) == set(selected)


def test_pairs_and_card_follow_from_the_scores(smoke: Finished, summary: dict[str, Any]) -> None:
    pool = pl.read_parquet(smoke.artifact("scores_dpo") / "scored.parquet").filter(
        pl.col("score").is_not_null(), ~pl.col("truncated")
    )
    widest = pool.group_by("problem_id").agg(best=pl.col("score").max(), worst=pl.col("score").min())
    paired = widest.filter(  # threshold 4, margin 0.5, one pair per question
        pl.col("best") >= 4, pl.col("worst") < 4, pl.col("best") - pl.col("worst") >= 0.5
    )
    assert summary["pairs"]["pairs"] == paired.height
    margins = paired["best"] - paired["worst"]
    assert summary["pairs"]["mean_margin"] == pytest.approx(margins.mean())

    rows = pl.read_parquet(smoke.artifact("gate") / "rows.parquet")
    right = rows["verdict"] == "correct"
    says_right = rows["score"] >= 6
    recalls = [
        (says_right.filter(right) == True).fill_null(False).mean(),  # noqa: E712
        (says_right.filter(~right) == False).fill_null(False).mean(),  # noqa: E712
    ]
    assert summary["critic"]["balanced_accuracy"] == pytest.approx(sum(recalls) / 2)  # type: ignore[arg-type]
    failed = rows["score"].null_count() / rows.height
    assert summary["critic"]["parse_failure_rate"] == pytest.approx(failed)


def test_a_second_run_reuses_everything_and_says_so(
    smoke: Finished, summary: dict[str, Any], tmp_path: Path
) -> None:
    again = completed(tmp_path, *SMOKE, f"store={smoke.store}")
    assert f"{STAGES} of {STAGES} stages reused (everything)" in " ".join(again.stdout.split())
    assert all(again.summary["cached"].values())
    assert timeless(again.summary) == timeless(summary)
    for name in ("lineage.json", "metrics.jsonl"):
        assert (again.out / name).read_text() == (smoke.out / name).read_text()
    assert "running" not in again.stderr


# ---- sweeps --------------------------------------------------------------------------------------------


def test_the_points_of_a_sweep_share_their_stages(tmp_path: Path) -> None:
    completed(tmp_path, "-m", *TINY, "seed=0,1", "until=critic_pool")
    lines = [read_json(path) for path in sorted(tmp_path.glob("outputs/*/*/[01]/lineage.json"))]
    assert len(lines) == 2
    for shared in ("problems", "solutions"):
        assert lines[0][shared] == lines[1][shared]
    for own in ("base", "critic_pool"):
        assert lines[0][own]["key"] != lines[1][own]["key"]
    assert len(list((tmp_path / "store" / "problems").iterdir())) == 1


def test_a_failing_point_is_reported_and_the_others_finish(smoke: Finished, tmp_path: Path) -> None:
    swept = run(tmp_path, "-m", *SMOKE, "pairs.build.margin=9.5,0.5", "until=pairs", f"store={smoke.store}")
    assert "No pair could be built" in swept.message
    (point,) = tmp_path.glob("outputs/*/*/*/summary.json")
    assert point.parent.name == "1" and all(read_json(point)["cached"].values())


def test_the_controls_of_the_ablations(tmp_path: Path) -> None:
    """A critic from a tiny model of its own, half of its scores permuted; pairs and DPO from the base; SFT on
    the solutions of the pool."""
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text(
        "# @package _global_\ndefaults: [smoke, _self_]\nname: mine\n"
        "critic: {noise: 0.5, tiny: {hidden_size: 64, intermediate_size: 32, layers: 1}}\n"
        "pairs: {policy: base}\ndpo: {start: base}\n"
    )
    words = ["experiment=mine" if w == "experiment=smoke" else w for w in TINY]
    finished = completed(tmp_path, "--config-dir", str(tmp_path), *words, "arms=[pool_sft]")

    def made_from(name: str) -> dict[str, str]:
        inputs = read_json(finished.artifact(name) / "manifest.json")["inputs"]
        return {role: source["key"] for role, source in inputs.items()}

    keys = {name: entry["key"] for name, entry in read_json(finished.out / "lineage.json").items()}
    assert made_from("pool_dpo")["model"] == made_from("dpo")["model"] == keys["base"]
    assert made_from("critic")["model"] == keys["critic_start"]
    assert read_json(finished.artifact("critic") / "config.json")["hidden_size"] == 64
    for user, scores in (("select", "scores_rft"), ("pairs", "scores_dpo"), ("gate", "gate_scores")):
        assert made_from(user)["scored"] == keys[f"{scores}_noisy"]
        before, after = (
            pl.read_parquet(finished.artifact(name) / "scored.parquet").sort("response_id")
            for name in (scores, f"{scores}_noisy")
        )
        assert sorted(before["score"]) == sorted(after["score"])
        assert before.drop("score", "parse").equals(after.drop("score", "parse"))
    taught = pl.read_parquet(finished.artifact("pool_sft_data") / "examples.parquet")["problem_id"]
    problems = pl.read_parquet(finished.artifact("problems") / "problems.parquet")
    assert set(taught) <= set(problems.filter(split="pool_rft")["problem_id"])
    assert list(finished.summary["models"]) == ["base", "pool_sft", "rft", "dpo"]
