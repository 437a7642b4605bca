"""What is trained on: the rejection filter and the pairs, pure functions of the scored pool.

A pool is a table of responses with ids, hashes, scores and no texts:

    problem_id, response_id (16 hex digits), n_tokens, truncated, text_hash, equations_hash (null: none),
    score (null: unparsed), parse, cluster (of the question), verdict (the checker's: read by the reports
    and the oracle ablation only)

Everything is a Polars expression over the whole table, nothing depends on the order of its rows, and
chance is arithmetic on response ids and a seed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import polars as pl

from selfcritique.config import Dedup, PairConfig, PairStrategy, SelectBy, SelectConfig, Selection

_BEST_FIRST = ["score", "n_tokens", "response_id"]
_DESCENDING = [True, False, False]


def draw(seed: int, column: str = "response_id") -> pl.Expr:
    """A reproducible random u64 per id: splitmix64 of its first 64 bits and the seed."""

    def mix(x: pl.Expr, shift: int, factor: int) -> pl.Expr:
        return (x ^ (x // 2**shift)) * pl.lit(factor, pl.UInt64)

    start = pl.lit((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64, pl.UInt64)
    x = pl.col(column).str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64) ^ start
    x = mix(mix(x, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    return x ^ (x // 2**31)


def permute_scores(scored: pl.LazyFrame, share: float, seed: int) -> pl.LazyFrame:
    """The pool in canonical order, scores and parses of a drawn share of it permuted among that share.

    The scores as a whole, and by that what a threshold accepts, stay as they are; balanced accuracy moves
    towards 0.5 by the share. A larger share holds every response of a smaller.
    """
    drawn = draw(seed).cast(pl.Float64) < share * 2.0**64
    moved = pl.col("score", "parse").sort_by(draw(seed + 1)).over("drawn")
    kept = pl.col("score", "parse")
    rows = scored.sort("response_id").with_columns(drawn=drawn)
    return rows.with_columns(pl.when("drawn").then(moved).otherwise(kept)).drop("drawn")


def _usable() -> pl.Expr:
    return pl.col("score").is_not_null() & ~pl.col("truncated")


def wants_whole_pool(config: SelectConfig | PairConfig) -> bool:
    """Whether one question's outcome depends on other questions'; else a pool may go through in parts."""
    if config.by is SelectBy.shuffled or config.selection is Selection.paper:
        return True
    if isinstance(config, PairConfig):
        return False
    return config.by is SelectBy.random or config.even_clusters or config.fixed_yield is not None


def _judged(pool: pl.LazyFrame, by: SelectBy, seed: int) -> pl.LazyFrame:
    """The pool in canonical order, with the scores that `by` goes by."""
    pool = pool.sort("response_id")
    if by is SelectBy.shuffled:  # the scores in another order; who gets which is chance
        order = draw(seed)
        return pool.with_columns(pl.col("score", "parse").sort_by(order))
    if by is SelectBy.checker:
        right = pl.col("verdict") == "correct"
        return pool.with_columns(score=pl.when(right).then(10.0).otherwise(1.0))
    return pool


# ---- the rejection filter ------------------------------------------------------------------------------


def select_responses(pool: pl.LazyFrame, config: SelectConfig, seed: int) -> pl.LazyFrame:
    """Every response with `selected` and the `reason`, the first that applies:

    unparsed, truncated, below_threshold; accept_rate (the question's share of accepted responses is outside
    the window); uniform_question (selection=paper: all or none of its responses are accepted);
    duplicate_text, duplicate_equations, over_cap (of the question), over_cluster, not_drawn; selected.
    Among duplicates and over the cap the best stay: highest score, then fewest tokens, then smallest id.
    """
    rows = _judged(pool, config.by, seed)
    accepted = _usable() & (pl.col("score") >= config.threshold)
    if config.by is SelectBy.random:
        whole = pl.when(~pl.col("truncated")).then(draw(seed))
        accepted = (whole.rank("ordinal") <= accepted.sum()).fill_null(False)
    rejection = (
        pl.when(accepted)
        .then(pl.lit(None, pl.String))
        .when(pl.col("score").is_null())
        .then(pl.lit("unparsed"))
        .when("truncated")
        .then(pl.lit("truncated"))
        .otherwise(pl.lit("below_threshold"))
    )
    rows = rows.with_columns(reason=rejection).sort(
        "problem_id", *_BEST_FIRST, descending=[False, *_DESCENDING]
    )
    rate = pl.col("reason").is_null().mean().over("problem_id")
    rows = _reject(rows, ~rate.is_between(config.accept_rate_min, config.accept_rate_max), "accept_rate")
    paper = config.selection is Selection.paper
    if paper:
        rows = _reject(rows, rate == 1, "uniform_question")
    if config.dedup is not Dedup.none:
        rows = _reject(rows, _nth("problem_id", "text_hash") > 1, "duplicate_text")
    if config.dedup is Dedup.equations:
        repeated = pl.col("equations_hash").is_not_null() & (_nth("problem_id", "equations_hash") > 1)
        rows = _reject(rows, repeated, "duplicate_equations")
    if config.cap_per_question:
        rows = _reject(rows, _nth("problem_id") > config.cap_per_question, "over_cap")
    if paper or config.even_clusters:
        rows = _evenly(rows, seed)
    if config.fixed_yield is not None:
        rows = _reject(rows.sort(draw(seed + 1)), _nth() > config.fixed_yield, "not_drawn")
    return rows.with_columns(
        selected=pl.col("reason").is_null(), reason=pl.col("reason").fill_null("selected")
    ).sort("response_id")


def _nth(*groups: str) -> pl.Expr:
    """Place of each row among those still in, within its group, in the table's order."""
    place = pl.col("reason").is_null().cum_sum()
    return place.over(*groups) if groups else place


