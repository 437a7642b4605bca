"""The answer checker against Math-Verify alone on 1,000 real pairs of whole numbers, with no new error.

Pairs: final answers of GSM8K test questions and of a published model's solutions to them.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from run import Measured, speed_ratio

from selfcritique.answers import _remembered, compare_many
from selfcritique.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "shared/data/gsm8k_model_solutions/example_model_solutions.jsonl"


def pairs(n: int) -> tuple[list[str], list[str], list[bool]]:
    """Gold, predicted and the published label of the first n solutions that state an answer."""
    if not DATA.is_file():
        raise UserError(f"the benchmark reads {DATA}, which is not there")
    golds, predictions, labels = [], [], []
    for line in DATA.read_text().splitlines():
        row = json.loads(line)
        gold, predicted = (text.rpartition("A:")[2].strip() for text in (row["ground_truth"], solution(row)))
        if predicted and len(golds) < n:
            golds.append(gold)
            predictions.append(predicted)
            labels.append(bool(row["175b_verification"]["is_correct"]))
    return golds, predictions, labels


def solution(row: dict[str, Any]) -> str:
    return str(row["175b_verification"]["solution"])


def against_math_verify(golds: list[str], predictions: list[str], labels: Sequence[bool | None]) -> Measured:
    """Both in one process each; the pairs with a label must show no more errors than Math-Verify's."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def ours() -> list[bool]:
        return [verdict == "correct" for verdict in compare_many(golds, predictions)]

    def theirs() -> list[bool]:
        return [
            verify(parse(delimited(g)), parse(delimited(p))) for g, p in zip(golds, predictions, strict=True)
        ]

    found, peer, n = ours(), theirs(), sum(label is not None for label in labels)
    wrong, peer_wrong = (
        sum(x != y for x, y in zip(verdicts, labels, strict=True) if y is not None)
        for verdicts in (found, peer)
    )
    print(f"verdicts that differ from the label, of {n}: {wrong}, Math-Verify's {peer_wrong}")
    if wrong > peer_wrong:
        raise UserError(f"{wrong} verdicts differ from the labels, {peer_wrong} of Math-Verify's")
    return speed_ratio(ours, theirs, "math-verify 0.9.0", before=forget)


def forget(workers: int = 1) -> None:
    """Fresh graders without what the last round read."""
    _remembered.cache_clear()
    compare_many(["5"] * workers, ["9^{9^{9^{9}}}"] * workers, workers, limit_s=0.05)


def delimited(answer: str) -> str:
    """Math-Verify reads LaTeX between dollars, plain numbers anywhere."""
    return answer if "$" in answer or "\\boxed" in answer or answer.isdecimal() else f"${answer}$"


def measure() -> Measured:
    return against_math_verify(*pairs(1000))
