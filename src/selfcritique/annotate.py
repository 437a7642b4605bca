"""The `rules` annotator: reads a response's steps as a careful marker would and writes the critique.

Each equation is checked with exact arithmetic, its operands against what is known so far (the
question's numbers and earlier results), the final answer against the reference. The analysis states
the findings in a fixed form and the score follows from them (bands of Math-Critique, arXiv 2404.02893,
section 3.1): 1-2 wholly wrong, 3-5 partly right method with a wrong result, 6-8 right result with
flawed steps, 9-10 right throughout.
"""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from random import Random

from selfcritique.answers import Verdict, compare, extract
from selfcritique.config import Annotator, AnnotatorConfig, Reference
from selfcritique.critique import parse_score
from selfcritique.errors import UserError
from selfcritique.records import Parse, Problem

# What an analysis can say: the embedded model's tokenizer has each of these as one token.
VOCABULARY = (
    "1 ok\n2 wrong: 3 is not given\n3 wrong: not a step to the answer\n4 wrong: no value\n",
    "Response\nReference 1\nCheck\nScore\nAnswer none, reference 1: same\nAnswer 1, reference 1: different",
    "Result same\nScore: 10",
)

# Bounded, so that runs of digits or sums without end cost a model's text nothing more than their length.
_NUMBER = r"(?<!\d)\d[\d,]{0,1000}(?:\.\d{1,1000})?(?!\d)"
_EQUATION = re.compile(rf"(?<!\d,)({_NUMBER}(?:\s*[-+*/x×÷]\s*{_NUMBER}){{1,40}})\s*=\s*\$?({_NUMBER})")
_WORDS = {
    "half": 2, "twice": 2, "double": 2, "pair": 2, "triple": 3, "dozen": 12, "week": 7,
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "percent": 100, "%": 100, "hour": 60, "third": 3, "quarter": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Equation:
    """`left = value` as written: operands and operators of `left` in order."""

    operands: tuple[Fraction, ...]
    operators: tuple[str, ...]
    value: Fraction

    def compute(self) -> Fraction | None:
        """Exact value of the left side by the usual precedence; None on division by zero."""
        terms = [self.operands[0]]
        for op, n in zip(self.operators, self.operands[1:], strict=True):
            if op == "*":
                terms[-1] *= n
            elif op == "/":
                if n == 0:
                    return None
                terms[-1] /= n
            else:
                terms.append(n if op == "+" else -n)
        return sum(terms, Fraction(0))

    def unordered(self) -> tuple[object, ...]:
        """The same for a + b and b + a."""
        swaps = set(self.operators) in ({"+"}, {"*"})
        return tuple(sorted(self.operands) if swaps else self.operands), self.operators, self.value

    def __str__(self) -> str:
        left = str(self.operands[0])
        for op, n in zip(self.operators, self.operands[1:], strict=True):
            left += f" {op} {n}"
        return f"{left} = {self.value}"


@dataclass(frozen=True)
class Annotation:
    """A marked response. `first_error` is the 1-based step of the first flaw, None if there is none."""

    score: int
    analysis: str
    first_error: int | None
    n_steps: int
    correct: bool


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _unmarked(text: str) -> str:
    """Without GSM8K's calculator marks, which say each equation twice."""
    return re.sub(r"<<[^<>]*>>", "", text)


def equations(text: str) -> list[Equation]:
    """The equations of a solution in order of appearance."""
    found = []
    for left, value in _EQUATION.findall(_unmarked(text)):
        operands = tuple(map(_fraction, re.findall(_NUMBER, left)))
        operators = tuple(re.sub(r"[^-+*/x×÷]", "", left).translate(str.maketrans("x×÷", "**/")))
        found.append(Equation(operands, operators, _fraction(value)))
    return found


def known_numbers(question: str) -> set[Fraction]:
    """Numbers a solver may use without deriving them: those written in the question, words included."""
    numbers = {_fraction(n) for n in re.findall(_NUMBER, question)}
    words = set(re.findall(r"[a-z]+|%", question.lower()))
    return numbers | {Fraction(n) for w, n in _WORDS.items() if w in words or w + "s" in words}


def check_steps(problem: Problem, response: str, correct: bool) -> list[str | None]:
    """For each equation None if it holds, else what is wrong with it.

    A step with right arithmetic on known operands can still be the wrong step. Where the result is
    wrong and nothing else is, the first step that the reference solution does not take is named.
    """
    known = known_numbers(problem.question)
    flaws: list[str | None] = []
    steps = equations(response)
    for step in steps:
        value = step.compute()
        stranger = next((n for n in step.operands if n not in known), None)
        if stranger is not None:
            flaws.append(f"{stranger} is not given")
        elif value is None:
            flaws.append("no value")
        else:
            flaws.append(None if value == step.value else str(replace(step, value=value)))
        known.add(step.value)
    if not correct and not any(flaws):
        taken = {step.unordered() for step in equations(problem.reference)}
        astray = next((i for i, s in enumerate(steps) if taken and s.unordered() not in taken), None)
        if astray is not None:
            flaws[astray] = "not a step to the answer"
    return flaws


def score_of(flaws: list[str | None], correct: bool) -> int:
    """Score from the findings, within the bands of the module's docstring."""
    wrong = [i for i, flaw in enumerate(flaws) if flaw is not None]
    if not flaws:
        return 8 if correct else 1  # nothing to follow
    if correct:
        return {0: 10, 1: 7}.get(len(wrong), 6)
    if not wrong:
        return 5
    return 2 if wrong[0] == 0 else 3 if 2 * wrong[0] < len(flaws) else 4


def annotate(problem: Problem, response: str) -> Annotation:
    """Mark one response against its problem's reference."""
    final = extract(response)
    correct = compare(problem.answer, final) is Verdict.correct
    flaws = check_steps(problem, response, correct)
    # The comparison comes first: whoever knows the result is wrong looks for the step that made it so. It
    # stands once more before the score, so that the score follows from what is next to it.
    result = "same" if correct else "different"
    compared = f"Answer {final or 'none'}, reference {problem.answer}: {result}"
    score = score_of(flaws, correct)
    analysis = "\n".join([compared, *_step_lines(flaws), f"Result {result}", f"Score: {score}"])
    first = next((i for i, flaw in enumerate(flaws, 1) if flaw is not None), None)
    return Annotation(score, analysis, first, len(flaws), correct)


def _step_lines(flaws: Sequence[str | None]) -> list[str]:
    return [f"{i} ok" if flaw is None else f"{i} wrong: {flaw}" for i, flaw in enumerate(flaws, 1)]


def judge(problem: Problem, response: str, reference: Reference) -> tuple[int, str]:
    """Score and critique by the rules as a critic that sees so much of the reference.

    Without one, a result is taken for right if it has steps and every one holds.
    """
    if reference is not Reference.none:
        shown = problem if reference is Reference.solution else replace(problem, reference="")
        found = annotate(shown, response)
        return found.score, found.analysis
    flaws = check_steps(problem, response, correct=True)
    return score_of(flaws, correct=bool(flaws) and not any(flaws)), "\n".join(_step_lines(flaws))


def guess(response: str, rng: Random) -> tuple[int, str]:
    """Score and critique by chance: any score, any step or none wrong."""
    step = rng.randint(0, len(equations(response)))
    return rng.randint(1, 10), f"{step} wrong" if step else "1 ok"


Marker = Callable[[Problem, str, str], Annotation | None]
"""(problem, response id, response) -> its annotation, or None where there is none."""


def annotator(config: AnnotatorConfig) -> Marker:
    """The annotator that `annotator=...` names."""
    if config.kind is Annotator.file:
        return _from_file(Path(config.path))
    return lambda problem, _, response: annotate(problem, response)


def _from_file(path: Path) -> Marker:
    """Human scores by response id; the analysis is theirs where they wrote one, else the rules' one."""
    if not path.is_file():
        raise UserError(f"annotator.path: there is no file {path}; give a CSV with response_id and score.")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"response_id", "score"} <= rows[0].keys():
        raise UserError(
            f"{path}: expected columns response_id and score, found {', '.join(rows[0]) if rows else 'none'}."
        )
    scores: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(rows, 2):
        if not (row["score"] or "").strip():
            continue  # a sheet may be marked in part
        if row["score"].strip() not in {str(n) for n in range(1, 11)}:
            raise UserError(f"{path}:{number}: score {row['score']!r} is not a whole number from 1 to 10.")
        scores[row["response_id"]] = int(row["score"]), (row.get("analysis") or "").strip()

    def mark(problem: Problem, response_id: str, response: str) -> Annotation | None:
        if response_id not in scores:
            return None
        score, analysis = scores[response_id]
        found = annotate(problem, response)
        body = analysis or found.analysis.rpartition("\n")[0]
        return replace(found, score=score, analysis=f"{body}\nScore: {score}")

    return mark


