"""Statistics of evaluation: intervals, paired tests, agreement. Pure functions on arrays, numpy only.

A quantity that its data do not define (AUROC with one class, rank correlation of a constant) is NaN here;
`evaluate` turns it into None at the edge, so that it never enters a mean or a JSON file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_NORMAL = NormalDist()
_LEVEL = 0.95  # of every interval
_Z = _NORMAL.inv_cdf(0.5 + _LEVEL / 2)
_POWER = 0.8  # of every minimum detectable effect
_MAX_CELLS = 128  # up to so many distinct differences are resampled by their counts
_CHUNK = 2_000_000  # indices drawn at once otherwise: 16 MB


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` observations with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """A difference (first minus second) with its interval and two-sided p-value against no difference.

    error: its standard error; the share `seed_share` of its square has `df` degrees of freedom only.
    """

    delta: float
    low: float
    high: float
    p: float
    error: float
    seed_share: float = 0.0
    df: int = 1


@dataclass(frozen=True)
class Bin:
    """One cell of a reliability curve: `n` predictions between `low` and `high`."""

    low: float
    high: float
    n: int
    confidence: float  # mean predicted probability
    accuracy: float  # share of positives


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); NaN and [0, 1] where n is 0."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    z, share = _Z, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at 0 and n the bound is exactly 0 or 1, but not in floating point
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of a sample: Wilson where every value is 0 or 1, else mean ± z standard errors."""
    x = np.asarray(values, dtype=np.float64)
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(int(x.sum()), x.size)
    mean = float(x.mean())
    half = _Z * float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.inf
    return Interval(mean, mean - half, mean + half, x.size)


