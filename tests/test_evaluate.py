"""Metrics against hand-counted tables and exhaustive enumeration."""

import itertools
import json
import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from selfcritique import evaluate, stats
from selfcritique.errors import UserError

SCHEMA = {
    "problem_id": pl.String, "source": pl.String, "family": pl.String, "register": pl.String,
    "difficulty": pl.Int64, "kind": pl.String, "sample": pl.Int64, "answer": pl.String,
    "canonical": pl.String, "verdict": pl.String, "n_tokens": pl.Int64, "truncated": pl.Boolean,
    "score": pl.Float64,
}  # fmt: skip


def row(problem: str, verdict: str = "correct", **changes: Any) -> dict[str, Any]:
    base = {
        "problem_id": problem, "source": "s", "family": "f", "register": "plain", "difficulty": 2,
        "kind": "greedy", "sample": 0, "answer": "1", "canonical": "1", "verdict": verdict, "n_tokens": 5,
        "truncated": False, "score": None,
    }  # fmt: skip
    return base | changes


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


def samples(
    problem: str, answers: str, right: str, scores: list[float | None] | None = None
) -> list[dict[str, Any]]:
    """One sample per letter of `answers` ("-" is no answer); those equal to `right` are correct."""
    return [
        row(
            problem,
            "correct" if letter == right else "incorrect",
            kind="sample",
            sample=i,
            answer=None if letter == "-" else letter,
            canonical=None if letter == "-" else letter,
            score=None if scores is None else scores[i],
        )
        for i, letter in enumerate(answers)
    ]


def greedy(outcomes: list[int], **changes: Any) -> pl.DataFrame:
    return table([
        row(f"p{i:05d}", "correct" if right else "incorrect", **changes) for i, right in enumerate(outcomes)
    ])  # fmt: skip


def test_accuracy_counts_what_could_not_be_decided_as_not_correct() -> None:
    """2 right of 5; one unsupported, one timed out, one without an answer and cut off: 0.4."""
    rows = table([
        row("a"),
        row("b"),
        row("c", "unsupported"),
        row("d", "timeout"),
        row("e", "incorrect", answer=None, truncated=True),
        row("e", "correct", kind="sample"),
    ])  # fmt: skip
    found = evaluate.accuracy(rows)
    expected = stats.wilson(2, 5)
    assert (found["value"], found["low"], found["high"], found["n"]) == (0.4, expected.low, expected.high, 5)
    assert [found[k] for k in ("unsupported", "timeout", "no_answer", "truncated")] == [1, 1, 1, 1]
    with pytest.raises(UserError, match="more than one greedy"):
        evaluate.accuracy(pl.concat([rows, rows]))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 4), (4, 4, 4)])
def test_pass_at_k_enumerates_subsets(n: int, c: int, k: int) -> None:
    """Share of the k-subsets of n samples, c of them right, that hold a right one."""
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_of_many_samples_stays_finite() -> None:
    """One right of 10,000: a draw of k holds it with chance k / n."""
    assert evaluate.pass_at_k(10_000, 1, 2_500) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="not defined"):
        evaluate.pass_at_k(3, 1, 4)


def test_pass_at_k_over_a_table() -> None:
    """2 of 4 right: pass@2 = 1 − 1/6; 0 of 4: 0. Mean 5/12."""
    rows = table(samples("a", "xyxz", "x") + samples("b", "yyyy", "x"))
    assert evaluate.measure(rows, "pass@2")["value"] == pytest.approx(5 / 12)
    assert evaluate.measure(rows, "pass@2")["n"] == 2


@pytest.mark.parametrize(
    ("answers", "right", "k", "won"),
    [
        ("yxx", "x", 3, 1),  # majority
        ("yxxy", "x", 4, 0),  # tie: y came first
        ("yxxy", "y", 4, 1),
        ("--x", "x", 3, 1),  # no answer is no vote
        ("---", "x", 3, 0),
        ("yxx", "x", 2, 0),  # only the first two vote
    ],
)
def test_majority(answers: str, right: str, k: int, won: int) -> None:
    rows = table(samples("a", answers, right)[::-1])  # the order of rows does not matter
    assert evaluate.measure(rows, f"maj@{k}")["value"] == won


@pytest.mark.parametrize(
    ("scores", "won"),
    [
        ([3.0, 9.0, 5.0], 1),  # y x y, x right
        ([9.0, 9.0, 5.0], 0),  # equal scores: the earlier
        ([None, 2.0, None], 1),  # an unparsed critique is not a score
        ([None, None, None], 0),  # nothing to go by: the first
    ],
)
def test_best_of_k(scores: list[float | None], won: int) -> None:
    rows = table(samples("a", "yxy", "x", scores)[::-1])
    assert evaluate.measure(rows, "best@3")["value"] == won


