"""Sweeps: what is shared runs once, a killed point costs itself alone, a rerun does what is missing."""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl
import pytest
from hydra.core.utils import JobReturn, JobStatus

from runs import TINY, Finished, Watch, completed, compose, events, read_json, run
from selfcritique.artifacts import Store
from selfcritique.compare import settings, settings_markdown
from selfcritique.errors import UserError
from selfcritique.pipeline import build
from selfcritique.sweep import Point, _run, blocked, isolated, reports_ended, schedule, threads_per_job

LAMS = ("0.5", "1", "1.5")
SWEEP = ("-m", *TINY, f"dpo.loss.lam={','.join(LAMS)}")
UPSTREAM = ("problems", "solutions", "base", "critic_pool")
OWN = ("dpo", "test_dpo", "eval_dpo")  # what no two points share


def keys(*words: str) -> dict[str, str]:
    """STAGE/KEY of every node by its name."""
    nodes = build(compose(*TINY, *words)).nodes.items()
    return {name: f"{node.stage.name}/{node.key}" for name, node in nodes}


def made(log: Path) -> Counter[str]:
    """STAGE/KEY -> how often it was finished, by the renames that publish."""
    renamed = (line.split()[1] for line in events(log, "rename"))
    return Counter(name.removesuffix(".partial") for name in renamed if name.endswith(".partial"))


# ---- the schedule --------------------------------------------------------------------------------------


def points(*settings: str) -> list[Point]:
    return [
        Point(i, (words,), {}, Path(str(i)), build(compose(*TINY, *words.split())))
        for i, words in enumerate(settings)
    ]


def test_jobs_are_by_who_needs_what(tmp_path: Path) -> None:
    """Two seeds × two λ: the problems for all, the rest up to the reference for a seed, DPO for one point."""
    grid = points(*(f"seed={s} dpo.loss.lam={lam}" for s in (0, 1) for lam in (0.5, 1)))
    jobs = schedule(grid, Store(tmp_path))
    assert [sorted(job.points) for job in jobs] == [[0, 1, 2, 3], [0, 1], [2, 3], [0], [1], [2], [3]]
    assert [job.after for job in jobs] == [(), (0,), (0,), (0, 1), (0, 1), (0, 2), (0, 2)]
    assert "until='solutions'" in jobs[0].words  # what only leads there is left out
    (until,) = (word for word in jobs[1].words if word.startswith("until="))
    assert set(until[7:-1].split(",")) == {"gate", "regate", "reference", "eval_base", "eval_rft"}
    assert all(job.words == grid[i].words for i, job in enumerate(jobs[3:]))


def test_what_stands_needs_no_job(tmp_path: Path) -> None:
    grid, store = points("dpo.loss.lam=0.5", "dpo.loss.lam=1"), Store(tmp_path)
    node = grid[0].graph.nodes["problems"]
    store.build(node.stage.name, 1, node.key, {}, {}, lambda out: {})
    upstream, *own = schedule(grid[:2], store)
    assert "problems" not in upstream.words[-3] and [job.after for job in own] == [(0,), (0,)]
    assert [job.after for job in schedule(points("seed=0"), store)] == [()]  # alone, it shares with none
    assert blocked(own[0], {}) == blocked(own[0], {0: ""}) == "" and blocked(own[0], {0: "why"}) == "why"


@pytest.mark.parametrize(
    ("launcher", "jobs", "cores", "threads"),
    [
        ({}, 4, 8, 8),  # one after the other
        ({"n_jobs": 4}, 12, 8, 2),
        ({"n_jobs": 4}, 1, 8, 8),  # what all wait for has the machine
        ({"n_jobs": -1}, 12, 8, 1),
        ({"n_jobs": -2}, 3, 8, 2),
        ({"n_jobs": 16}, 12, 8, 1),
        ({"submitit_folder": "x", "cpus_per_task": 4}, 12, 8, 4),
        ({"submitit_folder": "x", "cpus_per_task": None}, 12, 8, 1),
        ({"num_cpus": 3, "num_gpus": 0}, 12, 8, 3),
    ],
)
def test_points_at_once_have_a_core_for_each_thread(
    launcher: dict[str, int], jobs: int, cores: int, threads: int
) -> None:
    assert threads_per_job(launcher, jobs, cores) == threads