def _reject(rows: pl.LazyFrame, where: pl.Expr, reason: str) -> pl.LazyFrame:
    still_in = pl.col("reason").is_null()
    return rows.with_columns(reason=pl.when(still_in & where).then(pl.lit(reason)).otherwise("reason"))


def _evenly(rows: pl.LazyFrame, seed: int) -> pl.LazyFrame:
    """As many from every question cluster as the smallest has, drawn."""
    kept = pl.col("reason").is_null().sum().over("cluster")
    smallest = kept.filter(kept > 0).min()
    return _reject(rows.sort(draw(seed + 2)), _nth("cluster") > smallest, "over_cluster")


# ---- pairs ---------------------------------------------------------------------------------------------


def build_pairs(pool: pl.LazyFrame, config: PairConfig, seed: int) -> pl.LazyFrame:
    """(chosen, rejected) of one question: chosen at or above the threshold, rejected below it, at least
    `margin` apart, with other texts; unparsed and truncated responses take no part.

    best_worst and length_matched take a question's widest margins first, `all` draws among its pairs;
    selection=paper also takes equally many pairs from every question cluster.
    """
    chance = draw(seed, "chosen_response_id") ^ draw(seed + 1, "rejected_response_id")
    pairs = _candidates(_weighed(pool, config, seed), config).with_columns(chance=chance)
    order = ["chance"] if config.strategy is PairStrategy.all else ["margin", "chance"]
    pairs = pairs.sort("problem_id", *order, descending=[False, *(name == "margin" for name in order)])
    pairs = pairs.filter(pl.int_range(pl.len()).over("problem_id") < config.max_per_question)
    if config.selection is Selection.paper:
        smallest = pl.len().over("cluster").min()
        widest = pairs.sort("margin", "chance", descending=[True, False])
        pairs = widest.filter(pl.int_range(pl.len()).over("cluster") < smallest)
    return pairs.select(
        pair_id=pl.concat_str("chosen_response_id", "rejected_response_id", separator="-"),
        problem_id="problem_id",
        chosen_id="chosen_response_id",
        rejected_id="rejected_response_id",
        chosen_score="chosen_score",
        rejected_score="rejected_score",
        margin="margin",
    ).sort("pair_id")


def _weighed(pool: pl.LazyFrame, config: PairConfig, seed: int) -> pl.LazyFrame:
    """The pool with the scores that pairs go by."""
    rows = _judged(pool, config.by, seed)
    if config.by is SelectBy.random:
        rows = rows.with_columns(score=1 + 9 * (draw(seed + 3) % 2**32) / 2**32)
    return rows


def _candidates(rows: pl.LazyFrame, config: PairConfig) -> pl.LazyFrame:
    """Every pair that may be taken: across the threshold, far enough apart, other texts, matching lengths."""
    columns = ["response_id", "score", "n_tokens", "text_hash"]
    rows, above = rows.filter(_usable()), pl.col("score") >= config.threshold
    chosen = rows.filter(above).select("problem_id", "cluster", pl.col(columns).name.prefix("chosen_"))
    rejected = rows.filter(~above).select("problem_id", pl.col(columns).name.prefix("rejected_"))
    difference = pl.col("chosen_score") - pl.col("rejected_score")
    pairs = chosen.join(rejected, on="problem_id").with_columns(
        margin=difference.round(9)  # means of several critiques: 26/3 - 20/3 is 2
    )
    pairs = pairs.filter(
        pl.col("margin") >= config.margin, pl.col("chosen_text_hash") != pl.col("rejected_text_hash")
    )
    if config.strategy is PairStrategy.length_matched:
        lengths = pl.col("chosen_n_tokens") / pl.col("rejected_n_tokens")
        pairs = pairs.filter(lengths.is_between(1 / config.max_length_ratio, config.max_length_ratio))
    return pairs


