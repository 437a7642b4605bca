"""Generated problems are what they say: solvable, in range, of the size, family and register asked for."""

import operator
import re
from collections import Counter
from fractions import Fraction
from itertools import islice, product
from random import Random

import pytest

from selfcritique.data.word_problems import FAMILIES, MAX_STEPS, MIN_STEPS, REGISTERS, generate, make_problem
from selfcritique.errors import UserError
from selfcritique.records import Problem

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
STEPS = range(MIN_STEPS, MAX_STEPS + 1)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def equations(problem: Problem) -> list[tuple[int, str, int, int]]:
    *lines, answer = problem.reference.splitlines()
    assert answer == f"#### {problem.answer}"
    found = [re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line) for line in lines]
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in found if m] if all(found) else []


@pytest.mark.parametrize(("family", "limit"), list(product(FAMILIES, (20, 60))))
def test_reference_solutions_are_exact_grounded_and_of_the_size_asked_for(family: str, limit: int) -> None:
    """Each step is right, from the question's numbers ("twice" is a 2) and earlier results; the last one
    is the answer."""
    rng = Random(f"{family}/{limit}")
    for steps, register, _ in product(STEPS, REGISTERS, range(5)):
        problem = make_problem(rng, family, register, steps, limit)
        told = numbers(problem.question)
        known = {*told, 2} if "twice" in problem.question else set(told)
        solution = equations(problem)
        assert len(solution) == steps == problem.difficulty, problem
        for a, op, b, value in solution:
            assert OPERATORS[op](a, b) == value and {a, b} <= known, problem
            known.add(value)
        assert problem.answer == str(solution[-1][3])
        assert all(1 <= n <= limit for n in told + numbers(problem.reference)), problem
        assert (problem.family, problem.register, problem.source) == (family, register, "word_problems")


def test_bus_stories_are_what_their_solution_computes() -> None:
    """Solved again from the words alone: who gets on is added, who gets off taken away."""
    for problem in islice(generate(5, ("bus",), limit=40), 200):
        start, *changes = re.findall(r"(\d+) (?:people )?(on a bus|people|get on|get off)", problem.question)
        total = int(start[0]) + sum(int(n) * (1 if what == "get on" else -1) for n, what in changes)
        assert len(changes) == problem.difficulty and str(total) == problem.answer, problem


def test_reading_stories_are_what_their_solution_computes() -> None:
    for problem in islice(generate(5, ("reading",), limit=60), 200):
        pages, days, *more, book = numbers(problem.question)
        assert str(book - pages * days - sum(more)) == problem.answer, problem


def test_registers() -> None:
    """A chatty problem is a plain one with small talk before and after it."""
    for seed in range(30):
        plain = make_problem(Random(seed), "boxes", "plain", 3, 40)
        chatty = make_problem(Random(seed), "boxes", "chatty", 3, 40)
        opener, found, closer = chatty.question.partition(plain.question)
        assert found and opener.strip() and closer.strip() and not numbers(opener + closer)
        assert (chatty.reference, chatty.answer) == (plain.reference, plain.answer)


def test_a_seed_is_a_stream() -> None:
    first, again, other = (list(islice(generate(seed), 300)) for seed in (3, 3, 4))
    assert first == again
    assert len({p.question for p in first} & {p.question for p in other}) < 10
    assert len({p.id for p in first}) == len({(p.question, p.answer) for p in first}) > 290


def test_families_registers_and_steps_are_drawn_evenly() -> None:
    """Of 1,600 draws 200 ± 13 per family, 800 ± 20 per register, 400 ± 17 per number of steps: 5 s.d. off."""
    drawn = list(islice(generate(0), 1600))
    for field, values, s_d in (
        ("family", FAMILIES, 13.2),
        ("register", REGISTERS, 20),
        ("difficulty", STEPS, 17.3),
    ):
        counts = Counter(getattr(p, field) for p in drawn)
        assert set(counts) == set(values)
        assert max(abs(n - 1600 / len(values)) for n in counts.values()) < 5 * s_d, counts


def test_only_what_was_asked_for_is_drawn() -> None:
    drawn = list(islice(generate(0, ("share", "ages"), ("chatty",), (2, 4), 20), 100))
    assert {p.family for p in drawn} == {"share", "ages"}
    assert {(p.register, p.difficulty) for p in drawn} == {("chatty", 2), ("chatty", 4)}


def test_numbers_too_small_for_any_problem_end_with_a_message() -> None:
    """A reading problem of 5 steps: 2 * 2 pages, three times 2 more, and a book of more than these 10."""
    assert make_problem(Random(0), "reading", "plain", 5, 11).answer == "1"
    with pytest.raises(
        UserError, match=r"reading with 5 steps and numbers up to 10; raise data\.mix\[\]\.limit"
    ):
        make_problem(Random(0), "reading", "plain", 5, 10)
