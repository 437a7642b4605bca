"""The benchmarks' own arithmetic; what they measure is no matter of the tests."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import run  # noqa: E402


def test_every_benchmark_has_its_file() -> None:
    assert all((FOLDER / f"{module}.py").is_file() for module in run.BENCHMARKS.values())


def test_ratio_is_of_paired_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 1 to 8 seconds, the baseline 10 each: after the warm-up 10/2 to 10/8, median 10/5."""
    times = iter([x for i in range(1, 9) for x in (float(i), 10.0)])
    monkeypatch.setattr(run, "_seconds", lambda _: next(times))
    found = run.speed_ratio(lambda: None, lambda: None, "peer")
    assert (found.ratio, found.low, found.high) == (2.0, 1.25, 5.0)


def test_table_shows_the_newest_of_each_name() -> None:
    row = {"low": 1.0, "high": 9.0, "unit": "times", "baseline": "peer", "commit": "abcdef123", "load": 0.1}
    results = [{"name": "a", "ratio": r, "date": d, **row} for r, d in ((2.0, "old"), (3.0, "new"))]
    *_, line = run.render(results).splitlines()
    assert line == "| `a` | 3.0 times | 1.0 to 9.0 | peer | `abcdef1` | 0.1 | new |"
    assert len(run.render(results).splitlines()) == 3