def test_metrics_refuse_what_they_cannot_measure() -> None:
    rows = table(samples("a", "xx", "x") + samples("b", "x", "x") + [row("c")])
    with pytest.raises(UserError, match="1 of 2 problems have fewer than 2 samples"):
        evaluate.measure(rows, "pass@2")
    with pytest.raises(UserError, match="no answer"):
        evaluate.measure(rows.filter(pl.col("problem_id") == "a"), "accuracy")
    for metric in ("acuracy", "pass", "maj@0", "accuracy@2"):
        with pytest.raises(UserError, match="unknown metric"):
            evaluate.measure(rows, metric)


def test_critic_score_summary_never_averages_a_failed_parse() -> None:
    """Problem a: 8 and 4, problem b: 10 and unparsed: means 6 and 10, so 8; two of three scores ≥ 8."""
    rows = table(samples("a", "xx", "x", [8.0, 4.0]) + samples("b", "xx", "x", [10.0, None]))
    found = evaluate.critic_score_summary(rows, threshold=8.0)
    assert (found["value"], found["n"], found["unscored"]) == (8.0, 2, 1)
    assert found["share_above"] == pytest.approx(2 / 3)
    nothing = evaluate.critic_score_summary(table([row("a")]), threshold=8.0)
    assert nothing["value"] is None and nothing["unscored"] == 1


def test_by_group() -> None:
    rows = table([row("a"), row("b", "incorrect"), row("c", register="chatty")])
    found = evaluate.by_group(rows, "register")
    assert list(found) == ["chatty", "plain"]
    assert (found["chatty"]["value"], found["plain"]["value"], found["plain"]["n"]) == (1.0, 0.5, 2)
    assert list(evaluate.by_group(rows, "difficulty")) == ["2"]


def test_comparison_pairs_problems_not_rows() -> None:
    """Base right on 40 of 100, the other model on those and 20 more: +0.2, half as much again, McNemar
    2 / 2^20; with the rows shuffled it is the same comparison."""
    base, better = greedy([1] * 40 + [0] * 60), greedy([1] * 60 + [0] * 40)
    found = evaluate.compare_models(better.sample(fraction=1, shuffle=True, seed=1), base, "accuracy", 0)
    assert found["delta"] == pytest.approx(0.2)
    assert found["relative"] == pytest.approx(0.5)
    assert found["p_mcnemar"] == pytest.approx(2 / 2**20)
    assert found["p"] == pytest.approx(2 / 10_001)
    assert 0.1 < found["low"] < 0.15 and 0.25 < found["high"] < 0.3
    assert found["error"] == pytest.approx(math.sqrt(0.2 / 100))
    assert found == evaluate.compare_models(better, base, "accuracy", 0)
    with pytest.raises(UserError, match="100 and 99, 99 shared"):
        evaluate.compare_models(better, base.head(99), "accuracy", 0)


def test_bootstrap_keeps_the_mix_of_sources() -> None:
    """The gain is 1 on every problem of one source and 0 on the other: with the mix fixed, no uncertainty."""
    source = pl.Series("source", ["easy"] * 50 + ["hard"] * 50)
    a, b = greedy([1] * 50 + [0] * 50).with_columns(source), greedy([0] * 100).with_columns(source)
    found = evaluate.compare_models(a, b, "accuracy", 0)
    assert (found["delta"], found["low"], found["high"]) == (0.5, 0.5, 0.5)


def test_comparison_table() -> None:
    """Of three pairs, rft − base (+20 points) and dpo − base (+22) are real, dpo − rft (5 gained, 3 lost)
    is not; Holm multiplies the two smallest p, which are equal, by 3."""
    base, rft = [1] * 40 + [0] * 60, [1] * 60 + [0] * 40
    dpo = [0] * 3 + [1] * 62 + [0] * 35
    models = {"base": greedy(base), "rft": greedy(rft), "dpo": greedy(dpo)}
    found = {(r["a"], r["b"]): r for r in evaluate.comparison_table(models, seed=0, against=("base", "rft"))}
    assert list(found) == [("rft", "base"), ("dpo", "base"), ("dpo", "rft")]
    real = found["rft", "base"]
    assert real["p_adjusted"] == pytest.approx(3 * real["p"])
    assert real["sentence"].startswith("rft − base, accuracy: +20.0 points")
    assert real["sentence"].endswith("rft is better.")
    flat = found["dpo", "rft"]
    assert flat["delta"] == pytest.approx(0.02)
    assert flat["p_adjusted"] == flat["p"] > 0.3
    # z(1 − 0.05 / 6) + z(0.8) = 2.39398 + 0.84162 times √(0.08 / 100)
    assert flat["mde"] == pytest.approx(3.23560 * math.sqrt(0.0008), rel=1e-5)
    assert "indistinguishable (minimum detectable effect 9.2 points)" in flat["sentence"]
    assert len(evaluate.comparison_table(models, seed=0, against=("base",))) == 2


