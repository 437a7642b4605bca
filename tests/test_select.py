"""Selection and pairing of small pools whose outcome is read off by hand."""

from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from selfcritique import stages
from selfcritique.config import Dedup, PairConfig, PairStrategy, SelectBy, SelectConfig, Selection
from selfcritique.progress import Progress
from selfcritique.select import (
    build_pairs,
    draw,
    pair_reasons,
    pair_sides,
    pairs_report,
    permute_scores,
    select_responses,
    selection_counts,
    selection_report,
    wants_whole_pool,
)

SCHEMA = {
    "problem_id": pl.String, "response_id": pl.String, "n_tokens": pl.Int64, "truncated": pl.Boolean,
    "text_hash": pl.String, "equations_hash": pl.String, "score": pl.Float64, "parse": pl.String,
    "cluster": pl.String, "verdict": pl.String,
}  # fmt: skip
EVERYTHING = {"threshold": 7.0, "dedup": Dedup.none, "cap_per_question": 0}  # but what scores exclude

Row = dict[str, Any]


def row(problem: str, number: int, score: float | None, **changes: Any) -> Row:
    """Response `number`, unlike all others but for `changes`."""
    base = {
        "problem_id": problem, "response_id": f"{number:016x}", "n_tokens": 5, "truncated": False,
        "text_hash": f"text {number}", "equations_hash": f"equations {number}", "score": score,
        "parse": "failed" if score is None else "ok", "cluster": "c", "verdict": "incorrect",
    }  # fmt: skip
    return base | changes


def pool(rows: list[Row]) -> pl.LazyFrame:
    return pl.DataFrame(rows, schema=SCHEMA).lazy()


def select(rows: list[Row], seed: int = 0, **settings: Any) -> pl.DataFrame:
    return select_responses(pool(rows), SelectConfig(**settings), seed).collect()


def reasons(rows: list[Row], seed: int = 0, **settings: Any) -> dict[int, str]:
    found = select(rows, seed, **settings)
    assert found["selected"].to_list() == [r == "selected" for r in found["reason"]]
    return {int(i, 16): reason for i, reason in found.select("response_id", "reason").iter_rows()}


def selected(rows: list[Row], seed: int = 0, **settings: Any) -> set[int]:
    return {number for number, reason in reasons(rows, seed, **settings).items() if reason == "selected"}


def pairs(rows: list[Row], seed: int = 0, **settings: Any) -> list[tuple[int, int]]:
    found = build_pairs(pool(rows), PairConfig(**settings), seed).collect()
    return [(int(c, 16), int(r, 16)) for c, r in found.select("chosen_id", "rejected_id").iter_rows()]


def sides(rows: list[Row], seed: int = 0, **settings: Any) -> dict[int, tuple[str, str]]:
    config = PairConfig(**settings)
    built = build_pairs(pool(rows), config, seed)
    found = pair_reasons(pool(rows), built, config, seed).collect()
    return {int(i, 16): (role, reason) for i, role, reason in found.iter_rows()}


