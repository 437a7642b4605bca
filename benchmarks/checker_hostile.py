"""A batch with 1 % hostile answers against what it may take: benign time + hostile × limit / workers.

A ratio of 1 or more keeps the bound. Benign: 990 of `checker_symbolic`'s pairs; hostile: ten answers of
tests/hostile.py.
"""

import sys
from pathlib import Path
from random import Random
from statistics import median

from checker_int import forget
from checker_symbolic import pairs
from run import ROUNDS, Measured, _seconds

from selfcritique.answers import LIMIT_S, compare_many

WORKERS = 2


def measure() -> Measured:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from hostile import HOSTILE

    golds, predictions, _ = pairs(990)
    benign = list(zip(golds, predictions, strict=True))
    hostile = Random(0).sample(sorted(HOSTILE.values()), 10)
    mixed = benign + hostile
    Random(0).shuffle(mixed)

    def run(batch: list[tuple[str, str]]) -> float:
        forget(WORKERS)
        return _seconds(lambda: compare_many([g for g, _ in batch], [p for _, p in batch], workers=WORKERS))

    allowed = len(hostile) * LIMIT_S / WORKERS
    rounds = [(run(mixed), run(benign) + allowed) for _ in range(ROUNDS + 1)][1:]
    ratios = [bound / taken for taken, bound in rounds]
    return Measured(
        median(ratios), min(ratios), max(ratios), "of the time allowed per time taken", "the bound"
    )