def from_teacher(problem: Problem, response: str, critique: str, truncated: bool) -> Annotation | None:
    """A teacher's critique as a mark, its end in the taught form; None without a whole readable score."""
    score, parse = parse_score(critique, truncated)
    if score is None or not score.is_integer():
        return None
    body = critique.rstrip() if parse is Parse.ok else f"{critique.rstrip()}\nScore: {int(score)}"
    return replace(annotate(problem, response), score=int(score), analysis=body)


@dataclass(frozen=True)
class Corruption:
    """A reference solution with one known error at `step` (1-based; None: only the final answer)."""

    text: str
    step: int | None
    kind: str


KINDS = ("value", "operand", "operator", "final", "broken")


def corrupt(problem: Problem, kind: str, rng: Random) -> Corruption | None:
    """One error put into the reference solution; what follows from it follows. None where it does not fit.

    value: a wrong result; operand: a number from nowhere; operator: another operation, rightly computed;
    final: only the final answer; broken: a wrong result that the rest ignores, so that the answer is right.
    """
    reference = _unmarked(problem.reference)
    matches = list(_EQUATION.finditer(reference))
    steps = equations(reference)
    if not matches or len(matches) != len(steps):
        return None
    head, mark, final = reference.rpartition("####")
    if kind == "final":
        if not mark or not final.strip().isdigit():
            return None
        return Corruption(f"{head}#### {_other(int(final), rng)}", None, kind)
    k = rng.randrange(len(steps))
    step = _wrong_step(steps[k], kind, known_numbers(problem.question) | {s.value for s in steps[:k]}, rng)
    if step is None or step.value == steps[k].value:
        return None
    changed = {} if kind == "broken" else {steps[k].value: step.value}
    text, end = reference[: matches[k].start()] + str(step), matches[k].end()
    for match, later in zip(matches[k + 1 :], steps[k + 1 :], strict=True):
        text += _renumber(reference[end : match.start()], changed)
        moved = _computed(tuple(changed.get(n, n) for n in later.operands), later.operators)
        if moved is None:
            return None
        if moved.value != later.value:
            changed[later.value] = moved.value
        text, end = text + str(moved), match.end()
    return Corruption(text + _renumber(reference[end:], changed), k + 1, kind)