def test_comparison_of_a_worse_model_says_so() -> None:
    models = {"base": greedy([1] * 60 + [0] * 40), "dpo": greedy([1] * 30 + [0] * 70)}
    (found,) = evaluate.comparison_table(models, seed=0, against=("base",))
    assert found["delta"] == pytest.approx(-0.3) and found["sentence"].endswith("dpo is worse.")


def test_seeds_are_crossed_only_where_problems_are_shared() -> None:
    """Deltas of 0.1, 0.2, 0.3 by seed. On different problems the interval is 0.2 ± 4.302653 × 0.1 / √3."""
    base = greedy([0] * 100)
    better = [greedy([1] * right + [0] * (100 - right)) for right in (10, 20, 30)]
    crossed = evaluate.compare_seeds(better, [base] * 3, "accuracy", "rft", "base")
    expected = stats.seeds_interval(np.array([[1] * r + [0] * (100 - r) for r in (10, 20, 30)]))
    assert (crossed["delta"], crossed["low"], crossed["p"]) == (expected.delta, expected.low, expected.p)
    assert crossed["deltas"] == pytest.approx([0.1, 0.2, 0.3])

    def moved(rows: pl.DataFrame, seed: int) -> pl.DataFrame:
        return rows.with_columns(problem_id=pl.format("{}-{}", pl.lit(seed), "problem_id"))

    apart = evaluate.compare_seeds(
        [moved(rows, i) for i, rows in enumerate(better)], [moved(base, i) for i in range(3)], "accuracy"
    )
    assert apart["high"] - 0.2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    (adjusted,) = evaluate.adjust([crossed])
    assert adjusted["p_adjusted"] == crossed["p"] and adjusted["mde"] > 0
    # seed means alone: t quantiles at 0.975 and 0.8 for 2 degrees of freedom
    assert evaluate.adjust([apart])[0]["mde"] == pytest.approx((4.302653 + 1.060660) * 0.1 / math.sqrt(3))


