"""Statistics against hand calculations, slow definitions and simulated experiments with a known truth."""

import itertools
import math
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from selfcritique import stats


def test_wilson_bounds_solve_the_score_equation() -> None:
    """The bounds p of 8 in 10 satisfy |0.8 − p| = z √(p (1 − p) / 10), which is how Wilson defines them."""
    found = stats.wilson(8, 10)
    for bound in (found.low, found.high):
        assert abs(0.8 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 10), abs=1e-6)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low < 0.8 < found.high
    assert stats.wilson(0, 5).low == 0.0 and stats.wilson(5, 5).high == 1.0
    assert math.isnan(stats.wilson(0, 0).value)


def test_mean_interval_of_fractions() -> None:
    """0.25, 0.5, 0.75: mean 0.5, sd 0.25, so ± 1.959964 × 0.25 / √3 = 0.282896."""
    found = stats.mean_interval([0.25, 0.5, 0.75])
    assert (found.low, found.high) == pytest.approx((0.5 - 0.282896, 0.5 + 0.282896), abs=1e-6)
    assert stats.mean_interval([0, 1, 1]) == stats.wilson(2, 3)


def test_bootstrap_of_binary_outcomes_matches_the_binomial() -> None:
    """900 pairs of which 90 only a, 45 only b: delta 0.05, and the bootstrap distribution of the mean has
    standard deviation √((0.15 − 0.05²) / 900) = 0.012802, so the interval is close to ± 1.96 of it."""
    a = np.r_[np.ones(90), np.zeros(45), np.ones(765)]
    b = np.r_[np.zeros(90), np.ones(45), np.ones(765)]
    found = stats.paired_bootstrap(a, b, seed=0)
    assert found.delta == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05 - 1.96 * 0.012802, abs=0.002)
    assert found.high == pytest.approx(0.05 + 1.96 * 0.012802, abs=0.002)
    assert found.p < 0.002
    assert stats.paired_bootstrap(b, a, seed=0).delta == pytest.approx(-0.05)


def test_bootstrap_p_is_two_sided() -> None:
    """60 against 45 of 900: the resampled sum has mean 15 and sd √(105 − 15² / 900) = 10.235; it is 0 or less
    with chance Φ(−14.5 / 10.235) = 0.0783 (half a step for whole numbers); twice that is p."""
    a = np.r_[np.ones(60), np.zeros(840)]
    b = np.r_[np.zeros(60), np.ones(45), np.zeros(795)]
    assert stats.paired_bootstrap(a, b, seed=0).p == pytest.approx(0.1566, abs=0.015)


def test_bootstrap_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling counts of distinct differences and resampling indices are one distribution."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 400) / 4, rng.integers(0, 5, 400) / 4
    by_counts = stats.paired_bootstrap(a, b, seed=0)
    monkeypatch.setattr(stats, "_MAX_CELLS", 1)
    monkeypatch.setattr(stats, "_CHUNK", 4000)  # many chunks, the last one not full
    by_index = stats.paired_bootstrap(a, b, seed=0, resamples=9_999)
    assert by_index.delta == by_counts.delta
    assert (by_index.low, by_index.high) == pytest.approx((by_counts.low, by_counts.high), abs=0.003)
    assert by_index.p == pytest.approx(by_counts.p, abs=0.03)


def test_bootstrap_within_strata() -> None:
    """Differences constant within each stratum (1 and 0): resampling within strata cannot move the mean,
    while resampling over all of them does."""
    a, b, strata = np.r_[np.ones(50), np.zeros(50)], np.zeros(100), ["x"] * 50 + ["y"] * 50
    fixed = stats.paired_bootstrap(a, b, seed=0, strata=strata)
    free = stats.paired_bootstrap(a, b, seed=0)
    assert (fixed.delta, fixed.low, fixed.high) == (0.5, 0.5, 0.5)
    assert free.high - free.low == pytest.approx(2 * 1.96 * 0.05, abs=0.03)