def _wrong_step(step: Equation, kind: str, known: set[Fraction], rng: Random) -> Equation | None:
    if step.value.denominator != 1:
        return None
    if kind in ("value", "broken"):
        return replace(step, value=Fraction(_other(int(step.value), rng)))
    operands, operators = list(step.operands), list(step.operators)
    if kind == "operand":
        strangers = [n for n in range(1, 2 * int(max(operands)) + 3) if n not in known]
        operands[rng.randrange(len(operands))] = Fraction(rng.choice(strangers))
    else:
        i = rng.randrange(len(operators))
        operators[i] = {"+": "-", "-": "+", "*": "+", "/": "-"}[operators[i]]
    return _computed(tuple(operands), tuple(operators))


def _computed(operands: tuple[Fraction, ...], operators: tuple[str, ...]) -> Equation | None:
    """The equation with its right value; None where that is no natural number."""
    value = Equation(operands, operators, Fraction(0)).compute()
    if value is None or value < 0 or value.denominator != 1:
        return None
    return Equation(operands, operators, value)


def _other(value: int, rng: Random) -> int:
    """A wrong number near the right one, as slips are."""
    return rng.choice([n for n in range(max(0, value - 3), value + 4) if n != value])


def _renumber(text: str, changed: Mapping[Fraction, Fraction]) -> str:
    return re.sub(_NUMBER, lambda m: str(changed.get(_fraction(m[0]), m[0])), text)


