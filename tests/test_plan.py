"""What a changed setting, a moved file or a rebuilt artifact makes run again (`plan=true`)."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from runs import SMOKE, Finished, Patch, completed, compose, tree
from selfcritique.artifacts import Store
from selfcritique.pipeline import build, plan
from selfcritique.select import select_responses

EVALUATION = ("test_{}", "test_{}_sampled", "test_{}_scores", "eval_{}")


def evaluated(*models: str) -> set[str]:
    return {name.format(model) for model in models for name in EVALUATION}


AFTER_DPO = evaluated("dpo")
AFTER_PAIRS = {"reference", "dpo"} | AFTER_DPO
AFTER_SELECT = (
    {"rft_data", "rft", "sft_data", "sft", "regate_responses", "regate_scores", "regate"}
    | {"pool_dpo", "scores_dpo", "pairs"}
    | evaluated("sft", "rft")
    | AFTER_PAIRS
)
AFTER_POOL = {"scores_rft", "select"} | AFTER_SELECT
NOISY = {f"{scores}_noisy" for scores in ("gate_scores", "scores_rft", "regate_scores", "scores_dpo")}


def misses(store: Path, *words: str) -> set[str]:
    return {row.name for row in plan(build(compose(*SMOKE, *words)), Store(store)) if not row.hit}


def keys(*words: str) -> dict[str, str]:
    return {name: node.key for name, node in build(compose(*words)).nodes.items()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dpo.loss.lam=0.5", {"dpo"} | AFTER_DPO),
        ("dpo.loss.beta=2", {"dpo"} | AFTER_DPO),
        ("dpo.train.lr=1e-3", {"dpo"} | AFTER_DPO),
        ("pairs.build.margin=1", {"pairs"} | AFTER_PAIRS),
        # the evaluation reports the share of scores above the threshold, of the base's answers too
        ("rft.select.threshold=6", {"select", "eval_base"} | AFTER_SELECT),
        ("rft.sampling.temperature=0.9", {"pool_rft"} | AFTER_POOL),
        ("seed=1 seed_from=dpo", {"dpo"} | AFTER_DPO),
        ("arms=[]", set()),
        ("arms=[sft,pool_sft]", {"pool_solutions", "pool_sft_data", "pool_sft"} | evaluated("pool_sft")),
        ("pairs.policy=base", {"pool_dpo", "scores_dpo", "pairs"} | AFTER_PAIRS),
        ("dpo.start=base", AFTER_PAIRS),
        # the critic's own word is reused, and so is what evaluation makes of it
        ("critic.noise=0.5", NOISY | (AFTER_POOL - {"scores_rft"}) | {"gate"}),
        ("until=select", set()),
        ("logger=none", set()),
        ("logger=wandb", set()),
        ("threads=2", set()),
        ("name=other", set()),
        ("trainer.micro_tokens=100 trainer.checkpoint_every_s=1", set()),
        ("trainer.gradient_checkpointing=true trainer.accelerator=auto engine.device=cuda", set()),
        ("critic.gate.min=0.9 critic.gate.on_fail=stop", set()),
        ("critic.ask.max_parse_failures=0.1", set()),
    ],
)
def test_a_setting_reruns_its_stage_and_what_follows(smoke: Finished, words: str, expected: set[str]) -> None:
    if words.startswith("seed=1"):  # only DPO varies with the seed, so the others are those of seed 0
        completed_before = misses(smoke.store, "seed=0", "seed_from=dpo")
        assert completed_before == set()
    assert misses(smoke.store, *words.split()) == expected


@pytest.mark.parametrize(
    ("until", "gates"),
    [("pool_rft", []), ("select", ["gate"]), ("rft", ["gate"]), ("pairs", ["gate", "regate"]),
     ("eval_base", [])],
)  # fmt: skip
def test_no_selection_without_its_gate(until: str, gates: list[str]) -> None:
    """Stopping early skips no gate that a full run would have had to pass before what it selects."""
    graph = build(compose(*SMOKE))
    names = [node.name for node in graph.needed(until)]
    assert [name for name in names if name in graph.gates] == gates
    assert names[-1] == until


def test_another_seed_or_data_seed_shares_what_it_can(smoke: Finished) -> None:
    everything = set(keys(*SMOKE))
    assert misses(smoke.store, "seed=1") == everything - {"problems", "solutions"}
    assert misses(smoke.store, "data.seed=1") == everything


@pytest.mark.parametrize("folder", [False, True])
def test_a_data_file_counts_by_its_content(tmp_path: Path, folder: bool) -> None:
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.with_name("test.jsonl").write_text("{}\n")
        return f"data.mix.0.path={path.parent if folder else path}"

    here, there = write("a/train.jsonl", "{}\n"), write("b/train.jsonl", "{}\n")
    changed = write("c/train.jsonl", "{ }\n")
    assert keys("data=jsonl", here) == keys("data=jsonl", there)
    assert not set(keys("data=jsonl", here).values()) & set(keys("data=jsonl", changed).values())


def test_an_annotation_file_counts_by_its_content(tmp_path: Path) -> None:
    for name, text in (("a.csv", "x"), ("b.csv", "x"), ("c.csv", "y")):
        (tmp_path / name).write_text(text)
    same, moved, changed = (
        keys(*SMOKE, "annotator=file", f"annotator.path={tmp_path / name}")
        for name in ("a.csv", "b.csv", "c.csv")
    )
    assert same == moved
    assert same["critic_pool"] == changed["critic_pool"] and same["critic_data"] != changed["critic_data"]


# ---- rebuilt artifacts ---------------------------------------------------------------------------------


def without(smoke: Finished, name: str, folder: Path) -> Path:
    """A copy of the finished store that lacks one stage's artifact."""
    store = folder / "copy"
    shutil.copytree(smoke.store, store)
    shutil.rmtree(store / smoke.artifact(name).relative_to(smoke.store))
    return store


