"""The sets of `selfcritique evaluate`, each from a JSONL file or the hub, as rows of one table.

Columns: those of a problem (`problem_id`, `question`, `reference`, `answer`, `source`, `subject`, `family`,
...), and for sets that are not checked by their final answer `turns`, `references` (one a turn, "" where
there is none) and `choices`. `family` is what results are broken down by.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from selfcritique.answers import extract
from selfcritique.config import EvalSet
from selfcritique.data.sources import json_rows
from selfcritique.data.splits import normalise
from selfcritique.errors import UserError
from selfcritique.records import Problem, Split

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"
# Of MMLU's 57 subjects the five of mathematics: a gain there says nothing of what was retained.
MATHS_SUBJECTS = {
    *("abstract_algebra", "college_mathematics", "elementary_mathematics", "high_school_mathematics"),
    "high_school_statistics",
}
SUPPLEMENT = "交叉学科"  # MathUserEval's 22 interdisciplinary questions, not in its published table of 545


def _checked(name: str, question: str, answer: str, **more: Any) -> Row:
    problem = Problem(question=question.strip(), answer=answer, source=name, **{"reference": "", **more})
    return {"problem_id": problem.id, **vars(problem)}


def _gsm8k(row: Row, number: int) -> Row:
    return _checked("gsm8k", row["question"], extract(row["answer"]) or "", reference=row["answer"])


def _math500(row: Row, number: int) -> Row:
    level = int(str(row["level"])[-1])
    about = {"reference": row["solution"], "family": row["subject"], "difficulty": level}
    return _checked("math500", row["problem"], row["answer"], **about)


def _cmath(row: Row, number: int) -> Row:
    steps = row["reasoning_step"]
    return _checked("cmath", row["input"], row["golden"], family=f"grade {row['grade']}", difficulty=steps)


def _gsm_hard(row: Row, number: int) -> Row:
    return _checked("gsm_hard", row["input"], exact_target(row["target"]))


def exact_target(target: float) -> str:
    """The number that one of GSM-hard's floats stands for: 3244047.0999999996 and, rounded, 5.3333333333."""
    exact = Fraction(repr(target)).limit_denominator(1000)
    return str(exact) if isclose(exact, target, rel_tol=1e-13, abs_tol=5.1e-11) else repr(target)


def _mathusereval(row: Row, number: int) -> Row:
    about = {"source": row["source"], "family": row["category"], "subject": row["subcategory"]}
    return {
        "problem_id": f"{row['source']}/{row['question_id']}",  # question_id alone repeats
        "turns": [row["question"]],
        "references": [row["reference"]],
        **about,
    }


def _mt_bench(row: Row, number: int) -> Row:
    references = row.get("reference") or []
    return {
        "problem_id": str(row["question_id"]),
        "turns": row["turns"],
        "references": [references[i] if i < len(references) else "" for i in range(len(row["turns"]))],
        "source": "mt_bench",
        "family": row["category"],
    }


def _mmlu(row: Row, number: int) -> Row | None:
    subject = row["subject"] if "subject" in row else row["type"]
    if subject in MATHS_SUBJECTS:
        return None
    letter = LETTERS[row["answer"]]
    about = {"question": row["question"], "choices": row["choices"], "answer": letter}
    return {"problem_id": f"{subject}/{number}", "source": "mmlu", "family": subject, **about}


def _text(row: Row, number: int) -> Row | None:
    text = row["text"]
    return {"problem_id": str(number), "source": "text", "question": text} if text.strip() else None


class _Set(NamedTuple):
    read: Callable[[Row, int], Row | None]  # None: leave it out
    hub: str  # name:config:split, '' where only a file will do