def throw(error: Exception) -> NoReturn:
    raise error


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda: None, ""),
        (lambda: throw(UserError("the disk is full")), "the disk is full"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
    ],
)
def test_a_report_goes_on_beside_the_next_points(ends: Callable[[], None], said: str, tmp_path: Path) -> None:
    """`isolated` returns once the results are there, while the report still waits; its end is told later."""

    def work(go_on: Callable[[], None]) -> None:
        go_on()
        while not (tmp_path / "returned").exists():
            time.sleep(0.01)
        (tmp_path / "report").write_text(str(os.nice(0)))
        ends()

    isolated(work, tmp_path)
    assert not (tmp_path / "report").exists()
    (tmp_path / "returned").touch()
    assert reports_ended() == {tmp_path: said} and reports_ended() == {}
    assert (tmp_path / "report").read_text() == "19"
    with pytest.raises(UserError, match=said or "again"):  # without `go_on`
        isolated(lambda _: (ends(), throw(UserError("again"))), tmp_path)


def test_a_report_that_fails_is_its_points_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again by its folder, of which a part may be a link (outputs on another disk)."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)

    class Launcher:
        def launch(self, batch: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
            full = UserError("the disk is full")
            isolated(lambda go_on: (go_on(), throw(full)), tmp_path / "outputs" / "0")
            return [JobReturn(status=JobStatus.COMPLETED) for _ in batch]

    (one,) = points("seed=0")
    point = replace(one, folder=Path("outputs/0"))
    assert _run([point], Launcher(), {}) == {point.number: "the disk is full"}


# ---- real ones -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A sweep whose second point is killed as it publishes its policy."""
    folder = tmp_path_factory.mktemp("sweep")
    at = f"rename {keys('dpo.loss.lam=1')['dpo']}.partial #1"
    return run(folder, *SWEEP, hook=Watch(folder / "store", folder / "log", at))


def test_a_killed_point_is_reported_and_the_others_finish(killed: Finished) -> None:
    assert "1 of 3 points did not finish" in killed.message and "killed by SIGKILL" in killed.message
    assert "1 (dpo.loss.lam=1)" in killed.message
    told = read_json(killed.out / "sweep.json")
    assert [(p["number"], p["label"]["dpo.loss.lam"], p["error"]) for p in told["points"]] == [
        (0, "0.5", ""), (1, "1", "killed by SIGKILL"), (2, "1.5", "")
    ]  # fmt: skip
    assert sorted(p.parent.name for p in killed.out.glob("*/summary.json")) == ["0", "2"]
    assert [row["setting"]["dpo.loss.lam"] for row in told["settings"]] == ["0.5", "1.5"]
    assert (killed.out / "sweep.md").read_text().strip() in killed.stdout


def test_what_points_share_runs_once(killed: Finished) -> None:
    expected = {key for lam in LAMS for key in keys(f"dpo.loss.lam={lam}").values()}
    lost = keys("dpo.loss.lam=1")
    found = made(killed.folder / "log")
    assert set(found) == expected - {lost[name] for name in OWN[1:]}  # the kill came at its rename
    assert set(found.values()) == {1}


def test_a_rerun_does_only_what_is_missing(killed: Finished, tmp_path: Path) -> None:
    again = completed(tmp_path, *SWEEP, f"store={killed.store}", hook=Watch(killed.store, tmp_path / "log"))
    lost = keys("dpo.loss.lam=1")
    assert made(tmp_path / "log") == Counter(lost[name] for name in OWN)
    assert not events(tmp_path / "log", "step")  # its training was done
    assert "3 of 3 points finished" in again.stdout
    assert not (again.out / "shared").exists()


@dataclass(frozen=True)
class KillSweep(Watch):
    """As `Watch`, but the whole sweep is killed, as a point of it publishes the nth artifact of `path`."""

    path: str = ""
    nth: int = 1

    def __call__(self) -> None:
        sweep = os.getpid()
        super().__call__()

        def audit(name: str, arguments: tuple[object, ...]) -> None:
            published = name == "os.rename" and str(arguments[0]).endswith(".partial")
            found = made(self.log) if published and self.path in str(arguments[0]) else Counter[str]()
            if sum(n for key, n in found.items() if self.path in f"/{key}") == self.nth:
                os.kill(sweep, signal.SIGKILL)
                time.sleep(60)  # it dies with its parent

        sys.addaudithook(audit)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ("-m", *TINY, "dpo.loss.lam=0.5,1", "until=dpo")
    first, second, store = tmp_path / "first", tmp_path / "second", tmp_path / "store"
    path = keys("dpo.loss.lam=0.5")["reference"]
    hook = KillSweep(store, tmp_path / "log", path=path)
    assert run(first, *words, f"store={store}", hook=hook).code == -signal.SIGKILL
    before = {f"{row['stage']}/{row['key']}" for row in Store(store).ls() if not row["partial"]}
    completed(second, *words, f"store={store}", hook=Watch(store, tmp_path / "log2"))
    wanted = {key for lam in ("0.5", "1") for name, key in keys(f"dpo.loss.lam={lam}").items()
              if not name.startswith(("test_", "eval_"))}  # fmt: skip
    assert before and made(tmp_path / "log2") == Counter(wanted - before)


def test_two_sweeps_at_once_share_one_store(tmp_path: Path) -> None:
    words = ("-m", *TINY, f"store={tmp_path / 'store'}", "until=critic_pool")

    def watch(name: str) -> Watch:
        return Watch(tmp_path / "store", tmp_path / f"{name}.log")

    with ThreadPoolExecutor() as pool:
        both = [
            pool.submit(completed, tmp_path / name, *words, seeds, hook=watch(name))
            for name, seeds in (("a", "seed=0,1"), ("b", "seed=1,0"))
        ]
    assert all("2 of 2 points finished" in sweep.result().stdout for sweep in both)
    found = made(tmp_path / "a.log") + made(tmp_path / "b.log")
    assert found == {key: 1 for s in (0, 1) for name, key in keys(f"seed={s}").items() if name in UPSTREAM}


# ---- the table -----------------------------------------------------------------------------------------


def finished(folder: Path, seed: int, **models: int) -> Path:
    """A run folder and its evaluations in folder/store, as much of them as the table reads.

    models: how many of 40 problems each answers right.
    """
    out = folder / f"run{len(list(folder.glob('run*')))}"
    out.mkdir()
    for name, right in models.items():
        stored = folder / "store" / "evaluate" / f"{out.name}{name}"
        stored.mkdir(parents=True)
        pl.DataFrame({
            "problem_id": [f"{i:04}" for i in range(40)], "source": "s", "kind": "greedy", "sample": 0,
            "verdict": ["correct" if i < right else "incorrect" for i in range(40)], "answer": "1",
            "truncated": False,
        }).write_parquet(stored / "eval.parquet")  # fmt: skip
    summary = {"experiment": "x", "seed": seed, "models": dict.fromkeys(models),
               "selection": {"yield": models["dpo"] / 100, "precision": 0.5}}  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary))
    lineage = {f"eval_{name}": {"stage": "evaluate", "key": f"{out.name}{name}"} for name in models}
    (out / "lineage.json").write_text(json.dumps(lineage))
    return out