def pair_reasons(pool: pl.LazyFrame, pairs: pl.LazyFrame, config: PairConfig, seed: int) -> pl.LazyFrame:
    """Per response its `role` in the pairs (chosen, rejected, none) and why: paired, unparsed, truncated,
    no_partner (no other response of the question may be paired with it), over_cap (of the question, or with
    selection=paper of the cluster)."""

    def sides(table: pl.LazyFrame, chosen: str, rejected: str) -> pl.LazyFrame:
        parts = ((chosen, "chosen"), (rejected, "rejected"))
        return pl.concat([table.select(response_id=i, role=pl.lit(r)) for i, r in parts]).unique(
            "response_id"
        )

    rows = _weighed(pool, config, seed)
    possible = sides(_candidates(rows, config), "chosen_response_id", "rejected_response_id")
    rows = rows.join(sides(pairs, "chosen_id", "rejected_id"), on="response_id", how="left").join(
        possible.rename({"role": "possible"}), on="response_id", how="left"
    )
    reason = (
        pl.when(pl.col("role").is_not_null())
        .then(pl.lit("paired"))
        .when(pl.col("score").is_null())
        .then(pl.lit("unparsed"))
        .when("truncated")
        .then(pl.lit("truncated"))
        .when(pl.col("possible").is_not_null())
        .then(pl.lit("over_cap"))
        .otherwise(pl.lit("no_partner"))
    )
    return rows.select("response_id", pl.col("role").fill_null("none"), reason=reason).sort("response_id")


# ---- reports -------------------------------------------------------------------------------------------


def selection_counts(selected: pl.LazyFrame) -> dict[str, int]:
    """What `selection_report` sums over parts of a pool: counts, `reason_*` among them."""
    correct = pl.col("verdict") == "correct"
    accepted = ~pl.col("reason").is_in(["unparsed", "truncated", "below_threshold"])
    text = pl.struct("problem_id", "text_hash")
    figures = selected.select(
        responses=pl.len(),
        selected=pl.col("selected").sum(),
        accepted=accepted.sum(),
        questions=pl.col("problem_id").n_unique(),
        questions_covered=pl.col("problem_id").filter("selected").n_unique(),
        equation_lists=pl.struct("problem_id", "equations_hash").filter(accepted).n_unique(),
        right=(pl.col("selected") & correct).sum(),
        right_accepted=(accepted & correct).sum(),
        correct_texts=text.filter(correct).n_unique(),
        correct_texts_selected=text.filter(pl.col("selected") & correct).n_unique(),
    ).collect()
    reasons = selected.group_by("reason").len().collect()
    return figures.row(0, named=True) | {f"reason_{reason}": n for reason, n in reasons.iter_rows()}


def selection_report(parts: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Counts by reason, and how right the selection was by the checker.

    parts: `selection_counts` of disjoint sets of questions.
    precision: share of the selected that are correct; recall: share of the distinct correct texts of each
    question that were selected; accept_rate: share of responses the critic accepts; yield: share selected;
    coverage: share of questions with a selected response; diversity: distinct equation lists per accepted.
    """
    f = sum(map(Counter, parts), Counter[str]())  # drops what is 0, and answers 0 for it
    reasons = {name.removeprefix("reason_"): n for name, n in sorted(f.items()) if name.startswith("reason_")}
    return {
        "responses": f["responses"],
        "selected": f["selected"],
        "questions": f["questions"],
        "yield": _share(f["selected"], f["responses"]),
        "accept_rate": _share(f["accepted"], f["responses"]),
        "coverage": _share(f["questions_covered"], f["questions"]),
        "diversity": _share(f["equation_lists"], f["accepted"]),
        "precision": _share(f["right"], f["selected"]),
        "precision_accepted": _share(f["right_accepted"], f["accepted"]),
        "recall": _share(f["correct_texts_selected"], f["correct_texts"]),
        "reasons": reasons,
    }


def pair_sides(pool: pl.LazyFrame, pairs: pl.LazyFrame) -> pl.DataFrame:
    """The pairs with the lengths and verdicts of their sides, for `pairs_report`."""
    known = pool.select("response_id", "n_tokens", right=pl.col("verdict") == "correct")
    sides = pairs.join(known, left_on="chosen_id", right_on="response_id").join(
        known, left_on="rejected_id", right_on="response_id", suffix="_rejected"
    )
    kept = ("problem_id", "margin", "n_tokens", "n_tokens_rejected", "right", "right_rejected")
    return sides.select(kept).collect()


def pairs_report(sides: pl.DataFrame) -> dict[str, Any]:
    """Number, margins and lengths; precision: share with a correct chosen and an incorrect rejected."""
    report = sides.select(
        pairs=pl.len(),
        questions=pl.col("problem_id").n_unique(),
        precision=(pl.col("right") & ~pl.col("right_rejected")).mean(),
        chosen_tokens=pl.col("n_tokens").mean(),
        rejected_tokens=pl.col("n_tokens_rejected").mean(),
    )
    # fmean is exact whatever the order, which a join does not promise
    margin = fmean(sides["margin"]) if sides.height else None
    return report.row(0, named=True) | {"mean_margin": margin}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
