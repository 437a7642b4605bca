"""The benchmarks' own arithmetic and the parity they rest on; what they measure is no matter of the tests."""

import math
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from selfcritique.errors import UserError
from selfcritique.train.batch import TokenPair

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import run  # noqa: E402
import training  # noqa: E402


def test_every_benchmark_has_its_file() -> None:
    assert all((FOLDER / f"{module}.py").is_file() for module, *_ in run.BENCHMARKS.values())


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
    assert line == "| `a` | 3 times | 1 to 9 | peer | `abcdef1` | 0.1 | new |"
    assert len(run.render(results).splitlines()) == 3


# ---- training ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TokenPair]]:
    model = tmp_path_factory.mktemp("tiny") / "model"
    return model, training.make_pairs(3, training.make_model("tiny", model))


def test_the_page_has_one_table_to_render() -> None:
    assert (FOLDER / "README.md").read_text().count("| name |") == 1


def test_pairs_are_log_normal_around_the_medians() -> None:
    """Of 600 draws the median is within 3 * 1.25 * 0.4 / sqrt(600) = 6 % of its own in the logarithm."""
    pairs = training.make_pairs(600, 50)
    lengths = [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]
    for side, expected in enumerate(training.MEDIANS):
        logs = [math.log(each[side]) for each in lengths]
        mean = sum(logs) / len(logs)
        spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
        assert median(logs) == pytest.approx(math.log(expected), abs=0.06)
        assert spread == pytest.approx(training.SIGMA, abs=0.04)
    assert pairs == training.make_pairs(600, 50) != training.make_pairs(600, 50, seed=1)
    for pair in pairs[:20]:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert ids[-1] == training.EOS and training.EOS not in ids[:-1] and max(ids) < 50


@pytest.mark.parametrize(("task", "setting"), [(t, s) for t in training.TRL for s in training.TRL[t]])
def test_both_sides_compute_the_same(task: str, setting: str, tiny: Any, tmp_path: Path) -> None:
    training.check_parity(task, training.TRL[task][setting], *tiny, tmp_path)


@pytest.mark.parametrize(
    ("task", "wrong", "what"),
    [("dpo", {"beta": 0.2}, "gradients of"), ("sft", {"loss_type": "dft"}, "losses")],
)
def test_parity_notices_another_loss(
    task: str, wrong: dict[str, Any], what: str, tiny: Any, tmp_path: Path
) -> None:
    """At its start DPO's loss does not depend on beta, its gradient does; DFT weighs SFT's tokens."""
    with pytest.raises(UserError, match=f"the {what}"):
        training.check_parity(task, wrong, *tiny, tmp_path)


def test_ours_takes_its_turns_in_its_own_process(tmp_path: Path) -> None:
    """A turn is one epoch; memory is known from the second on; a multiplication and addition are 2 FLOPs."""
    model = tmp_path / "model"
    vocabulary = training.make_model("tiny", model)
    job = training.Job("ours", "sft", 6, 3, 3, str(model), vocabulary, str(tmp_path / "out"), count=True)
    worker = training.Worker(job)
    try:
        assert worker.answer() == {}
        for _ in range(3):
            worker.turn()
    finally:
        worker.close()
    first, second, third = worker.turns
    assert "peak" not in first and second["peak"] > 0 and "profile" not in second
    assert sum(third["profile"].values()) == pytest.approx(100, abs=1)
    assert third["profile"]["matrix products"] > 0

    pairs = training.make_pairs(6, vocabulary)
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) for p in pairs)
    heads = sum(len(p.chosen_ids) for p in pairs)
    backbone = 3 * (4 * 96 * 96 + 3 * 96 * 256)
    exact = 6 * (backbone * tokens + 96 * vocabulary * heads)  # forward, and twice as much backward
    assert "flops" not in first and exact <= second["flops"] < 1.25 * exact  # padding counts too


def test_trl_takes_its_turns_in_its_own_process(tmp_path: Path) -> None:
    model = tmp_path / "model"
    vocabulary = training.make_model("tiny", model)
    job = training.Job("best", "dpo", 4, 2, 1, str(model), vocabulary, str(tmp_path / "out"))
    worker = training.Worker(job)
    try:
        assert worker.answer() == {}
        for _ in range(2):
            worker.turn()
    finally:
        worker.close()
    assert [set(turn) for turn in worker.turns] == [{"seconds"}, {"seconds", "peak"}]
    assert worker.turns[1]["peak"] > 0


@pytest.mark.parametrize(("what", "ratio", "rounds"), [("step", 2.0, 7), ("memory", 0.25, 1)])
def test_measure_checks_parity_and_then_takes_turns(
    what: str, ratio: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours takes half the time and a quarter of the memory; a warm-up turn comes first."""
    said: list[str] = []

    class Fake:
        def __init__(self, job: training.Job) -> None:
            self.side, self.turns = job.side, []

        def answer(self) -> None:
            said.append(self.side)

        def turn(self) -> None:
            said.append(f"turn of {self.side}")
            peak = {"peak": 2**20 if self.side == "ours" else 2**22} if self.turns else {}
            self.turns.append(peak)

        def close(self) -> None:
            said.append(f"end of {self.side}")

    monkeypatch.setattr(training, "Worker", Fake)
    monkeypatch.setattr(training, "make_model", lambda *_: 50)
    seconds = {"ours": 1.0, "best": 2.0}
    monkeypatch.setattr(run, "_seconds", lambda turn: turn() or seconds[turn.__self__.side])
    found = training.measure(what, "dpo", "best", "tiny")
    assert (found.ratio, found.about["peak_mb"], found.about["batch"]) == (ratio, [1, 4], 8)
    both = ["turn of ours", "turn of best"]
    before = ["parity", "end of parity", "ours", "best"]
    assert said == [*before, *both * (1 + rounds), "end of ours", "end of best"]


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    job = training.Job("ours", "sft", 1, 1, 1, str(tmp_path / "none"), 50, str(tmp_path / "out"))
    worker = training.Worker(job)
    with pytest.raises(UserError, match="none"):
        worker.answer()
    worker.close()


def test_profile_is_shared_out_by_kind() -> None:
    times = {"aten::mm": 60, "aten::mul_": 20, "aten::copy_": 10, "aten::unheard_of": 10}
    events = [SimpleNamespace(key=key, self_cpu_time_total=time) for key, time in times.items()]
    found = {kind: share for kind, share in training.shares(events).items() if share}
    assert found == {"matrix products": 60, "elementwise": 20, "moving memory": 10, "other": 10}


def test_peak_fraction_is_of_the_rounds_with_nothing_else() -> None:
    """10 FLOP, counted in the second turn, in 2 and 4 s against peaks of 10 and 5 FLOP/s: 0.5 and 0.5."""
    seconds = [(1.0, 1.0), (100.0, 1.0), (100.0, 1.0), (2.0, 10.0), (4.0, 5.0)]
    turns = iter([{"seconds": s, "peak_flops": p} for s, p in seconds])
    worker = SimpleNamespace(turns=[], answer=lambda: None, close=lambda: None)
    extra = {training.COUNTED: {"flops": 10}, training.PROFILED: {"profile": {}}}
    worker.turn = lambda: worker.turns.append(next(turns) | extra.get(len(worker.turns), {}))
    found = training._peak_fraction(worker, 2, {})
    assert (found.ratio, found.low, found.high) == (0.5, 0.5, 0.5)
