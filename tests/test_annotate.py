"""The rules annotator finds what was broken where it was broken, and its scores follow the bands."""

from collections import Counter
from itertools import islice
from random import Random

import pytest

from selfcritique.annotate import KINDS, annotate, balance, band, corrupt, equations
from selfcritique.data.word_problems import generate
from selfcritique.errors import UserError
from selfcritique.records import Problem

PROBLEM = Problem("Tom has 3 pens and buys 4 packs of 2.", "4 * 2 = 8\n3 + 8 = 11\n#### 11", "11", "test")


@pytest.mark.parametrize(
    ("response", "first_error", "score"),
    [
        ("4 * 2 = 8\n3 + 8 = 11\n#### 11", None, 10),  # right throughout
        ("2 * 4 = 8\n8 + 3 = 11\n#### 11", None, 10),  # operands swapped: the same steps
        ("4 * 2 = 9\n3 + 8 = 11\n#### 11", 1, 6),  # wrong product, then an 8 from nowhere: two flaws
        ("4 * 2 = 8\n3 + 8 = 12\n#### 11", 2, 7),  # one flaw, right result
        ("#### 11", None, 8),  # right, nothing to follow
        ("4 * 2 = 9\n3 + 9 = 12\n#### 12", 1, 2),  # wrong from the first step
        ("4 * 2 = 8\n3 + 8 = 12\n#### 12", 2, 4),  # half of the steps hold
        ("4 * 2 = 8\n8 - 3 = 5\n#### 5", 2, 4),  # right arithmetic, not a step of the solution
        ("4 * 2 = 8\n3 + 8 = 11\n#### 12", None, 5),  # all steps hold, the answer does not
        ("4 * 2 = 8\n7 + 8 = 15\n#### 15", 2, 4),  # 7 is not given
        ("no idea", None, 1),
    ],
)
def test_scores_and_first_errors(response: str, first_error: int | None, score: int) -> None:
    found = annotate(PROBLEM, response)
    assert (found.first_error, found.score) == (first_error, score)
    assert found.analysis.endswith(f"Score: {score}")


def test_gsm8k_marks_and_compound_left_sides_are_read() -> None:
    found = equations("She sold 48/2 = <<48/2=24>>24 clips. Then 2 + 3 * 4 = 14. $1,200 / 4 = $300")
    assert [str(e) for e in found] == ["48 / 2 = 24", "2 + 3 * 4 = 14", "1200 / 4 = 300"]
    assert all(e.compute() == e.value for e in found)


@pytest.mark.parametrize("text", ["7" * 50_000, "1," * 25_000, "1+" * 10_000, "9" * 5000 + " + 1 = 2"])
def test_endless_numbers_are_no_equations(text: str) -> None:
    """A model that repeats itself: neither over 4,300 digits, where Python stops, nor quadratic time."""
    assert annotate(PROBLEM, text).score == 1


def test_injected_errors_are_located() -> None:
    """At least 98 % of 1,000 injected errors are found at their step (the last ten of a kind may repeat)."""
    rng, found = Random(0), []
    for problem in generate(3, limit=20):
        corruption = corrupt(problem, rng.choice(KINDS), rng)
        if corruption is not None:
            found.append(annotate(problem, corruption.text).first_error == corruption.step)
        if len(found) == 1000:
            break
    assert sum(found) >= 980, sum(found)


def test_reference_solutions_are_right_throughout() -> None:
    assert {annotate(p, p.reference).score for p in islice(generate(1, limit=20), 500)} == {10}


def test_balance_follows_the_shares() -> None:
    rng = Random(0)
    right, wrong = PROBLEM.reference, "4 * 2 = 9\n3 + 9 = 12\n#### 12"
    marked = [(PROBLEM, "", text, annotate(PROBLEM, text)) for text in [right] * 300 + [wrong] * 100]
    chosen = balance(marked, {"low": 0.5, "top": 0.5}, 0, rng)
    assert Counter(band(item[3].score) for item in chosen) == {"low": 100, "top": 100}
    # shares that limit nothing: a tenth of the 400, as far as there is so much
    few = balance(marked, {"low": 0.1, "high": 0.1}, 0, rng)
    assert Counter(band(item[3].score) for item in few) == {"low": 40}
    with pytest.raises(UserError, match="balance"):
        balance(marked, {"lwo": 1.0}, 0, rng)
    with pytest.raises(UserError, match="nothing to learn"):
        balance([], {"low": 1.0}, 0, rng)
