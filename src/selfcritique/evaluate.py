"""Metrics over per-example tables: accuracy, pass@k, maj@k, best-of-k, paired comparisons, the critic card.

A model's table holds one row per answer to a test problem:

    problem_id, source, family, register, difficulty   the problem
    kind        greedy (one per problem) | sample (several, numbered by `sample` from 0)
    canonical   group for voting, null where no answer was extracted
    verdict     answers.Verdict; unsupported and timeout count as not correct and are reported beside it
    n_tokens, truncated
    score       the critic's, null where it was not asked or not understood

Metrics are named `accuracy`, `pass@k`, `maj@k` and `best@k` (k a number). `problem_values` turns each into
one value per problem between 0 and 1; every interval and test is over those values. Results are plain dicts
for `summary.json`: what is not defined or not bounded is None, never NaN.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from selfcritique import stats
from selfcritique.answers import Verdict
from selfcritique.errors import UserError

POSITIVE = 6.0  # a mean score from here on says "right", whatever the rejection threshold
THRESHOLDS = tuple(range(2, 11))  # of the card's rejection curve
HARD = 7.0  # MathUserEval's hard average is the share of scores from here on
ALPHA = 0.05  # level of a family of comparisons
CLEAN = 9.0  # band 9-10: right throughout; 6-8: right result, flawed steps

Result = dict[str, Any]  # what JSON can hold

_CORRECT = pl.col("verdict") == Verdict.correct.value
_UNDECIDED = pl.col("verdict").is_in([Verdict.unsupported.value, Verdict.timeout.value])


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _interval(found: stats.Interval) -> Result:
    return {name: x if name == "n" else _number(x) for name, x in asdict(found).items()}


def _mean(values: pl.Series) -> Result:
    return _interval(stats.mean_interval(values))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k draws is right, given c right among n (Chen et al. 2021, equation 1).

    1 − C(n − c, k) / C(n, k), as a product that does not overflow.
    """
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} of {n} samples is not defined")
    return 1.0 - math.prod((1.0 - k / i for i in range(n - c + 1, n + 1)), start=1.0)


def _groups(rows: pl.DataFrame, column: str) -> list[tuple[str, pl.DataFrame]]:
    parts = rows.sort(column).partition_by(column, maintain_order=True)
    return [(str(part[column][0]), part) for part in parts]


def _samples(rows: pl.DataFrame, k: int, metric: str) -> pl.DataFrame:
    """Every sampled problem's samples in order; refuses a table in which one has fewer than k."""
    samples = rows.filter(pl.col("kind") == "sample").sort("problem_id", "sample")
    counts = samples.group_by("problem_id").len()
    lacking = counts.filter(pl.col("len") < k).height
    if lacking:
        raise UserError(
            f"{metric}: {lacking} of {counts.height} problems have fewer than {k} samples; "
            "raise the number of evaluation samples or ask for a smaller k"
        )
    return samples


def _voted(samples: pl.DataFrame) -> pl.DataFrame:
    """One row per problem: the first sample of the largest group of equal answers.

    Ties go to the group that appeared first. Samples without an answer do not vote; where none has one, the
    first sample stands.
    """
    votes = pl.when(pl.col("canonical").is_null()).then(0).otherwise(pl.len().over("problem_id", "canonical"))
    ordered = samples.with_columns(votes=votes).sort(["votes", "sample"], descending=[True, False])
    return ordered.unique("problem_id", keep="first", maintain_order=True)


def _best_scored(samples: pl.DataFrame) -> pl.DataFrame:
    """One row per problem: the sample with the highest critic score, the earlier of equals.

    Without a score a sample is not chosen; where none has one, the first sample stands.
    """
    ordered = samples.sort(["score", "sample"], descending=[True, False], nulls_last=True)
    return ordered.unique("problem_id", keep="first", maintain_order=True)


