"""What a critic wrote, read: its score, how it was parsed, the first wrong step it names."""

import re
from collections.abc import Sequence
from itertools import accumulate

import polars as pl

from selfcritique.records import Parse

SCORES = tuple(str(n) for n in range(1, 11))
_FINAL = re.compile(r"(?:^|\n)Score: (\d+)\s*$")
_LOOSE = re.compile(
    r"(?:score|rating|评分|得分)\W{0,4}(?:is|of|为|是|:)?\W{0,4}(\d+(?:\.\d+)?)(?![\d.]*\d)(?:\s*/\s*10)?",
    re.IGNORECASE,
)
_WRONG_STEP = re.compile(r"^(\d+) wrong", re.MULTILINE)


def parse_score(text: str, truncated: bool) -> tuple[float | None, Parse]:
    """The score a critique ends with. Never a stand-in: what cannot be read has no score.

    `ok` is the taught form as the last line; `repaired` the last score written in another form. A score
    outside 1 to 10 is failed, as is a text without one; a truncated text without one is `truncated`.
    """
    match = _FINAL.search(text)
    found = match or next(iter(reversed(list(_LOOSE.finditer(text)))), None)
    if found is None:
        return None, Parse.truncated if truncated else Parse.failed
    score = float(found[1])
    if not 1 <= score <= 10:
        return None, Parse.failed
    return score, Parse.ok if match else Parse.repaired


def named_first_error(text: str) -> int | None:
    """The first step called wrong, 0 if none is, None where the text judges no step."""
    match = _WRONG_STEP.search(text)
    return int(match[1]) if match else 0 if re.search(r"^\d+ ok", text, re.MULTILINE) else None


def step_of(equation: int, counts: Sequence[int]) -> int | None:
    """The step that holds the nth equation, as critics number them; counts[i]: equations of step i + 1.

    0 (nothing is wrong) stays 0. Where no step has an equation, critics can only mean the steps themselves.
    """
    if equation == 0 or not any(counts):
        return equation if equation <= len(counts) else None
    ends = accumulate(counts)
    return next((step for step, end in enumerate(ends, 1) if equation <= end), None)


def mean_scores(critiques: pl.DataFrame) -> pl.DataFrame:
    """One row per response: `score` is the mean of its parsed critiques (null if none), `parse` the best
    of theirs. Columns in: response_id, sample, score, parse, missing_mass.

    first_score and second_score are two readings of the same response; null where there is but one.
    """
    order = [p.value for p in (Parse.ok, Parse.repaired, Parse.truncated, Parse.failed)]
    rank = pl.col("parse").replace_strict(order, list(range(len(order))), return_dtype=pl.Int8)
    return critiques.group_by("response_id", maintain_order=True).agg(
        score=pl.col("score").mean(),
        parse=pl.col("parse").sort_by(rank).first(),
        missing_mass=pl.col("missing_mass").mean(),
        first_score=pl.col("score").filter(pl.col("sample") == 0).first(),
        second_score=pl.col("score").filter(pl.col("sample") == 1).first(),
        n_critiques=pl.len(),
        n_parsed=pl.col("score").count(),
    )


def expected_score(logps: Sequence[float]) -> float:
    """Mean of the ten scores under their renormalised probabilities; logps[i] is log p(score i + 1)."""
    from math import exp

    top = max(logps)
    weights = [exp(x - top) for x in logps]
    return sum(s * w for s, w in enumerate(weights, 1)) / sum(weights)