def test_settings_are_means_over_seeds_against_the_best(tmp_path: Path) -> None:
    """a: 30 and 34 of 40 right, mean 0.8; b: 10 of 40 under both seeds."""
    some = [("a", 0, 30), ("a", 1, 34), ("b", 0, 10), ("b", 1, 10)]
    runs = [(finished(tmp_path, seed, dpo=n), {"x": name, "seed": str(seed)}) for name, seed, n in some]
    a, b = rows = settings(runs, tmp_path / "store")
    assert (a["setting"], b["setting"]) == ({"x": "a"}, {"x": "b"}) and a["best"] is None
    assert a["value"] == pytest.approx(0.8) and b["value"] == pytest.approx(0.25)
    assert a["low"] < 0.8 < a["high"] and a["seeds"] == [0, 1]
    assert b["best"]["delta"] == pytest.approx(np.mean([-20 / 40, -24 / 40]))
    assert b["best"]["p_adjusted"] == b["best"]["p"]  # a family of one
    assert a["rft"] is b["rft"] is None
    head, _, *lines = settings_markdown(rows).splitlines()
    assert head.startswith("| x | yield | model | seeds | accuracy, % | − best, points |")  # what differs
    assert lines[0].startswith("| a | 0.32 | dpo | 2 | 80.0 [") and lines[1].startswith(
        "| b | 0.1 | dpo | 2 |"
    )


def test_settings_against_their_own_rft_model(tmp_path: Path) -> None:
    """a: 30 − 20 and 34 − 24 of 40, 25 points; b: 10 − 20 and 10 − 24, −30 points."""
    some = [("a", 0, 30, 20), ("a", 1, 34, 24), ("b", 0, 10, 20), ("b", 1, 10, 24)]
    runs = [(finished(tmp_path, seed, rft=rft, dpo=dpo), {"x": name, "seed": str(seed)})
            for name, seed, dpo, rft in some]  # fmt: skip
    rows = settings(runs, tmp_path / "store")
    assert [row["rft"]["delta"] for row in rows] == [pytest.approx(0.25), pytest.approx(-0.3)]
    assert all(row["rft"]["p_adjusted"] >= row["rft"]["p"] for row in rows)
    table = settings_markdown(rows)
    assert "| − rft, points | p (Holm) | finding | − best, points | p (Holm) | finding |" in table
    assert "| +25.0 [" in table and "| -30.0 [" in table