def test_no_difference_at_all() -> None:
    same = stats.paired_bootstrap([1, 0, 1], [1, 0, 1], seed=0)
    assert same == stats.Comparison(0.0, 0.0, 0.0, 1.0, 0.0)
    assert stats.mcnemar([1, 0, 1], [1, 0, 1]) == 1.0


def test_mcnemar_exact() -> None:
    """8 discordant pairs, 1 against 7: 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256. Ties beyond the floats' C(n, k):
    3,000 pairs, 1,400 against 1,600: z = (200 − 1) / √3000 = 3.633 with the continuity correction, 2.8e-4."""
    a, b = [1] * 7 + [0] + [1] * 5, [0] * 7 + [1] + [1] * 5
    assert stats.mcnemar(a, b) == pytest.approx(18 / 256)
    many = np.r_[np.ones(1600), np.zeros(1400)]
    assert stats.mcnemar(many, 1 - many) == pytest.approx(2.8e-4, rel=0.01)


def test_holm() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5 (never falling)."""
    assert stats.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_minimum_detectable_effect_is_found_with_the_power_it_states() -> None:
    """At the effect named, 80 % of 4,000 simulated z tests reject (± 2.5 %: four standard errors)."""
    effect = stats.minimum_detectable_effect(error=2.0 / math.sqrt(100))
    assert effect == pytest.approx((1.959964 + 0.841621) * 0.2, abs=1e-5)
    means = np.random.default_rng(0).normal(effect, 2.0, size=(4000, 100)).mean(axis=1)
    assert float((np.abs(means) > 1.959964 * 0.2).mean()) == pytest.approx(0.8, abs=0.025)


def test_minimum_detectable_effect_of_three_seeds_in_a_family() -> None:
    """Half of the variance from three seeds, level 0.05 / 4: of 20,000 experiments with the effect named,
    judged as `seeds_interval` judges them, 70 to 80 % find it."""
    rng = np.random.default_rng(0)
    effect = stats.minimum_detectable_effect(1.0, seed_share=0.5, df=2, alpha=0.05 / 4)
    seeds = 0.5 * rng.chisquare(2, 20_000) / 2
    found = effect + rng.standard_normal(20_000)
    critical = [stats._critical_value(0.05 / 8, s / (s + 0.5), 2) * math.sqrt(s + 0.5) for s in seeds]
    assert 0.7 < float((np.abs(found) > critical).mean()) < 0.8


@pytest.mark.parametrize(
    ("k", "t"), [(2, 12.7062), (3, 4.302653), (4, 3.182446), (6, 2.570582), (11, 2.228139)]
)
def test_seed_means_alone_give_students_t(k: int, t: float) -> None:
    """t quantiles at 0.975 for k − 1 degrees of freedom, from printed tables."""
    deltas = np.arange(k, dtype=float)
    found = stats.seeds_interval(deltas)
    error = deltas.std(ddof=1) / math.sqrt(k)
    assert found.high - found.delta == pytest.approx(t * error, rel=1e-5)
    on_the_edge = stats.seeds_interval(deltas - deltas.mean() + t * error)
    assert on_the_edge.p == pytest.approx(0.05, abs=1e-5)


def test_seeds_without_seed_variance_give_the_normal_interval() -> None:
    """Three equal rows differ by nothing but their examples: ± 1.96 standard errors of one row."""
    row = np.random.default_rng(0).normal(size=200)
    found = stats.seeds_interval(np.stack([row] * 3))
    assert found.high - found.delta == pytest.approx(1.959964 * row.std(ddof=1) / math.sqrt(200), rel=1e-5)
    single = stats.seeds_interval(row[None, :])
    assert (single.low, single.high) == pytest.approx((found.low, found.high))
    with pytest.raises(ValueError, match="several seeds"):
        stats.seeds_interval([0.1])


def _experiment(
    rng: np.random.Generator, arms: int, effect: float, seed_sd: float, strength: float, n: int
) -> NDArray[np.float64]:
    """(arms, 3 seeds, n) paired differences to a base of 0/1 outcomes on one test set.

    Each problem has its own difficulty, each arm is better or worse by `strength` than the base on it, and
    every training run (of the base too) has its own luck; the mean effect over problems and runs is `effect`.
    """
    difficulty = rng.uniform(0.42, 0.52, size=n)
    strengths = strength * rng.choice([-1, 1], size=(arms, 1, n))
    luck = rng.normal(0, seed_sd, size=(arms + 1, 3, 1))
    base = rng.random((1, 3, n)) < difficulty + luck[:1]
    models = rng.random((arms, 3, n)) < difficulty + effect + strengths + luck[1:]
    return models.astype(float) - base


SCENARIOS = [(0.0, 0.1, 300), (0.01, 0.1, 1000), (0.03, 0.1, 500), (0.005, 0.4, 1000)]


def simulate(seed_sd: float, strength: float, n: int, experiments: int = 1000) -> dict[str, float]:
    """Percentages over simulated experiments of three seeds, at a level of 5 %.

    coverage of a known effect of 5 points by the interval over seeds and problems; by its two halves alone
    (t over seed means, normal over problems); family: of four arms without effect, one is called different.
    share: of the variance that stems from seeds, mean of the estimates.
    """
    rng = np.random.default_rng(7)
    hits: dict[str, float] = dict.fromkeys(
        ("coverage", "seeds alone", "problems alone", "family", "share"), 0
    )
    for _ in range(experiments):
        differences = _experiment(rng, 1, 0.05, seed_sd, strength, n)[0]
        found, by_seed = stats.seeds_interval(differences), stats.seeds_interval(differences.mean(axis=1))
        by_problem = 1.959964 * differences.mean(axis=0).std() / math.sqrt(n)
        null = _experiment(rng, 4, 0.0, seed_sd, strength, n)
        hits["coverage"] += found.low <= 0.05 <= found.high
        hits["seeds alone"] += by_seed.low <= 0.05 <= by_seed.high
        hits["problems alone"] += abs(found.delta - 0.05) <= float(by_problem)
        hits["family"] += min(stats.holm([stats.seeds_interval(arm).p for arm in null])) < 0.05
        hits["share"] += found.seed_share
    return {name: 100 * count / experiments for name, count in hits.items()}


@pytest.mark.parametrize(("seed_sd", "strength", "n"), SCENARIOS)
def test_intervals_cover_and_families_hold(seed_sd: float, strength: float, n: int) -> None:
    """1,000 experiments: coverage within 93 to 97 %, family-wise false positives at most 6.4 %. They are not
    too easy: an interval that knows no seeds, or no problems, covers too little where those vary most."""
    found = simulate(seed_sd, strength, n)
    assert 93 <= found["coverage"] <= 97
    assert found["family"] <= 6.4
    if seed_sd == 0.03:
        assert found["problems alone"] < 85
    if strength == 0.4:
        assert found["seeds alone"] < 93


def test_coverage_by_share_of_the_seeds() -> None:
    """In normal theory, from no seed variance to nothing else: 400,000 draws at each share, 95 to 97.1 %."""
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        seeds = share * rng.chisquare(2, 400_000) / 2  # the estimate of the seeds' part of the variance 1
        variance = seeds + 1 - share
        t = stats._critical_value(0.025, 1.0, 2)
        half = (seeds / variance * t + (1 - share) / variance * 1.959964) * np.sqrt(variance)
        assert half[0] == pytest.approx(
            stats._critical_value(0.025, seeds[0] / variance[0], 2) * math.sqrt(variance[0])
        )
        coverage = float((np.abs(rng.standard_normal(400_000)) <= half).mean())
        assert 0.9485 < coverage < 0.9725


def test_paired_bootstrap_covers() -> None:
    """1,000 experiments of one run on 300 problems: the interval covers the effect on its population."""
    rng = np.random.default_rng(3)
    covered = 0
    for i in range(1000):
        p = rng.uniform(0.2, 0.7, 300)
        a, b = rng.random(300) < p + 0.1, rng.random(300) < p
        found = stats.paired_bootstrap(a, b, seed=i, resamples=2000)
        covered += found.low <= 0.1 <= found.high
    assert 930 <= covered <= 970


def test_auroc_counts_pairs() -> None:
    """Against the definition: share of (positive, negative) pairs in order, ties one half."""
    rng = np.random.default_rng(0)
    labels, scores = rng.random(60) < 0.4, rng.integers(1, 6, 60)
    pairs = list(itertools.product(scores[labels], scores[~labels]))
    expected = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)
    assert stats.auroc(labels, scores) == pytest.approx(expected)
    assert math.isnan(stats.auroc([1, 1], [0.1, 0.2]))


def test_balanced_accuracy_and_f1() -> None:
    """Positives 3 of 4 found, negatives 1 of 2: (0.75 + 0.5) / 2; F1 = 2·3 / (2·3 + 1 + 1) = 0.75.
    With 4,000 and 2,000 of them the interval is ± 1.96 × ½ √(0.75·0.25/4000 + 0.25/2000) = 0.0128."""
    labels, predictions = [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]
    assert stats.balanced_accuracy(labels, predictions).value == pytest.approx(0.625)
    assert stats.f1(labels, predictions) == pytest.approx(0.75)
    assert math.isnan(stats.balanced_accuracy([1, 1], [1, 0]).value)
    many = stats.balanced_accuracy(labels * 1000, predictions * 1000)
    assert (many.high - many.low) / 2 == pytest.approx(0.0128, abs=2e-4)


def test_calibration() -> None:
    """Two bins: {0.1, 0.1} with one positive, {0.9, 0.9, 1.0} with two.
    |0.5 − 0.1| · 2/5 + |2/3 − 2.8/3| · 3/5 = 0.16 + 0.16."""
    curve = stats.reliability([1, 0, 1, 1, 0], [0.1, 0.1, 0.9, 0.9, 1.0])
    assert [(b.n, b.accuracy) for b in curve] == [(2, 0.5), (3, pytest.approx(2 / 3))]
    assert stats.ece(curve) == pytest.approx(0.32)


def test_spearman_with_ties() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5, so √0.9."""
    assert stats.spearman([1, 2, 2, 9], [10, 20, 30, 40]) == pytest.approx(math.sqrt(0.9))
    assert math.isnan(stats.spearman([1, 1, 1], [1, 2, 3]))