def _resampled_sums(d: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """(resamples,) sums of bootstrap samples of `d`, each of its own size, in bounded memory."""
    values, counts = np.unique(d, return_counts=True)
    if values.size <= _MAX_CELLS:
        # how often each value is drawn is multinomial: the same distribution without drawing n indices
        drawn = rng.multinomial(d.size, counts / d.size, size=resamples)
        return np.asarray(drawn @ values, dtype=np.float64)
    sums = np.empty(resamples)
    step = max(1, _CHUNK // d.size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        sums[start : start + rows] = d[rng.integers(0, d.size, size=(rows, d.size))].sum(axis=1)
    return sums


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, seed: int, resamples: int = 10_000, strata: ArrayLike | None = None
) -> Comparison:
    """Mean of a − b over paired examples, percentile interval and p-value from `resamples` bootstrap samples.

    a, b: (n,) scores of the same examples in the same order. strata: (n,) labels; each stratum is resampled
    within itself, for test sets whose mix is fixed. p = twice the smaller tail, at least 2 / (resamples + 1).
    error: the standard error under no difference (for 0/1 outcomes, what McNemar's test assumes).
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    groups = np.zeros(d.size, dtype=np.int64) if strata is None else np.asarray(strata)
    means = np.zeros(resamples)
    for group in np.unique(groups):
        means += _resampled_sums(d[groups == group], resamples, rng) / d.size
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    tol = 1e-12  # sums of fractions that are 0 on paper
    smaller = min(int((means <= tol).sum()), int((means >= -tol).sum()))
    p = min(1.0, 2 * (smaller + 1) / (resamples + 1))
    return Comparison(float(d.mean()), float(low), float(high), p, math.sqrt(float((d**2).mean()) / d.size))


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided McNemar p-value of paired 0/1 outcomes: a discordant pair falls like a coin."""
    x, y = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    only_a, only_b = int((x & ~y).sum()), int((y & ~x).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    # C(n, i) / 2^n through logarithms, since C(n, i) leaves the floats at n = 1030
    terms = (
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
        for i in range(k + 1)
    )
    return min(1.0, 2 * math.fsum(terms))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm (1979) step-down adjusted p-values, in the order given."""
    m, running = len(pvalues), 0.0
    adjusted = [0.0] * m
    for rank, i in enumerate(sorted(range(m), key=lambda j: pvalues[j])):
        running = max(running, min(1.0, (m - rank) * pvalues[i]))
        adjusted[i] = running
    return adjusted


def _t_upper_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t for integer df and t ≥ 0: the finite series of Abramowitz & Stegun 26.7.3–4."""
    angle = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cos if odd else 1.0
    total = 0.0
    for i in range(1, df // 2 + 1):
        total += term
        term *= cos * cos * (2 * i - 1 + odd) / (2 * i + odd)
    inside = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return (1 - inside) / 2


@lru_cache
def _t_quantile(tail: float, df: int) -> float:
    """The t with P(T > t) = tail, for tail below one half."""
    low, high = 0.0, 1e7
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if _t_upper_tail(t, df) > tail else (low, t)
    return low


def _critical_value(tail: float, seed_share: float, df: int) -> float:
    """Cochran & Cox (1950): t and normal quantiles at `tail`, weighted by the variance each stands for."""
    return seed_share * _t_quantile(tail, df) - (1 - seed_share) * _NORMAL.inv_cdf(tail)


def minimum_detectable_effect(
    error: float, seed_share: float = 0.0, df: int = 1, alpha: float = 0.05
) -> float:
    """Smallest true difference that a two-sided test at level `alpha` finds with probability 80 %.

    error, seed_share, df: as in `Comparison`. The distances of the critical value from 0 and of the power's
    quantile from the effect, both in standard errors, add up; with three seeds the power is 71 to 80 %,
    because the standard error is itself uncertain.
    """
    critical = _critical_value(alpha / 2, seed_share, df)
    return (critical + _critical_value(1 - _POWER, seed_share, df)) * error


def _p_value(ratio: float, seed_share: float, df: int) -> float:
    """The two-sided level at which `_critical_value` equals `ratio`; not below 2e-12."""
    low, high = -30.0, 30.0  # logarithm of the t quantile
    for _ in range(60):
        middle = (low + high) / 2
        t = math.exp(middle)
        tail = max(_t_upper_tail(t, df), 1e-12)
        critical = seed_share * t - (1 - seed_share) * _NORMAL.inv_cdf(tail)
        low, high = (middle, high) if critical < ratio else (low, middle)
    return 2 * max(_t_upper_tail(math.exp(low), df), 1e-12)


def seeds_interval(differences: ArrayLike) -> Comparison:
    """Mean difference over few training seeds, for the population of seeds *and* of test examples.

    differences: (seeds, n) paired differences of the same n examples under every seed, or (seeds,) one mean
    per seed where the examples differ. Seeds and examples are crossed random effects (analysis of variance):

        Var(mean) = [σ²_seed / k + σ²_residual / (k n)] + σ²_example / n

    The bracket is the variance of the seed means over k, known to k − 1 degrees of freedom only; the last
    term is common to all seeds (one test set) and known well. The critical value is Cochran and Cox's mixture
    of t(k − 1) and normal: t alone would ignore the test set's share, the normal would ignore that there are
    few seeds. Coverage of the 95 % interval at three seeds lies between 95 and 97.1 % (docs/statistics.md).
    With one seed the interval speaks of that training run alone.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[:, None] if d.ndim == 1 else d
    k, n = d.shape
    if k * n < 2:
        raise ValueError("one difference has no interval: give several seeds or per-example differences")
    delta, seed_means, example_means = float(d.mean()), d.mean(axis=1), d.mean(axis=0)
    seed_variance = float(seed_means.var(ddof=1)) / k if k > 1 else 0.0
    example_variance = float(example_means.var(ddof=1)) / n if n > 1 else 0.0
    if k > 1 and n > 1:
        residual = d - seed_means[:, None] - example_means[None, :] + delta
        residual_variance = float((residual**2).sum()) / ((k - 1) * (n - 1))
        example_variance = max(0.0, example_variance - residual_variance / (k * n))
    variance = seed_variance + example_variance
    if variance == 0.0:
        return Comparison(delta, delta, delta, 1.0 if delta == 0.0 else 0.0, 0.0)
    share, df, error = seed_variance / variance, max(1, k - 1), math.sqrt(variance)
    half = _critical_value((1 - _LEVEL) / 2, share, df) * error
    p = _p_value(abs(delta) / error, share, df)
    return Comparison(delta, delta - half, delta + half, p, error, share, df)


def confusion(labels: ArrayLike, predictions: ArrayLike) -> tuple[int, int, int, int]:
    """(true positives, false positives, true negatives, false negatives)."""
    y, hat = np.asarray(labels, dtype=bool), np.asarray(predictions, dtype=bool)
    return int((y & hat).sum()), int((~y & hat).sum()), int((~y & ~hat).sum()), int((y & ~hat).sum())


def balanced_accuracy(labels: ArrayLike, predictions: ArrayLike) -> Interval:
    """Mean of sensitivity and specificity; both must be defined.

    Interval: the two Wilson intervals combined by Newcombe's (1998) square-and-add rule for a mean.
    """
    tp, fp, tn, fn = confusion(labels, predictions)
    sensitivity, specificity = wilson(tp, tp + fn), wilson(tn, tn + fp)
    value = (sensitivity.value + specificity.value) / 2
    below = math.hypot(sensitivity.value - sensitivity.low, specificity.value - specificity.low) / 2
    above = math.hypot(sensitivity.high - sensitivity.value, specificity.high - specificity.value) / 2
    return Interval(value, value - below, value + above, tp + fp + tn + fn)


def f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Harmonic mean of precision and recall of the positive class; NaN without positives of any kind."""
    tp, fp, _, fn = confusion(labels, predictions)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: Floats = (last - (counts - 1) / 2)[inverse]
    return shared


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """P(score of a positive > score of a negative) + half of P(equal): Mann–Whitney on shared ranks."""
    y = np.asarray(labels, dtype=bool)
    positives, negatives = int(y.sum()), int((~y).sum())
    if positives == 0 or negatives == 0:
        return math.nan
    rank_sum = float(ranks(scores)[y].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def reliability(labels: ArrayLike, probabilities: ArrayLike) -> list[Bin]:
    """Reliability curve over ten equal bins of predicted probability; empty bins are left out."""
    bins = 10
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    found = []
    for i in range(bins):
        here = index == i
        if here.any():
            mean_p, mean_y = float(p[here].mean()), float(y[here].mean())
            found.append(Bin(i / bins, (i + 1) / bins, int(here.sum()), mean_p, mean_y))
    return found


def ece(curve: Sequence[Bin]) -> float:
    """Expected calibration error of a reliability curve: mean |accuracy − confidence|, weighted by n."""
    total = sum(b.n for b in curve)
    return sum(b.n * abs(b.accuracy - b.confidence) for b in curve) / total if total else math.nan


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation with shared ranks; NaN where either side is constant."""
    a, b = ranks(x), ranks(y)
    if a.size < 2 or a.std() == 0.0 or b.std() == 0.0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def cohen_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Agreement of two raters on nominal labels beyond chance; NaN where chance alone agrees fully."""
    labels, codes = np.unique(np.concatenate([np.asarray(a), np.asarray(b)]), return_inverse=True)
    x, y = np.split(codes, 2)
    if x.size == 0:
        return math.nan
    share_a = np.bincount(x, minlength=labels.size) / x.size
    share_b = np.bincount(y, minlength=labels.size) / y.size
    expected = float(share_a @ share_b)
    return float(((x == y).mean() - expected) / (1 - expected)) if expected < 1 else math.nan


def quadratic_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's (1968) kappa of two raters' scores with squared distances as weights; NaN if both are constant.

    1 − observed / expected squared distance; the expected one is over all pairs of one rating by each rater.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.size == 0:
        return math.nan
    expected = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 1 - float(((x - y) ** 2).mean()) / expected if expected else math.nan
