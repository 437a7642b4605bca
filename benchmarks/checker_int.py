"""The answer checker against Math-Verify alone on 1,000 real pairs of whole numbers, with no new error.

Pairs: final answers of GSM8K test questions and of a published model's solutions to them.
"""

import json
import logging
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


def measure() -> Measured:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    golds, predictions, labels = pairs(1000)

    def ours() -> list[bool]:
        _remembered.cache_clear()
        return [verdict == "correct" for verdict in compare_many(golds, predictions)]

    def theirs() -> list[bool]:
        return [verify(parse(g), parse(p)) for g, p in zip(golds, predictions, strict=True)]

    wrong, peer_wrong = (sum(x != y for x, y in zip(f(), labels, strict=True)) for f in (ours, theirs))
    if wrong > peer_wrong:
        raise UserError(f"{wrong} verdicts differ from the labels, {peer_wrong} of Math-Verify's")
    return speed_ratio(ours, theirs, "math-verify 0.9.0")
