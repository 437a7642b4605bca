"""The answer checker against Math-Verify alone on 1,000 pairs whose reference is no plain number.

Pairs: answers of published models to MATH questions and the labelled pairs of answer_equivalence; the rest,
without a label, are reference answers of MATH-500 against those of neighbours in the same subject.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from checker_int import against_math_verify
from run import Measured

from selfcritique.answer_reader import Num, read
from selfcritique.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
Labelled = tuple[str, str, bool | None]


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        raise UserError(f"the benchmark reads {path}, which is not there")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def labelled() -> Iterator[Labelled]:
    """Every published pair with its label, the known wrong labels put right."""
    fixed = {
        (fix["idx"], fix["sample"]): fix["should_be"] for fix in rows("qwen_math_cot_100/label_fixes.json")
    }
    for row in rows("qwen_math_cot_100/math_cot_100.jsonl"):
        for sample, (predicted, label) in enumerate(zip(row["pred"], row["score"], strict=True)):
            yield row["gt"], predicted, fixed.get((row["idx"], sample), label)
    fixed = {fix["idx"]: fix["should_be"] for fix in rows("realcritic/label_fixes.json")}
    for row in rows("realcritic/math_test.jsonl"):
        yield row["gt"], row["pred"], fixed.get(row["idx"], row["previous_score"][0])
    for row in rows("answer_equivalence/triples.json"):
        if row["kind"] == "pair" and row["flag"] is None:
            yield str(row["gold"]), str(row["pred"]), row["expected"]


def unlabelled() -> Iterator[Labelled]:
    subjects = sorted(rows("math500/math500.jsonl"), key=lambda row: row["subject"])
    answers = [row["answer"] for row in subjects if symbolic(row["answer"])]
    for apart in range(1, len(answers)):
        for gold, predicted in zip(answers, answers[apart:], strict=False):
            yield gold, predicted, None


def symbolic(answer: str) -> bool:
    """Not an integer, decimal or fraction."""
    return not isinstance(read(answer), Num)


def pairs(n: int) -> tuple[list[str], list[str], list[bool | None]]:
    found = [pair for pair in labelled() if symbolic(pair[0])]
    found += islice(unlabelled(), n - len(found))
    golds, predictions, labels = map(list, zip(*found, strict=True))
    return golds, predictions, labels


def measure() -> Measured:
    return against_math_verify(*pairs(1000))