def crowd(n: int = 400) -> list[Row]:
    """A pool with everything in it: ties, repeated texts and equations, unparsed, truncated, clusters."""
    rng = Random(0)
    rows = []
    for _ in range(n):
        problem = rng.randrange(n // 8)
        text = rng.randrange(6)
        rows.append(
            row(
                f"p{problem}",
                rng.getrandbits(64),
                rng.choice([None, 1.0, 3.0, 6.5, 7.0, 9.0, 10.0]),
                n_tokens=rng.randrange(5, 9),
                truncated=rng.random() < 0.15,
                text_hash=f"t{text}",
                equations_hash=None if text == 5 else f"e{text // 2}",
                cluster=f"c{problem % 3}",
                verdict=rng.choice(["correct", "incorrect", "timeout"]),
            )
        )
    return rows


# ---- chance --------------------------------------------------------------------------------------------


def test_draw_is_splitmix64() -> None:
    """For id 0 and seeds 0, 1, 2 the published first three outputs of splitmix64 seeded with 0."""
    ids = pl.DataFrame({"response_id": ["0" * 16]})
    found = [ids.select(draw(seed)).item() for seed in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


# ---- the rejection filter ------------------------------------------------------------------------------


def test_threshold_and_what_has_no_score() -> None:
    rows = [
        row("a", 1, 7.0),  # at the threshold
        row("a", 2, 6.9),
        row("a", 3, None),
        row("a", 4, 10.0, truncated=True),
        row("a", 5, None, truncated=True, parse="truncated"),
    ]
    expected = {1: "selected", 2: "below_threshold", 3: "unparsed", 4: "truncated", 5: "unparsed"}
    assert reasons(rows, threshold=7.0) == expected


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [
        ({"score": 8.0}, {"score": 9.0}, 2),  # the better
        ({"n_tokens": 6}, {"n_tokens": 5}, 2),  # then the shorter
        ({}, {}, 1),  # then the smaller id
        ({"score": 10.0, "truncated": True}, {}, 2),  # what is out already displaces nothing
    ],
)
@pytest.mark.parametrize("same", ["text_hash", "equations_hash"])
def test_the_best_of_duplicates_stays(first: Row, second: Row, stays: int, same: str) -> None:
    rows = [row("a", 1, 9.0) | {same: "same"} | first, row("a", 2, 9.0) | {same: "same"} | second]
    assert selected(rows) == {stays}


def test_what_counts_as_a_duplicate() -> None:
    """2 has the text of 1, 3 its equations; 4 and 5 have no equations; 6 answers another question."""
    rows = [
        row("a", 1, 9.0),
        row("a", 2, 9.0, text_hash="text 1", equations_hash="equations 1"),
        row("a", 3, 9.0, equations_hash="equations 1"),
        row("a", 4, 9.0, equations_hash=None),
        row("a", 5, 9.0, equations_hash=None),
        row("b", 6, 9.0, text_hash="text 1", equations_hash="equations 1"),
    ]
    found = reasons(rows, dedup=Dedup.equations, cap_per_question=0)
    assert {n for n, reason in found.items() if reason == "selected"} == {1, 4, 5, 6}
    assert (found[2], found[3]) == ("duplicate_text", "duplicate_equations")
    assert selected(rows, dedup=Dedup.text, cap_per_question=0) == {1, 3, 4, 5, 6}
    assert selected(rows, dedup=Dedup.none, cap_per_question=0) == {1, 2, 3, 4, 5, 6}


def test_the_cap_keeps_the_best_of_each_question_after_duplicates_are_gone() -> None:
    rows = [
        row("a", 1, 8.0),
        row("a", 2, 10.0),
        row("a", 3, 10.0, text_hash="text 2"),  # would fill the cap if it counted
        row("a", 4, 9.0),
        row("b", 5, 8.0),
    ]
    found = reasons(rows, cap_per_question=2)
    assert found == {1: "over_cap", 2: "selected", 3: "duplicate_text", 4: "selected", 5: "selected"}
    assert selected(rows, cap_per_question=0) == {1, 2, 4, 5}


def test_accept_rate_window_counts_every_response_and_holds_its_ends() -> None:
    """a: 1 of 4 accepted, b: 2 of 4, c: 3 of 4, one of b unparsed and one of c truncated."""
    scores = {"a": [9, 1, 1, 1], "b": [9, 9, 1, None], "c": [9, 9, 9, 9]}
    rows = [row(p, 10 * i + j, s) for i, p in enumerate("abc") for j, s in enumerate(scores[p])]
    rows[-1]["truncated"] = True
    found = reasons(rows, accept_rate_min=0.25, accept_rate_max=0.5, **EVERYTHING)
    assert {n for n, reason in found.items() if reason == "selected"} == {0, 10, 11}
    assert [found[n] for n in (20, 21, 22, 23)] == ["accept_rate"] * 3 + ["truncated"]
    assert selected(rows, accept_rate_min=0.3, **EVERYTHING) == {10, 11, 20, 21, 22}


def test_fixed_yield_draws_exactly_so_many_of_what_is_left() -> None:
    """40 of 100 accepted ones; a larger yield adds to a smaller; another seed draws others."""
    rows = [row(f"p{i % 20}", i, 9.0 if i < 100 else 1.0) for i in range(150)]
    few, more = (selected(rows, fixed_yield=n, **EVERYTHING) for n in (15, 40))
    assert (len(few), len(more)) == (15, 40) and few < more <= set(range(100))
    assert more != selected(rows, seed=1, fixed_yield=40, **EVERYTHING)
    assert Counter(reasons(rows, fixed_yield=40, **EVERYTHING).values())["not_drawn"] == 60


def test_even_clusters_takes_what_the_smallest_has() -> None:
    """Accepted: 5 of cluster x, 2 of y, none of z, which therefore does not count."""
    rows = [row("a", i, 9.0, cluster="x") for i in range(5)]
    rows += [row("b", 10 + i, 9.0, cluster="y") for i in range(2)]
    rows += [row("c", 20, 1.0, cluster="z")]
    found = reasons(rows, even_clusters=True, **EVERYTHING)
    assert Counter(found.values()) == {"selected": 4, "over_cluster": 3, "below_threshold": 1}
    assert {found[10], found[11]} == {"selected"}


def test_the_paper_selection_takes_mixed_questions_evenly_over_clusters() -> None:
    """a: all accepted; b and c: mixed, in two clusters with 2 and 1 left; d: none accepted."""
    scores = {"a": [9, 9], "b": [9, 9, 1], "c": [9, 1], "d": [1, 1]}
    clusters = {"a": "x", "b": "x", "c": "y", "d": "y"}
    rows = [
        row(p, 10 * i + j, s, cluster=clusters[p])
        for i, p in enumerate("abcd")
        for j, s in enumerate(scores[p])
    ]
    found = reasons(rows, selection=Selection.paper)
    assert {found[0], found[1]} == {"uniform_question"} and found[20] == "selected"
    assert sorted((found[10], found[11])) == ["over_cluster", "selected"]
    assert {found[n] for n in (12, 21, 30, 31)} == {"below_threshold"}


def test_the_checker_as_oracle_ignores_scores() -> None:
    rows = [
        row("a", 1, 1.0, verdict="correct"),
        row("a", 2, 10.0),
        row("a", 3, None, verdict="correct"),
        row("a", 4, 10.0, verdict="timeout"),
        row("a", 5, 1.0, verdict="correct", truncated=True),
    ]
    assert selected(rows, by=SelectBy.checker) == {1, 3}


def test_random_selection_matches_the_yield_and_reads_no_score() -> None:
    """30 of 60 whole responses are accepted by the critic, so 30 whole ones are drawn, right or not."""
    rows = [row("a", i, 9.0 if i % 2 else 1.0, truncated=i >= 60) for i in range(120)]
    found = selected(rows, by=SelectBy.random, **EVERYTHING)
    assert len(found) == 30 and max(found) < 60
    assert 5 < sum(i % 2 for i in found) < 25  # 15 expected, s.d. 2
    turned = [r | {"score": 10 - r["score"]} for r in rows]
    assert selected(turned, by=SelectBy.random, **EVERYTHING) == found
    assert selected(rows, seed=1, by=SelectBy.random, **EVERYTHING) != found


def test_shuffled_scores_are_the_same_scores_elsewhere() -> None:
    rows = crowd()
    before = pool(rows).sort("response_id").collect()
    after, again, other = (
        select(r, s, by=SelectBy.shuffled) for r, s in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert after["response_id"].equals(before["response_id"])
    for frame in (after, other):
        assert Counter(frame.select("score", "parse").iter_rows()) == Counter(
            before.select("score", "parse").iter_rows()
        )
        # Where they land is chance: about 1 in 7 stays the same, as of any two independent draws.
        same = sum(a == b for a, b in zip(frame["score"], before["score"], strict=True))
        assert same < 0.3 * len(rows)
    assert after["score"].equals(again["score"]) and not after["score"].equals(other["score"])
    assert after.filter("selected")["score"].min() >= 7.0


def test_permuting_all_scores_is_shuffling_and_none_changes_none() -> None:
    """The second draw of a seed is the first of the next."""
    rows = crowd()
    before, after = (permute_scores(pool(rows), share, 4).collect() for share in (0.0, 1.0))
    assert_frame_equal(before, pool(rows).sort("response_id").collect())
    shuffled = select(rows, seed=5, by=SelectBy.shuffled)
    assert_frame_equal(
        after.select("response_id", "score", "parse"), shuffled.select("response_id", "score", "parse")
    )


def test_a_share_of_the_scores_is_permuted_within_that_share() -> None:
    """10,000 right responses have 10, as many wrong ones 1: of a share r, half gets the other side's
    score, so that balanced accuracy is 1 - r / 2. Its standard error is under 0.0025."""
    rows = [row(f"p{i}", i, 10.0 if i % 2 else 1.0, verdict="correct" if i % 2 else "incorrect")
            for i in range(20_000)]  # fmt: skip
    whole = pool(rows)
    chance = whole.sort("response_id").select(draw(0).cast(pl.Float64) / 2**64).collect().to_series()
    for share in (0.25, 0.8):
        found = permute_scores(whole, share, 0).collect()
        wrong = (found["score"] == 10.0) != (found["verdict"] == "correct")
        assert not (wrong & (chance > share)).any()  # what is not drawn keeps its score
        assert found["score"].mean() == 5.5
        assert wrong.mean() == pytest.approx(share / 2, abs=0.01)


SELECTIONS = [
    {},
    {"dedup": Dedup.text, "cap_per_question": 1},
    {"accept_rate_min": 0.2, "accept_rate_max": 0.6, "even_clusters": True, "fixed_yield": 12},
    {"selection": Selection.paper, "fixed_yield": 9},
    *({"by": by} for by in SelectBy),
]


@pytest.mark.parametrize("settings", SELECTIONS, ids=str)
def test_selection_depends_on_no_order_and_gives_each_response_one_reason(settings: Row) -> None:
    rows = crowd()
    found = select(rows, **settings)
    for seed in range(3):
        assert_frame_equal(select(Random(seed).sample(rows, len(rows)), **settings), found)
    assert sorted(found["response_id"]) == sorted(r["response_id"] for r in rows)
    report = selection_report([selection_counts(found.lazy())])
    assert sum(report["reasons"].values()) == report["responses"] == len(rows)
    assert report["reasons"]["selected"] == report["selected"] == found["selected"].sum() > 0
    assert not found.filter("selected")["truncated"].any()


# ---- pairs ---------------------------------------------------------------------------------------------

FIVE = [row("a", n, float(n)) for n in (10, 8, 7, 3, 1)]  # three at or above 7, two below


def test_best_worst_takes_the_widest_margins() -> None:
    assert pairs(FIVE) == [(10, 1)]
    assert sorted(pairs(FIVE, max_per_question=3)) == [(8, 1), (10, 1), (10, 3)]  # margins 7, 9, 7


def test_all_takes_every_pair_across_the_threshold_with_the_margin() -> None:
    """(7, 3) has margin 4; (10, 7) and (3, 1) lie on one side."""
    settings: Row = {"strategy": PairStrategy.all, "margin": 5.0}
    whole = {(8, 1), (8, 3), (7, 1), (10, 1), (10, 3)}
    assert set(pairs(FIVE, max_per_question=99, **settings)) == whole
    drawn = [pairs(FIVE, seed, max_per_question=2, **settings) for seed in range(40)]
    assert {len(d) for d in drawn} == {2} and set().union(*drawn) == whole


def test_length_matched_pairs_have_like_lengths() -> None:
    """Ratio at most 1.25 either way: 10 tokens go with 8 and with 12, not with 7 or 13; then margins."""
    lengths = {3: 8, 2: 12, 1: 7, 4: 13}  # by score
    rows = [row("a", 9, 9.0, n_tokens=10)]
    rows += [row("a", score, float(score), n_tokens=n) for score, n in lengths.items()]
    settings: Row = {"strategy": PairStrategy.length_matched, "max_length_ratio": 1.25}
    assert sorted(pairs(rows, max_per_question=9, **settings)) == [(9, 2), (9, 3)]
    assert pairs(rows, **settings) == [(9, 2)]
    assert sides(rows, **settings) == {
        1: ("none", "no_partner"),
        2: ("rejected", "paired"),
        3: ("none", "over_cap"),
        4: ("none", "no_partner"),
        9: ("chosen", "paired"),
    }


@pytest.mark.parametrize(
    "rows",
    [
        [row("a", 1, 7.0), row("a", 2, 7.0)],  # a tie
        [row("a", 1, 10.0), row("a", 2, 7.0)],  # both accepted
        [row("a", 1, 6.0), row("a", 2, 1.0)],  # both rejected
        [row("a", 1, 7.0), row("a", 2, 5.5)],  # margin 1.5 of 2
        [row("a", 1, 10.0), row("a", 2, 1.0, text_hash="text 1")],  # one text, read twice
        [row("a", 1, 10.0), row("a", 2, None)],
        [row("a", 1, 10.0), row("a", 2, 1.0, truncated=True)],
        [row("a", 1, 10.0, truncated=True), row("a", 2, 1.0)],
        [row("a", 1, 10.0), row("b", 2, 1.0)],  # two questions
    ],
)
@pytest.mark.parametrize("strategy", PairStrategy)
def test_what_never_forms_a_pair(rows: list[Row], strategy: PairStrategy) -> None:
    assert pairs(rows, strategy=strategy) == []
    assert {role for role, _ in sides(rows, strategy=strategy).values()} == {"none"}
    assert not {"paired", "over_cap"} & {reason for _, reason in sides(rows, strategy=strategy).values()}


def test_margins_are_those_of_the_scores_and_hold_their_end() -> None:
    """26/3 and 20/3 are means of three critiques, exactly 2 apart: float subtraction says 1.99...91."""
    assert 26 / 3 - 20 / 3 < 2
    rows = [row("a", 1, 26 / 3), row("a", 2, 20 / 3)]
    found = build_pairs(pool(rows), PairConfig(margin=2.0), 0).collect()
    assert found.row(0, named=True) == {
        "pair_id": f"{1:016x}-{2:016x}",
        "problem_id": "a",
        "chosen_id": f"{1:016x}",
        "rejected_id": f"{2:016x}",
        "chosen_score": 26 / 3,
        "rejected_score": 20 / 3,
        "margin": 2.0,
    }


def test_max_per_question_holds_for_each_question() -> None:
    rows = [row(p, 100 * i + n, float(n)) for i, p in enumerate("abc") for n in (10, 9, 2, 1)]
    found = pairs(rows, max_per_question=3)
    assert Counter(chosen // 100 for chosen, _ in found) == {0: 3, 1: 3, 2: 3}
    assert all(c // 100 == r // 100 for c, r in found)


def test_paper_pairs_are_the_widest_of_each_cluster_in_equal_number() -> None:
    """Cluster x has questions with margins 9, 7, 5, cluster y one with 4: one pair each."""
    rows = []
    for i, (chosen, rejected, cluster) in enumerate([(10, 1, "x"), (9, 2, "x"), (8, 3, "x"), (7, 3, "y")]):
        rows += [
            row(f"p{i}", 10 * i + j, float(s), cluster=cluster) for j, s in enumerate((chosen, rejected))
        ]
    assert pairs(rows, selection=Selection.paper) == [(0, 1), (30, 31)]
    assert {sides(rows, selection=Selection.paper)[n] for n in (10, 11, 20, 21)} == {("none", "over_cap")}


def test_pairs_by_checker_by_chance_and_by_shuffled_scores() -> None:
    rows = [
        row("a", 1, 1.0, verdict="correct"),
        row("a", 2, 10.0, verdict="incorrect"),
        row("a", 3, None, verdict="correct", truncated=True),
    ]
    assert pairs(rows, by=SelectBy.checker) == [(1, 2)]
    assert sides(rows, by=SelectBy.checker)[3] == ("none", "truncated")
    by_chance = {tuple(pairs(rows, seed, by=SelectBy.random)) for seed in range(60)}
    assert by_chance == {(), ((1, 2),), ((2, 1),)}  # whichever falls where, or too near
    turned = [r | {"score": 5.0} for r in rows]
    assert all(pairs(rows, s, by=SelectBy.random) == pairs(turned, s, by=SelectBy.random) for s in range(9))
    whole = rows[:2]
    assert {tuple(pairs(whole, s, by=SelectBy.shuffled)) for s in range(20)} == {((1, 2),), ((2, 1),)}


def test_pair_reasons() -> None:
    """a: best and worst pair, the rest over the cap; b: nothing across; c: 8 - 6.5 is under the margin."""
    rows = [row("a", n, float(n)) for n in (10, 8, 3, 1)]
    rows += [row("b", 20, 9.0), row("b", 21, 8.0), row("b", 22, None), row("b", 23, 1.0, truncated=True)]
    rows += [row("c", 30, 8.0), row("c", 31, 6.0), row("c", 32, 6.5)]
    assert sides(rows) == {
        10: ("chosen", "paired"),
        8: ("none", "over_cap"),
        3: ("none", "over_cap"),
        1: ("rejected", "paired"),
        20: ("none", "no_partner"),
        21: ("none", "no_partner"),
        22: ("none", "unparsed"),
        23: ("none", "truncated"),
        30: ("chosen", "paired"),
        31: ("rejected", "paired"),
        32: ("none", "no_partner"),
    }


PAIRINGS = [
    {"max_per_question": 3},
    {"strategy": PairStrategy.all, "max_per_question": 2},
    {"strategy": PairStrategy.length_matched, "max_length_ratio": 1.2},
    {"selection": Selection.paper},
    *({"by": by} for by in SelectBy),
]


@pytest.mark.parametrize("settings", PAIRINGS, ids=str)
def test_pairs_depend_on_no_order_and_every_response_has_one_role(settings: Row) -> None:
    rows, config = crowd(), PairConfig(**settings)
    found = build_pairs(pool(rows), config, 0).collect()
    for seed in range(3):
        again = pool(Random(seed).sample(rows, len(rows)))
        assert_frame_equal(build_pairs(again, config, 0).collect(), found)
    roles = pair_reasons(pool(rows), found.lazy(), config, 0).collect()
    assert sorted(roles["response_id"]) == sorted(r["response_id"] for r in rows)
    assert set(roles.filter(role="chosen")["response_id"]) == set(found["chosen_id"])
    assert set(roles.filter(role="rejected")["response_id"]) == set(found["rejected_id"])
    assert found.height > 0 and found["pair_id"].is_unique().all()
    assert (roles["role"] != "none").to_list() == (roles["reason"] == "paired").to_list()


# ---- reports -------------------------------------------------------------------------------------------


def test_selection_report() -> None:
    """a: 1 right, selected; 2 its copy; 3 wrong, selected; 4 right, missed; b: 5 wrong; c: 6 unparsed.

    Selected 2 of 6, accepted 3 (1, 2, 3), covering 1 of 3 questions; right are 1 of the 2 selected and 2 of
    the 3 accepted; of the distinct right texts {1, 4} one is selected; the accepted have the equation lists
    of 1 and 3.
    """
    rows = [
        row("a", 1, 9.0, verdict="correct"),
        row("a", 2, 9.0, verdict="correct", text_hash="text 1", equations_hash="equations 1"),
        row("a", 3, 8.0),
        row("a", 4, 2.0, verdict="correct"),
        row("b", 5, 1.0),
        row("c", 6, None),
    ]
    report = selection_report([selection_counts(select(rows).lazy())])
    assert report == {
        "responses": 6,
        "selected": 2,
        "questions": 3,
        "yield": 2 / 6,
        "accept_rate": 3 / 6,
        "coverage": 1 / 3,
        "diversity": 2 / 3,
        "precision": 1 / 2,
        "precision_accepted": 2 / 3,
        "recall": 1 / 2,
        "reasons": {"below_threshold": 2, "duplicate_text": 1, "selected": 2, "unparsed": 1},
    }


def test_recall_counts_a_text_once() -> None:
    """Without de-duplication both copies are selected: one of two right texts, not two of two."""
    rows = [row("a", n, 9.0, verdict="correct", text_hash="same") for n in (1, 2)]
    rows.append(row("a", 3, 1.0, verdict="correct"))
    assert selection_report([selection_counts(select(rows, dedup=Dedup.none).lazy())])["recall"] == 1 / 2


def test_reports_of_nothing_have_no_shares() -> None:
    rows = [row("a", 1, 1.0), row("a", 2, None)]
    report = selection_report([selection_counts(select(rows).lazy())])
    assert [report[k] for k in ("yield", "coverage", "accept_rate")] == [0, 0, 0]
    assert [report[k] for k in ("precision", "precision_accepted", "recall", "diversity")] == [None] * 4
    built = build_pairs(pool(rows), PairConfig(), 0)
    empty = pairs_report(pair_sides(pool(rows), built))
    assert (empty["pairs"], empty["questions"], empty["precision"], empty["mean_margin"]) == (
        0,
        0,
        None,
        None,
    )


def test_pairs_report() -> None:
    """a: right over wrong, 10 - 1; b: right over right, 9 - 4; c: wrong over wrong, 8 - 1. Precision 1/3."""
    verdicts = {"a": "ci", "b": "cc", "c": "ii"}
    scores = {"a": (10.0, 1.0), "b": (9.0, 4.0), "c": (8.0, 1.0)}
    tokens = {"a": (4, 8), "b": (6, 9), "c": (8, 13)}
    rows = [
        row(
            p,
            10 * i + j,
            scores[p][j],
            n_tokens=tokens[p][j],
            verdict={"c": "correct", "i": "incorrect"}[verdicts[p][j]],
        )
        for i, p in enumerate("abc")
        for j in range(2)
    ]
    assert pairs_report(pair_sides(pool(rows), build_pairs(pool(rows), PairConfig(), 0))) == {
        "pairs": 3,
        "questions": 3,
        "mean_margin": pytest.approx((9 + 5 + 7) / 3),
        "precision": pytest.approx(1 / 3),
        "chosen_tokens": 6.0,
        "rejected_tokens": 10.0,
    }


# ---- in parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        (SelectConfig(), False),
        (SelectConfig(by=SelectBy.checker), False),
        (SelectConfig(fixed_yield=9), True),
        (SelectConfig(by=SelectBy.random), True),
        (SelectConfig(even_clusters=True), True),
        (PairConfig(), False),
        (PairConfig(by=SelectBy.random), False),
        (PairConfig(by=SelectBy.shuffled), True),
        (PairConfig(selection=Selection.paper), True),
    ],
)
def test_a_pool_in_parts_is_chosen_from_as_a_whole(
    config: SelectConfig | PairConfig, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 questions of 5 responses, about 30 responses at a time or all at once: the same rows and figures."""
    chance, rows = Random(0), []
    for i in range(200):
        score = chance.choice([None, 2.0, 5.0, 8.0, 9.0])
        verdict = "correct" if (score or 0) > 6 else "incorrect"
        rows.append(row(f"{i // 5:016x}", i, score, text_hash=f"text {i % 50}", verdict=verdict))
    pool(rows).drop("cluster").collect().write_parquet(tmp_path / "scored.parquet")
    families = [{"problem_id": f"{i:016x}", "family": f"f{i % 3}"} for i in range(40)]
    pl.DataFrame(families).write_parquet(tmp_path / "problems.parquet")
    inputs: Any = {role: SimpleNamespace(path=tmp_path) for role in ("scored", "problems")}
    assert wants_whole_pool(config) == whole
    found = []
    for part in (200, 30):
        monkeypatch.setattr(stages, "PART", part)
        out = tmp_path / str(part)
        out.mkdir()
        if isinstance(config, SelectConfig):
            metrics = stages.select(stages.Select(config, 1), inputs, out, Progress("test"))
        else:
            metrics = stages.pairs(stages.Pairs(config, 1), inputs, out, Progress("test"))
        found.append((metrics, {p.name: pl.read_parquet(p) for p in out.iterdir()}))
    (expected, all_tables), (metrics, tables) = found
    assert metrics == {n: v if n == "reasons" else pytest.approx(v) for n, v in expected.items()}
    assert tables.keys() == all_tables.keys()
    for name, table in tables.items():
        by = "pair_id" if name == "pairs.parquet" else "response_id"
        assert_frame_equal(table.sort(by), all_tables[name].sort(by))