def problem_values(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Columns problem_id, source, value (0 to 1), one row per problem, sorted by problem_id."""
    name, _, digits = metric.partition("@")
    if metric != "accuracy" and not (name in ("pass", "maj", "best") and digits.isdecimal() and int(digits)):
        raise UserError(
            f"unknown metric {metric!r}; choose accuracy, or pass@k, maj@k, best@k such as pass@4"
        )
    value = _CORRECT.cast(pl.Float64).alias("value")
    k = int(digits or 0)
    if metric == "accuracy":
        table = rows.filter(pl.col("kind") == "greedy").select("problem_id", "source", value)
        if table["problem_id"].n_unique() != table.height:
            raise UserError("accuracy: more than one greedy answer to a problem; give one table per model")
    elif name == "pass":
        counts = _samples(rows, k, metric).group_by("problem_id", "source").agg(n=pl.len(), c=_CORRECT.sum())
        values = [pass_at_k(n, c, k) for n, c in counts.select("n", "c").iter_rows()]
        table = counts.select("problem_id", "source", pl.Series("value", values, dtype=pl.Float64))
    else:
        choose = _voted if name == "maj" else _best_scored
        first = _samples(rows, k, metric).group_by("problem_id", maintain_order=True).head(k)
        table = choose(first).select("problem_id", "source", value)
    if table.is_empty():
        raise UserError(f"{metric}: the table holds no answer it could be measured on")
    return table.sort("problem_id")


def accuracy(rows: pl.DataFrame) -> Result:
    """Greedy accuracy with its Wilson interval, and how many answers were undecided, missing or cut off."""
    greedy = rows.filter(pl.col("kind") == "greedy")
    beside = greedy.select(
        unsupported=(pl.col("verdict") == Verdict.unsupported.value).sum(),
        timeout=(pl.col("verdict") == Verdict.timeout.value).sum(),
        no_answer=pl.col("answer").is_null().sum(),
        truncated=pl.col("truncated").sum(),
    )
    return measure(rows, "accuracy") | beside.row(0, named=True)


def measure(rows: pl.DataFrame, metric: str) -> Result:
    """A metric with its interval over problems: {value, low, high, n}."""
    return _mean(problem_values(rows, metric)["value"])


def summarise_values(values: pl.DataFrame) -> Result:
    """Mean of a table (problem_id, source, value) with its interval, whole and by source; null: failed."""
    known = values.drop_nulls("value")
    by = {name: _mean(part["value"]) for name, part in _groups(known, "source")}
    return {**_mean(known["value"]), "failed": values.height - known.height, "by": by}


def by_group(rows: pl.DataFrame, column: str) -> dict[str, Result]:
    """`accuracy` for each value of `source`, `family`, `register` or `difficulty`."""
    return {name: accuracy(part) for name, part in _groups(rows, column)}


def critic_score_summary(rows: pl.DataFrame, threshold: float) -> Result:
    """Mean critic score with its interval over problems, share of scores ≥ `threshold`, unscored rows."""
    scored = rows.filter(pl.col("score").is_not_null())
    beside = {"n_rows": rows.height, "unscored": rows.height - scored.height, "threshold": threshold}
    if scored.is_empty():
        return {"value": None, "low": None, "high": None, "n": 0, "share_above": None} | beside
    means = scored.group_by("problem_id").agg(pl.col("score").mean()).sort("problem_id")["score"]
    share = scored.select((pl.col("score") >= threshold).mean()).item()
    return _mean(means) | {"share_above": share} | beside


def _paired(a_rows: pl.DataFrame, b_rows: pl.DataFrame, metric: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both models' values in the same order of problems; refuses different sets of problems."""
    a, b = problem_values(a_rows, metric), problem_values(b_rows, metric)
    if not a["problem_id"].equals(b["problem_id"]):
        shared = len(set(a["problem_id"]) & set(b["problem_id"]))
        raise UserError(
            f"{metric}: the two models answered different problems ({a.height} and {b.height}, "
            f"{shared} shared); evaluate both on the same test set"
        )
    return a, b


def _comparison(found: stats.Comparison, metric: str, a_value: float, b_value: float) -> Result:
    values = {"metric": metric, "a_value": a_value, "b_value": b_value}
    return {**values, **asdict(found), "relative": _ratio(found.delta, b_value)}


def compare_models(
    a_rows: pl.DataFrame, b_rows: pl.DataFrame, metric: str, seed: int, a: str = "a", b: str = "b"
) -> Result:
    """a − b on the same problems: bootstrap within sources, exact McNemar beside it for 0/1 outcomes.

    delta, low, high, p: paired bootstrap of 10,000 resamples. relative: delta over b's value.
    """
    return compare_values(*_paired(a_rows, b_rows, metric), metric, seed, a, b)


def compare_values(
    left: pl.DataFrame, right: pl.DataFrame, metric: str, seed: int, a: str = "a", b: str = "b"
) -> Result:
    """`compare_models` of two tables (problem_id, source, value) with the same problems in order."""
    x, y = left["value"].to_numpy(), right["value"].to_numpy()
    found = stats.paired_bootstrap(x, y, seed, strata=left["source"].to_numpy())
    binary = bool(np.isin(x, (0, 1)).all() and np.isin(y, (0, 1)).all())
    return {
        "a": a,
        "b": b,
        **_comparison(found, metric, float(x.mean()), float(y.mean())),
        "p_mcnemar": stats.mcnemar(x, y) if binary else None,
        "n": x.size,
    }


def _sentence(row: Mapping[str, Any]) -> str:
    """What may be said of a comparison; differences in points (hundredths)."""
    points = f"{100 * row['delta']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    head = f"{row['a']} − {row['b']}, {row['metric']}: {points}, adjusted p {row['p_adjusted']:.2g}"
    if row["finding"] != "indistinguishable":
        return f"{head}: {row['a']} is {row['finding']}."
    return f"{head}: indistinguishable (minimum detectable effect {100 * row['mde']:.1f} points)."


def adjust(rows: Sequence[Result]) -> list[Result]:
    """The family of comparisons with p_adjusted (Holm), mde, finding and a sentence each.

    mde: minimum detectable effect at 80 % power and level 5 % / family size, Holm's strictest step.
    finding: better | worse | indistinguishable.
    """
    adjusted = stats.holm([row["p"] for row in rows])
    family = []
    for row, p in zip(rows, adjusted, strict=True):
        mde = stats.minimum_detectable_effect(row["error"], row["seed_share"], row["df"], ALPHA / len(rows))
        direction = "better" if row["delta"] > 0 else "worse"
        finding = direction if p < ALPHA else "indistinguishable"
        whole = {**row, "p_adjusted": p, "mde": mde, "finding": finding}
        family.append({**whole, "sentence": _sentence(whole)})
    return family


def comparison_table(models: Mapping[str, pl.DataFrame], seed: int, against: Collection[str]) -> list[Result]:
    """Accuracy of every model against each of `against`, as one Holm-adjusted family.

    A pair appears once, the later model of `models` first, so that against=("base", "rft") compares
    rft − base, dpo − base and dpo − rft.
    """
    pairs = [pair for pair in combinations(models, 2) if not set(pair).isdisjoint(against)]
    return adjust([compare_models(models[a], models[b], "accuracy", seed, a, b) for b, a in pairs])


def compare_seeds(
    a_seeds: Sequence[pl.DataFrame], b_seeds: Sequence[pl.DataFrame], metric: str, a: str = "a", b: str = "b"
) -> Result:
    """a − b over training seeds (one table per seed, paired by position), seeds as a random effect.

    With the same problems under every seed, seeds and problems are crossed; else each seed gives one mean.
    `stats.seeds_interval` says what the interval covers. Pass several results to `adjust`.
    """
    pairs = [_paired(x, y, metric) for x, y in zip(a_seeds, b_seeds, strict=True)]
    differences = [(x["value"] - y["value"]).to_numpy() for x, y in pairs]
    crossed = all(x["problem_id"].equals(pairs[0][0]["problem_id"]) for x, _ in pairs)
    deltas = [float(d.mean()) for d in differences]
    found = stats.seeds_interval(np.stack(differences) if crossed else deltas)
    a_value = float(np.mean([x["value"].mean() for x, _ in pairs]))
    b_value = float(np.mean([y["value"].mean() for _, y in pairs]))
    beside = {"seeds": len(pairs), "n": len(differences[0]), "deltas": deltas}
    return {"a": a, "b": b, **_comparison(found, metric, a_value, b_value), **beside}


def _decisions(rows: pl.DataFrame) -> Result:
    """The critic as a classifier of `verdict is correct`; see `critic_card`."""
    labelled = rows.filter(~_UNDECIDED)
    scored = labelled.filter(pl.col("score").is_not_null())
    truth = labelled.select(_CORRECT).to_series().to_numpy()
    # an unparsed critique is a wrong decision: it says the opposite of the truth
    says_right = labelled.select((pl.col("score") >= POSITIVE).fill_null(~_CORRECT)).to_series().to_numpy()
    scored_truth = scored.select(_CORRECT).to_series().to_numpy()
    scores = scored["score"].to_numpy()
    tp, fp, tn, fn = stats.confusion(scored_truth, scores >= POSITIVE)
    balanced = stats.balanced_accuracy(truth, says_right)
    return {
        "balanced_accuracy": _number(balanced.value),
        "balanced_accuracy_low": _number(balanced.low),
        "balanced_accuracy_high": _number(balanced.high),
        "balanced_accuracy_parsed": _number(stats.balanced_accuracy(scored_truth, scores >= POSITIVE).value),
        "auroc": _number(stats.auroc(scored_truth, scores)),
        "f1": _number(stats.f1(truth, says_right)),
        "parse_failure_rate": _ratio(rows["score"].null_count(), rows.height),
        "n": labelled.height,
        "n_correct": int(truth.sum()),
        "undecided": rows.height - labelled.height,
        "confusion": {
            "true_positive": tp,
            "false_positive": fp,
            "true_negative": tn,
            "false_negative": fn,
            "unparsed_correct": int(truth.sum()) - tp - fn,
            "unparsed_incorrect": int((~truth).sum()) - tn - fp,
        },
    }


def _calibration(scored: pl.DataFrame) -> Result:
    """Scores mapped onto 0 to 1 read as probabilities of a right result; counts per whole score and label."""
    truth = scored.select(_CORRECT).to_series().to_numpy()
    scores = scored["score"].to_numpy()
    curve = stats.reliability(truth, (scores - 1) / 9)
    whole = np.clip(np.floor(scores).astype(np.int64), 1, 10)  # floor keeps "at least 6" on one side
    return {
        "ece": _number(stats.ece(curve)),
        "reliability": [vars(cell) for cell in curve],
        "histogram": {
            "correct": np.bincount(whole[truth], minlength=11)[1:].tolist(),
            "incorrect": np.bincount(whole[~truth], minlength=11)[1:].tolist(),
        },
    }


def _against_annotator(scored: pl.DataFrame) -> Result:
    """Rank correlation with the annotator; among right answers, flawed steps told from clean ones."""
    both = scored.filter(pl.col("annotator_score").is_not_null())
    right = both.filter(_CORRECT & (pl.col("annotator_score") >= POSITIVE))
    clean = (right["annotator_score"] >= CLEAN).to_numpy()
    says_clean = (right["score"] >= CLEAN).to_numpy()
    return {
        "spearman_annotator": _number(stats.spearman(both["annotator_score"], both["score"])),
        "flawed_vs_clean": {
            "auroc": _number(stats.auroc(clean, right["score"])),
            "balanced_accuracy": _number(stats.balanced_accuracy(clean, says_clean).value),
            "n_clean": int(clean.sum()),
            "n_flawed": int((~clean).sum()),
        },
    }


def _first_errors(rows: pl.DataFrame) -> Result:
    """Share of annotated responses whose first wrong step the critic named, and of those that have one.

    A critic that writes no analysis (logit mode) names none: None, not 0.
    """
    known = rows.filter(pl.col("first_error").is_not_null())
    names = known["predicted_first_error"].count() > 0
    hit = (pl.col("first_error") == pl.col("predicted_first_error")).fill_null(False)
    flawed = known.filter(pl.col("first_error") > 0)
    return {
        "first_error_accuracy": known.select(hit.mean()).item() if names else None,
        "first_error_accuracy_flawed": flawed.select(hit.mean()).item() if names else None,
        "first_error_n": known.height,
        "first_error_n_flawed": flawed.height,
    }


def critic_card(rows: pl.DataFrame) -> Result:
    """How good a critic is on labelled responses, one row each.

    Columns: score (mean over the critic's samples, null where unparsed), verdict, and where known
    annotator_score, first_error and predicted_first_error (steps from 1, 0 = no wrong step, null = not
    annotated or not said), first_score and second_score (two readings of the same response), missing_mass,
    problem_id and equations_hash, and the groups source, subject, family, register, difficulty, n_tokens.

    Label: verdict is correct; unsupported and timed-out rows are dropped and counted (`undecided`).
    Positive: score ≥ 6. An unparsed critique is a wrong decision in `balanced_accuracy` and `f1`, so that a
    critic cannot pass the gate by failing on the hard responses; `balanced_accuracy_parsed`, `auroc` and the
    calibration are over parsed critiques. `by` repeats the decisions per group, lengths in quarters.
    """
    scored = rows.filter(pl.col("score").is_not_null())
    card = _decisions(rows) | _calibration(scored.filter(~_UNDECIDED))
    if "parse" in rows.columns:
        card["parses"] = {str(name): n for name, n in sorted(rows.group_by("parse").len().iter_rows())}
    if "annotator_score" in rows.columns:
        card |= _against_annotator(scored.filter(~_UNDECIDED))
    if "first_error" in rows.columns:
        card |= _first_errors(rows)
    if "second_score" in rows.columns and rows["second_score"].count():
        card["retest"] = score_agreement(rows["first_score"], rows["second_score"])
    if "missing_mass" in rows.columns:
        card["missing_mass"] = rows["missing_mass"].mean()
    if "equations_hash" in rows.columns:
        card["thresholds"] = threshold_curve(rows, THRESHOLDS)
    groups = [c for c in ("source", "subject", "family", "register", "difficulty") if c in rows.columns]
    card["by"] = {
        column: {name: _decisions(part) for name, part in _groups(rows, column)} for column in groups
    }
    if "n_tokens" in rows.columns:
        edges = sorted(set(np.quantile(rows["n_tokens"], [0.25, 0.5, 0.75]).tolist())) if rows.height else []
        quarter = np.searchsorted(edges, rows["n_tokens"].to_numpy())
        parts = [rows.filter(pl.Series(quarter == i)) for i in range(len(edges) + 1)]
        card["by"]["n_tokens"] = {
            "-".join(map(str, (part["n_tokens"].min(), part["n_tokens"].max()))): _decisions(part)
            for part in parts
            if part.height
        }
    return card


def threshold_curve(rows: pl.DataFrame, thresholds: Sequence[float]) -> list[Result]:
    """What each rejection threshold would accept from one scored pool, without sampling again.

    Columns: problem_id, score, verdict, equations_hash. precision and recall against the checker (undecided
    verdicts are not right), yield of all responses, diversity = distinct equation lists per accepted
    response, coverage = questions with at least one accepted response.
    """
    right = rows.select(_CORRECT.sum()).item()
    questions = rows["problem_id"].n_unique()
    curve = []
    for threshold in thresholds:
        kept = rows.filter(pl.col("score") >= threshold)
        hits = kept.select(_CORRECT.sum()).item()
        curve.append({
            "threshold": threshold,
            "precision": _ratio(hits, kept.height),
            "recall": _ratio(hits, right),
            "yield": _ratio(kept.height, rows.height),
            "diversity": _ratio(kept.select("problem_id", "equations_hash").n_unique(), kept.height),
            "coverage": _ratio(kept["problem_id"].n_unique(), questions),
        })  # fmt: skip
    return curve


def score_agreement(first: pl.Series, second: pl.Series) -> Result:
    """Two readings of the same responses (a critic twice, or two critics): over those that both scored.

    kappa is that of the decision `score ≥ 6`, kappa_quadratic that of the scores.
    """
    both = pl.DataFrame({"x": first, "y": second}).drop_nulls()
    x, y = both["x"].to_numpy(), both["y"].to_numpy()
    return {
        "n": both.height,
        "unscored": len(first) - both.height,
        "spearman": _number(stats.spearman(x, y)),
        "kappa": _number(stats.cohen_kappa(x >= POSITIVE, y >= POSITIVE)),
        "kappa_quadratic": _number(stats.quadratic_kappa(x, y)),
        "mean_absolute_difference": float(np.abs(x - y).mean()) if both.height else None,
    }


def judge_summary(rows: pl.DataFrame) -> Result:
    """Free answers scored by a judge, one row each.

    Columns: score (null: failed), parse, published (what the published parser reads, -1: nothing), and the
    groups family, subject and source. micro: mean over questions; macro: mean of the subjects' means; hard:
    share of scores from 7 on. A failed verdict counts in `failed` alone; the published parser's mean
    counts its -1.
    """
    scored = rows.filter(pl.col("score").is_not_null())
    by = {
        f"by_{column}": {name: _mean(part["score"]) for name, part in _groups(scored, column)}
        for column in ("family", "subject", "source")
    }
    subjects = [subject["value"] for subject in by["by_subject"].values()]
    read = pl.col("published") >= 0
    return {
        "micro": _mean(scored["score"]),
        "macro": _ratio(sum(subjects), len(subjects)),
        "hard": _interval(stats.wilson(int((scored["score"] >= HARD).sum()), scored.height)),
        "failed": rows.height - scored.height,
        "parses": dict(rows.group_by("parse").len().sort("parse").iter_rows()),
        "published_parser": {
            "mean": rows["published"].mean(),
            "unread": rows.filter(~read).height,
            "differs": scored.filter(read & (pl.col("published") != pl.col("score"))).height,
        },
        **by,
    }