CARD = pl.DataFrame(
    {
        #        TP   TP   FN    FP    TN         unparsed: right, wrong          undecided
        "score": [9.5, 6.0, 5.9, 8.0, 2.0, 3.0, None, None, 7.0, 10.0],
        "parse": ["ok"] * 6 + ["failed", "truncated", "ok", "ok"],
        "verdict": ["correct"] * 3 + ["incorrect"] * 3 + ["correct", "incorrect", "unsupported", "correct"],
        "annotator_score": [10.0, 7.0, 9.0, 4.0, 2.0, 1.0, 9.0, 3.0, None, 9.0],
        "first_error": [0, 2, 0, 1, 3, 1, 0, 2, None, 0],
        "predicted_first_error": [0, 2, 1, 0, 3, 1, None, None, 1, 0],
        "register": ["plain"] * 5 + ["chatty"] * 5,
        "n_tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    }
)


def test_critic_card_decisions() -> None:
    """Right: 5 rows, 3 called right (9.5, 6.0, 10), one not (5.9), one unparsed: sensitivity 3/5, parsed 3/4.
    Wrong: 4 rows, 2 called wrong, one right (8.0), one unparsed: specificity 2/4, parsed 2/3.
    F1 = 2·3 / (2·3 + 2 false positives + 2 false negatives), the unparsed on the wrong side."""
    card = evaluate.critic_card(CARD)
    assert card["balanced_accuracy"] == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert card["balanced_accuracy_parsed"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert card["f1"] == pytest.approx(0.6)
    assert card["parse_failure_rate"] == pytest.approx(0.2)
    assert (card["n"], card["n_correct"], card["undecided"]) == (9, 5, 1)
    assert list(card["confusion"].values()) == [3, 1, 2, 1, 1, 1]
    assert card["parses"] == {"failed": 1, "ok": 8, "truncated": 1}
    assert card["balanced_accuracy_low"] < card["balanced_accuracy"] < card["balanced_accuracy_high"]
    # pairs right × wrong of {9.5, 6, 5.9, 10} × {8, 2, 3}: 10 of 12 in order
    assert card["auroc"] == pytest.approx(10 / 12)
    json.dumps(card, allow_nan=False)


def test_critic_card_details() -> None:
    """Right answers: clean 9.5 (10), 5.9 (9), 10 (9), flawed 6.0 (7): pairs in order 2 of 3; at score ≥ 9
    clean 2 of 3, flawed 1 of 1. First errors: named in rows 0 1 4 5 9, 5 of 9; rows 1 3 4 5 7 have a wrong
    step, 3 named."""
    card = evaluate.critic_card(CARD)
    flawed = card["flawed_vs_clean"]
    assert (flawed["n_clean"], flawed["n_flawed"]) == (3, 1)
    assert flawed["auroc"] == pytest.approx(2 / 3)
    assert flawed["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert card["first_error_accuracy"] == pytest.approx(5 / 9)
    assert card["first_error_accuracy_flawed"] == pytest.approx(3 / 5)
    assert card["histogram"]["correct"] == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert card["histogram"]["incorrect"] == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    kept = CARD.filter(pl.col("score").is_not_null() & pl.col("annotator_score").is_not_null())
    assert card["spearman_annotator"] == pytest.approx(stats.spearman(kept["annotator_score"], kept["score"]))
    assert set(card["by"]) == {"register", "n_tokens"}
    assert card["by"]["register"]["plain"]["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert list(card["by"]["n_tokens"]) == ["1-3", "4-5", "6-7", "8-10"]
    assert sum(part["n"] for part in card["by"]["n_tokens"].values()) == 9


def test_critic_card_calibration() -> None:
    """Score 10 reads as probability 1, 1 as 0: two right, one wrong at 10, one wrong at 1.
    |2/3 − 1| · 3/4 + 0 = 0.25."""
    rows = pl.DataFrame({
        "score": [10.0, 10.0, 10.0, 1.0],
        "verdict": ["correct", "correct", "incorrect", "incorrect"],
    })  # fmt: skip
    assert evaluate.critic_card(rows)["ece"] == pytest.approx(0.25)


def test_critic_card_of_nothing_but_failures() -> None:
    rows = pl.DataFrame(
        {"score": [None, None], "verdict": ["correct", "incorrect"]}, schema_overrides={"score": pl.Float64}
    )
    card = evaluate.critic_card(rows)
    assert (card["balanced_accuracy"], card["parse_failure_rate"]) == (0.0, 1.0)
    assert card["auroc"] is None and card["balanced_accuracy_parsed"] is None and card["ece"] is None
    json.dumps(card, allow_nan=False)
    empty = evaluate.critic_card(rows.head(0))
    assert empty["balanced_accuracy"] is None and empty["n"] == 0


def test_threshold_curve() -> None:
    """Five responses to three questions. At 7: a right, a right with the same equations, b wrong are kept."""
    pool = pl.DataFrame({
        "problem_id": ["a", "a", "b", "b", "c"],
        "score": [9.0, 8.0, 7.0, 3.0, None],
        "verdict": ["correct", "correct", "incorrect", "correct", "correct"],
        "equations_hash": ["e1", "e1", "e2", "e3", "e4"],
    })  # fmt: skip
    seven, ten = evaluate.threshold_curve(pool, [7.0, 10.0])
    assert seven["precision"] == pytest.approx(2 / 3)
    assert seven["recall"] == pytest.approx(2 / 4)
    assert seven["yield"] == pytest.approx(3 / 5)
    assert seven["diversity"] == pytest.approx(2 / 3)
    assert seven["coverage"] == pytest.approx(2 / 3)
    assert ten["precision"] is None and ten["yield"] == 0.0


def test_score_agreement() -> None:
    """Decisions right right wrong wrong against right wrong wrong wrong: agree 3/4, chance 1/8 + 3/8."""
    found = evaluate.score_agreement(
        pl.Series([9.0, 8.0, 2.0, 1.0, None]), pl.Series([9.0, 5.0, 2.0, 1.0, 4.0])
    )
    assert (found["n"], found["unscored"]) == (4, 1)
    assert found["kappa"] == pytest.approx((3 / 4 - 1 / 2) / (1 / 2))
    # squared distances: 9 / 4 observed; variances 12.5 and 9.6875, means 5 and 4.25 apart by 0.75
    assert found["kappa_quadratic"] == pytest.approx(1 - 2.25 / (12.5 + 9.6875 + 0.75**2))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mean_absolute_difference"] == pytest.approx(0.75)