@pytest.mark.parametrize("name", ["select", "rft"])
def test_rebuilt_with_the_same_content_nothing_after_it_runs(
    smoke: Finished, tmp_path: Path, name: str
) -> None:
    store = without(smoke, name, tmp_path)
    assert name in misses(store)
    rebuilt = completed(tmp_path, *SMOKE, f"store={store}", f"until={name}").summary["cached"]
    assert [stage for stage, cached in rebuilt.items() if not cached] == [name]
    assert misses(store) == set()


def all_but_one(*arguments: Any) -> pl.LazyFrame:
    """Another selection from the same pool."""
    rows = select_responses(*arguments)
    last = rows.select(pl.col("response_id").filter("selected").last()).collect().item()
    return rows.with_columns(selected=pl.col("selected") & (pl.col("response_id") != last))


def test_rebuilt_with_other_content_all_after_it_runs(smoke: Finished, tmp_path: Path) -> None:
    store = without(smoke, "select", tmp_path)
    other = Patch("selfcritique.select.select_responses", all_but_one)
    completed(tmp_path, *SMOKE, f"store={store}", "until=select", hook=other)
    assert misses(store) == AFTER_SELECT


# ---- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ((), "0 of 40 stages would run"),
        # all but the problems and the solutions vary with the seed; the second λ shares all but DPO and its
        # four stages of evaluation
        (("-m", "seed=0,1"), "38 of 78 stages would run (each point by itself: 38)"),
        (("-m", "seed=0,1", "dpo.loss.lam=1,2"), "48 of 88 stages would run (each point by itself: 81)"),
    ],
)
def test_plan_writes_nothing(smoke: Finished, tmp_path: Path, sweep: tuple[str, ...], said: str) -> None:
    before = tree(smoke.folder)
    planned = completed(tmp_path, *sweep, *SMOKE, "plan=true", f"store={smoke.store}")
    assert tree(smoke.folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stderr", "stdout"]
    assert said in " ".join(planned.stdout.split()) and planned.stdout.count("Plan") == 1
    assert bool(sweep) or all(key in planned.stdout for key in keys(*SMOKE).values())


def test_plan_of_an_empty_store_makes_none(tmp_path: Path) -> None:
    planned = completed(tmp_path, *SMOKE, "plan=true")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stderr", "stdout"]
    assert "40 of 40 stages would run" in " ".join(planned.stdout.split())