SETS = {
    EvalSet.gsm8k: _Set(_gsm8k, "openai/gsm8k:main:test"),
    EvalSet.math500: _Set(_math500, "HuggingFaceH4/MATH-500:default:test"),
    EvalSet.cmath: _Set(_cmath, ""),
    EvalSet.gsm_hard: _Set(_gsm_hard, "reasoning-machines/gsm-hard:default:train"),
    EvalSet.mathusereval: _Set(_mathusereval, ""),
    EvalSet.mt_bench: _Set(_mt_bench, "lighteval/mt-bench:default:train"),
    EvalSet.mt_bench_zh: _Set(_mt_bench, ""),
    EvalSet.mmlu: _Set(_mmlu, "cais/mmlu:all:test"),
    EvalSet.text: _Set(_text, "Salesforce/wikitext:wikitext-2-raw-v1:test"),
}
JUDGED = (EvalSet.mathusereval, EvalSet.mt_bench, EvalSet.mt_bench_zh)


def locate(name: EvalSet, given: str) -> tuple[str, str]:
    """(file, hub address), one of them empty, from what the user gave for the set."""
    file = Path(given).expanduser()
    file = file / "test.jsonl" if file.is_dir() and given else file
    if file.is_file():
        return str(file), ""
    hub = given or SETS[name].hub
    if not hub or (given and (given.count("/") != 1 or given.startswith((".", "~", "/")))):
        there = f"there is no file {given}" if given else "it has no known place on the hub"
        raise UserError(f"{name}: {there}; give its JSONL file: paths.{name}=FILE.")
    return "", hub


def beside(path: str) -> str:
    """MT-Bench keeps reference answers in a file of their own; '' where there is none."""
    folder = Path(path).parent
    names = ("reference_answer_gpt-4.jsonl", "reference_answer/gpt-4.jsonl")
    return next((str(folder / n) for n in names if path and (folder / n).is_file()), "")


def _hub_rows(address: str) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    name, config, split = (*address.split(":"), *("default", "test")[address.count(":") :])[:3]
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:
        raise UserError(
            f"{address} could not be loaded from the hub ({type(error).__name__}); give the set's JSONL "
            "file or another place as owner/name:config:split with paths.SET=..."
        ) from error
    return ((f"{name} row {i}", dict(row)) for i, row in enumerate(rows, 1))


def load_set(
    name: EvalSet, path: str, hub: str, references: str = "", limit: int = 0, supplement: bool = False
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The set's table and counts: rows, those left out, and questions that stand in it twice."""
    rows, left_out = list[Row](), 0
    for number, (where, raw) in enumerate(json_rows(Path(path)) if path else _hub_rows(hub)):
        try:
            row = SETS[name].read(raw, number)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{where}: no row of {name}: {type(error).__name__} {error}.") from None
        if row is None or (row.get("family") == SUPPLEMENT and not supplement):
            left_out += 1
        else:
            rows.append(row)
    twice = [key for key, n in Counter(row["problem_id"] for row in rows).items() if n > 1]
    if twice or not rows:
        found = f"rows that stand in it twice: {', '.join(twice[:5])}" if twice else "no row"
        raise UserError(f"{name}: {path or hub} has {found}; mend the file.")
    if references:
        answers = {str(r["question_id"]): r["choices"][0]["turns"] for _, r in json_rows(Path(references))}
        rows = [{**row, "references": answers.get(row["problem_id"], row["references"])} for row in rows]
    asked = (row.get("turns") or [row["question"], *row.get("choices", [])] for row in rows)
    texts = Counter(normalise(" ".join(parts)) for parts in asked)
    counts = {"rows": len(rows), "left_out": left_out, "repeated": sum(n - 1 for n in texts.values())}
    if limit and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return pl.DataFrame([_COLUMNS | row for row in rows], schema=_SCHEMA), counts


_COLUMNS: Row = {
    "problem_id": "",
    "split": Split.test.value,
    **{name: "" for name in ("question", "reference", "answer", "source", "subject", "family", "register")},
    "difficulty": 0,
    **{name: [] for name in ("turns", "references", "choices")},
}
_SCHEMA = {
    name: pl.List(pl.String) if value == [] else pl.Int64 if value == 0 else pl.String
    for name, value in _COLUMNS.items()
}