def test_kappa() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agree 0.7, chance 0.5·0.6 + 0.5·0.4 = 0.5, κ = 0.4."""
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert stats.cohen_kappa(a, b) == pytest.approx(0.4)
    assert math.isnan(stats.cohen_kappa(["x"], ["x"]))


def test_quadratic_kappa() -> None:
    """Against the definition with a table of weights (i − j)² and products of the margins, scores 1 to 3:
    1 1, 1 2, 2 2, 3 3, 3 1: observed (1 + 4) / 5 = 1; margins (2, 1, 2) / 5 and (2, 2, 1) / 5, expected
    [1·(2·2 + 1·2 + 1·1 + 2·2) + 4·(2·1 + 2·2)] / 25 = 35 / 25, so 1 − 25 / 35."""
    assert stats.quadratic_kappa([1, 1, 2, 3, 3], [1, 2, 2, 3, 1]) == pytest.approx(2 / 7)
    assert stats.quadratic_kappa([1, 5, 9], [1, 5, 9]) == 1.0
    assert stats.quadratic_kappa([1, 10], [10, 1]) == -1.0
    assert math.isnan(stats.quadratic_kappa([4, 4], [4, 4])) and math.isnan(stats.quadratic_kappa([], []))


if __name__ == "__main__":  # the table of docs/statistics.md: python tests/test_stats.py [EXPERIMENTS]
    for scenario in SCENARIOS:
        print(*scenario, simulate(*scenario, experiments=int([*sys.argv, 1000][1])))