def corruptions(right: Sequence[tuple[Problem, str]], rate: float, rng: Random) -> list[tuple[Problem, str]]:
    """`rate` corrupted copies of each right (problem, response), each with one error.

    Half of them have nothing wrong but the final answer: a critic that overlooks the wrong step must still
    score by the result, and sampled answers hardly ever teach it that.
    """
    made = []
    for problem, response in right:
        solved = replace(problem, reference=response)
        for _ in range(int(rate) + (rng.random() < rate % 1)):
            found = corrupt(solved, "final" if rng.random() < 0.5 else rng.choice(KINDS), rng)
            if found is not None:
                made.append((problem, found.text))
    return made


def answers_only(problems: Sequence[Problem], rate: float, rng: Random) -> list[tuple[Problem, str]]:
    """`rate` responses per problem that only state an answer: half the time its own, else another's."""
    made = []
    for problem in problems:
        for _ in range(int(rate) + (rng.random() < rate % 1)):
            other = problem if rng.random() < 0.5 else rng.choice(problems)
            made.append((problem, f"#### {other.answer}"))
    return made


def comparisons(largest: int, n: int, rng: Random) -> list[tuple[str, str]]:
    """`n` drills, (prompt, response): pairs of numbers to copy and compare, half of them the same."""
    drills = []
    numbers = range(1, largest + 1)
    for _ in range(n):
        pairs = [(a, a if rng.random() < 0.5 else rng.choice(numbers)) for a in rng.choices(numbers, k=8)]
        lines = [f"Answer {a}, reference {b}: {'same' if a == b else 'different'}" for a, b in pairs]
        drills.append(("Compare\n" + "\n".join(f"{a} {b}" for a, b in pairs), "\n".join(lines)))
    return drills


BANDS = {"low": (1, 2), "mid": (3, 5), "high": (6, 8), "top": (9, 10)}
Marked = tuple[Problem, str, str, Annotation]


def band(score: float) -> str:
    return next(name for name, (_, high) in BANDS.items() if score <= high)


def balance(marked: Sequence[Marked], shares: Mapping[str, float], limit: int, rng: Random) -> list[Marked]:
    """A seeded draw whose bands have the given shares, as large as the scarcest band allows (or `limit`).

    A band with a share of at most a tenth gives what it has and never limits the others. No shares:
    everything, in shuffled order.
    """
    groups: dict[str, list[Marked]] = {name: [] for name in BANDS}
    for item in marked:
        groups[band(item[3].score)].append(item)
    unknown = set(shares) - set(BANDS)
    if unknown or any(share < 0 for share in shares.values()):
        raise UserError(f"critic.data.balance: shares of {', '.join(BANDS)} expected, found {dict(shares)}.")
    for group in groups.values():
        rng.shuffle(group)
    wanted = {name: share for name, share in shares.items() if share > 0}
    if wanted:
        limits = [len(groups[name]) / share for name, share in wanted.items() if share > 0.1]
        total = min(limits, default=float(len(marked)))
        chosen = [item for name, share in wanted.items() for item in groups[name][: round(total * share)]]
    else:
        chosen = [item for group in groups.values() for item in group]
    rng.shuffle(chosen)
    if not chosen:
        counts = {name: len(group) for name, group in groups.items()}
        raise UserError(
            f"The critic has nothing to learn from: marked responses by band {counts}; see critic.data."
        )
    return chosen[:limit] if limit else chosen
