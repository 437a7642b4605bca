"""Labelled sets that critics are measured on: published ones, known by their fields, or a JSONL of one's own.

Published, each a folder with its JSONL files as its authors give them:

    gsm8k_model_solutions   four models on the GSM8K test questions; label: final answer
    realcritic              ten open models on GSM8K and MATH test questions; label: final answer
    mr_gsm8k                wrong solutions to GSM8K questions; label: first wrong step, final answer
    bigbench_mistake        chains of thought on three tasks; label: first wrong step, final answer

Own: `question`, `response`, `answer` or `reference` as for problems; where known `correct` (true or false;
else the checker decides), `score` (1 to 10), `first_error` (step from 1, 0: none) and `steps` (a list).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcritique.annotate import equations
from selfcritique.answers import extract
from selfcritique.config import Source
from selfcritique.data.sources import problem_of
from selfcritique.errors import UserError
from selfcritique.records import Problem

Row = dict[str, Any]


@dataclass(frozen=True)
class Labelled:
    """A response and what is known of it; None where the set does not say."""

    problem: Problem
    text: str
    correct: bool | None  # the final answer
    first_error: int | None = None  # step, from 1; 0: none
    steps: tuple[str, ...] = ()  # of the text, where `first_error` counts them
    score: float | None = None  # a human's, 1 to 10

    @property
    def band_score(self) -> float | None:
        """The human's score, else one of the band (Math-Critique's) that the marked steps imply."""
        if self.score is not None or self.first_error is None or self.correct is None:
            return self.score
        if self.correct:
            return 7.0 if self.first_error else 10.0
        return {0: 5.0, 1: 2.0}.get(self.first_error, 4.0)


def read(path: Path) -> list[Labelled]:
    """All labelled responses of a JSONL file, or of the known ones of a folder, in their order."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise UserError(f"critic-card: there is no labelled set at {path}; give a JSONL file or its folder.")
    fixes = _fixes(path / "label_fixes.json")
    rows: list[Labelled] = []
    for file in files:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                adapter = next((f for key, f in ADAPTERS.items() if key in row), None)
                if adapter is None:
                    break  # another file of the folder
                row["where"], row["file"] = f"{file}:{number}", file.stem
                row["fixed"] = fixes.get((file.name, row.get("idx")))
                rows += adapter(row)
            except (ValueError, KeyError, TypeError) as error:
                what = f"{type(error).__name__} {error}"
                raise UserError(f"{file}:{number}: not the form of this set ({what}).") from None
    if not rows:
        raise UserError(
            f"{path}: no labelled responses; one's own have `question`, `answer` and `response` on each line."
        )
    return rows


def _fixes(path: Path) -> Mapping[tuple[str, int], bool]:
    """(file, idx) -> the right label, where the set's own is known to be wrong."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    return {(row["file"], row["idx"]): row["should_be"] for row in rows}


def _problem(
    question: str, reference: str, answer: str, source: str, subject: str = "", level: int = 0
) -> Problem:
    question, reference, answer = (text.strip() for text in (question, reference, answer))
    return Problem(
        question, reference, answer, source, subject, difficulty=level or len(equations(reference))
    )


def _final_line(text: str) -> str:
    """With the mark that this project's solutions have before the final answer."""
    return re.sub(r"^A: *(?=[^\n]*\Z)", "#### ", text.rstrip(), flags=re.MULTILINE)


def _gsm8k_model_solutions(row: Row) -> Iterator[Labelled]:
    reference = _final_line(row["ground_truth"])
    problem = _problem(row["question"], reference, extract(reference) or "", "gsm8k_model_solutions")
    for made in (value for value in row.values() if isinstance(value, dict)):
        yield Labelled(problem, _final_line(made["solution"]), made["is_correct"])


def _realcritic(row: Row) -> Iterator[Labelled]:
    reference, level = row.get("solution") or row["answer"], row.get("level", "")
    subject, level = row["file"].removesuffix("_test"), int(level.removeprefix("Level ") or 0)
    problem = _problem(row["question"], reference, row["gt"], "realcritic", subject, level)
    text = row["reasoning"].strip()
    if extract(text) is None:  # the label is of `pred`, which its authors read out of the text
        text += f"\n#### {row['pred']}"
    label = row["previous_score"][0] if row["fixed"] is None else row["fixed"]
    yield Labelled(problem, text, label)


def _mr_gsm8k(row: Row) -> Iterator[Labelled]:
    reference, answer = row["ground_truth_solution"], str(row["ground_truth_answer"])
    problem = _problem(row["question"], reference, answer, "mr_gsm8k", row["question_type"])
    right = row["model_output_answer_correctness"] == "correct"
    steps = tuple(row["model_output_steps"])
    yield Labelled(problem, "\n".join(steps), right, row["model_output_solution_first_error_step"], steps)


def _bigbench_mistake(row: Row) -> Iterator[Labelled]:
    problem = _problem(row["input"], "", row["target"], "bigbench_mistake", row["file"], len(row["steps"]))
    mistake, steps = row["mistake_index"], tuple(row["steps"])
    first = 0 if mistake is None else mistake + 1
    yield Labelled(problem, "\n".join(steps), (row["answer"] or "").strip() == row["target"], first, steps)


def _own(row: Row) -> Iterator[Labelled]:
    score, steps = row.get("score"), tuple(row.get("steps", ()))
    if score is not None and not 1 <= score <= 10:
        raise UserError(f"{row['where']}: score {score!r} is not from 1 to 10.")
    problem = problem_of(row, Source.jsonl, row["where"])
    yield Labelled(problem, row["response"], row.get("correct"), row.get("first_error"), steps, score)


# A field that only this set has -> its reader.
ADAPTERS: Mapping[str, Callable[[Row], Iterator[Labelled]]] = {
    "175b_verification": _gsm8k_model_solutions,
    "previous_score": _realcritic,
    "model_output_steps": _mr_gsm8k,
    "mistake_index": _bigbench_mistake,
    "response": _own,
}
