"""A sweep: its points share every stage they can, and none of them waits for another.

All points are composed before one is started, so that it is known which stages several of them need. These
are built first, by jobs of their own: one for each set of points that needs the same stages (all points;
those of a seed; ...). A point's job does the rest.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from selfcritique.artifacts import Store, write_json
from selfcritique.config import to_run_config
from selfcritique.errors import UserError
from selfcritique.pipeline import Graph, Node, build, plan

SHARED = "shared"  # job name of what several points need


@dataclass(frozen=True)
class Point:
    """One setting of everything. `label`: its values of what the sweep varies, as on the command line."""

    number: int
    words: tuple[str, ...]
    label: Mapping[str, str]
    folder: Path
    graph: Graph

    @property
    def needed(self) -> list[Node]:
        return self.graph.needed(self.graph.run.until)


@dataclass(frozen=True)
class Job:
    """A command line to run once the jobs `after` (places in the schedule) are done."""

    points: frozenset[int]  # that need it
    words: tuple[str, ...]
    after: tuple[int, ...]


def schedule(points: Sequence[Point], store: Store) -> list[Job]:
    """The shared jobs, what most points need first, then one job for each point."""
    users = defaultdict[str, set[int]](set)
    for point in points:
        for node in point.needed:
            users[node.key].add(point.number)
    groups: dict[frozenset[int], dict[str, Node]] = {}
    for point in points:
        for node in point.needed:
            sharing = frozenset(users[node.key])
            if len(sharing) > 1 and store.find(node.stage.name, node.key, None) is None:
                groups.setdefault(sharing, {}).setdefault(node.key, node)
    first = {point.number: point for point in reversed(points)}
    jobs: list[Job] = []
    for sharing in sorted(groups, key=len, reverse=True):
        made = groups[sharing].values()
        inner = {node.key for user in made for node in user.inputs.values()}
        until = ",".join(node.name for node in made if node.key not in inner)
        own = (f"until='{until}'", f"hydra.job.name={SHARED}", f"hydra.sweep.subdir={SHARED}/{len(jobs)}")
        after = tuple(i for i, job in enumerate(jobs) if job.points > sharing)
        jobs.append(Job(sharing, (*first[min(sharing)].words, *own), after))
    shared = list(enumerate(jobs))
    for point in points:
        after = tuple(i for i, job in shared if point.number in job.points)
        jobs.append(Job(frozenset([point.number]), point.words, after))
    return jobs


def threads_per_job(launcher: Mapping[str, Any], jobs: int, cores: int) -> int:
    """So many that jobs of this machine that run at once have a core for each."""
    at_once = launcher.get("n_jobs")  # joblib
    if at_once is not None:
        at_once = cores + 1 + at_once if at_once < 0 else at_once
        return max(1, cores // max(1, min(at_once, jobs)))
    if "submitit_folder" in launcher:
        return launcher["cpus_per_task"] or 1
    return int(launcher.get("num_cpus") or cores)  # ray; else one after the other


# ---- running it ----------------------------------------------------------------------------------------


def sweep(sweeper: BasicSweeper, arguments: list[str]) -> None:
    """All points, with their plan or their results; a UserError if one did not finish."""
    config, context = sweeper.config, sweeper.hydra_context
    assert config is not None and context is not None
    parser = OverridesParser.create(config_loader=context.config_loader)
    given = parser.parse_overrides([*sweeper._parse_config(), *arguments])
    axes = [override.get_key_element() for override in given if override.is_sweep_override()]
    (batch,) = sweeper.split_arguments(given, None)
    folder = Path(config.hydra.sweep.dir)  # resolved here, once: the points copy what was
    points, outcomes = list[Point](), dict[int, str]()
    for number, words in enumerate(batch):
        composed = context.config_loader.load_sweep_config(config, words)
        try:
            points.append(_point(number, words, axes, composed, folder))
        except UserError as error:
            outcomes[number] = str(error)
    if points and points[0].graph.run.plan:
        from rich.console import Console

        from selfcritique.report import show_sweep_plan

        runs = ((point.graph, Store(Path(point.graph.run.store))) for point in points)
        show_sweep_plan([plan(graph, store, graph.run.until) for graph, store in runs], Console(width=100))
    elif points:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        outcomes |= _run(points, sweeper.launcher, config.hydra.launcher)
        _write(points, outcomes, folder)
    varied = [[word for word in words if word.partition("=")[0] in axes] for words in batch]
    _raise_failures([" ".join(words) for words in varied], outcomes)


def _point(
    number: int, words: Sequence[str], axes: Sequence[str], composed: DictConfig, folder: Path
) -> Point:
    with open_dict(composed):
        composed.hydra.job.num = number
        subdir = str(composed.hydra.sweep.subdir)
        del composed["hydra"]
    values = dict(word.partition("=")[::2] for word in words)
    label = {axis: values[axis] for axis in axes}
    own = (*words, f"hydra.sweep.subdir='{subdir}'")
    return Point(number, own, label, folder / subdir, build(to_run_config(composed)))


def _run(points: Sequence[Point], launcher: Any, config: Mapping[str, Any]) -> dict[int, str]:
    """Point -> why it did not finish, '' if it did."""
    run = points[0].graph.run
    jobs = schedule(points, Store(Path(run.store)))

    def words(job: Job, at_once: int) -> list[str]:
        return [*job.words, f"threads={run.threads or threads_per_job(config, at_once, cores())}"]

    if "submitit_folder" in config:
        from selfcritique.launchers import submit

        outcomes = submit(launcher, jobs, [words(job, 1) for job in jobs])
    else:
        outcomes = _in_waves(launcher, jobs, words)
    if "n_jobs" in config:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown()  # its idle workers would stay for five minutes
    ended = {min(job.points): outcomes[i] for i, job in enumerate(jobs) if len(job.points) == 1}
    reports = reports_ended()
    return {p.number: ended[p.number] or reports.get(p.folder.resolve(), "") for p in points}


def _write(points: Sequence[Point], outcomes: Mapping[int, str], folder: Path) -> None:
    """report.html, sweep.json, and the table of its settings as sweep.md and on the terminal."""
    from selfcritique.compare import settings, settings_markdown
    from selfcritique.results import load_runs
    from selfcritique.sections import write_report

    done = [(p.folder, p.label) for p in points if not outcomes[p.number]]
    rows = settings(done, Path(points[0].graph.run.store))
    told = [
        {"number": p.number, "label": p.label, "folder": str(p.folder), "error": outcomes[p.number]}
        for p in points
    ]
    write_json(folder / "sweep.json", {"points": told, "settings": rows})
    if rows:
        table = settings_markdown(rows)
        (folder / "sweep.md").write_text(table + "\n")
        print(table)
        runs = load_runs(*(str(folder) for folder, _ in done))
        print(f"Report of the sweep: {write_report(runs)}")
    print(f"{len(done)} of {len(points)} points finished: {folder}")


def _raise_failures(points: Sequence[str], outcomes: Mapping[int, str]) -> None:
    by_reason = defaultdict[str, list[str]](list)
    for number, why in sorted(outcomes.items()):
        if why:
            by_reason[why].append(f"{number} ({points[number]})")
    if by_reason:
        failed = sum(map(len, by_reason.values()))
        lines = (f"  {why}\n    {'; '.join(who)}" for why, who in by_reason.items())
        head = f"{failed} of {len(points)} points did not finish; the same command runs what is missing."
        raise UserError("\n".join((head, *lines)))


def _in_waves(launcher: Any, jobs: Sequence[Job], words: Callable[[Job, int], list[str]]) -> dict[int, str]:
    """Through `launcher.launch`, which returns when all its jobs are done: those first that wait for none."""
    outcomes: dict[int, str] = {}
    while len(outcomes) < len(jobs):
        ready = [i for i, job in enumerate(jobs) if i not in outcomes and outcomes.keys() >= set(job.after)]
        outcomes |= {i: why for i in ready if (why := blocked(jobs[i], outcomes))}
        wave = [i for i in ready if i not in outcomes]
        if wave:
            batch = [words(jobs[i], len(wave)) for i in wave]
            for i, ended in zip(wave, launcher.launch(batch, initial_job_idx=wave[0]), strict=True):
                done = ended.status is JobStatus.COMPLETED
                outcomes[i] = "" if done else str(ended._return_value)  # the property also prints
    return outcomes


def blocked(job: Job, outcomes: Mapping[int, str]) -> str:
    """Why a job cannot start: what stopped one that it comes after."""
    return next((why for before in job.after if (why := outcomes.get(before))), "")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


# ---- a process for each point --------------------------------------------------------------------------


_reporting: dict[Path, tuple[BaseProcess, Connection]] = {}  # points that `go_on`


def isolated(work: Callable[[Callable[[], None]], object], out: Path) -> None:
    """`work` in a forked process, so that whatever ends it ends no more; UserError if it did not finish.

    What was imported here need not be imported there; nothing may have been computed here with threads.
    `work` gets a function to call once its results are there: this returns then, and what is left (a report)
    goes on beside the next points at the lowest priority. `reports_ended` says what became of it.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, sender))
    process.start()
    sender.close()
    wait([receiver, process.sentinel])
    said = _said(receiver)
    if said is None:
        _reporting[out.resolve()] = process, receiver
    elif why := _ended(process, said):
        raise UserError(why)


def reports_ended() -> dict[Path, str]:
    """Waits for what `isolated` left behind: folder -> why it did not finish, '' if it did."""
    left = {}
    for out, (process, receiver) in _reporting.items():
        process.join()
        left[out] = _ended(process, _said(receiver) or "")
    _reporting.clear()
    return left


def _said(receiver: Connection) -> str | None:
    """The child's last message: None for `go_on`, its error, or '' if it ended without one."""
    try:
        return receiver.recv() if receiver.poll() else ""
    except EOFError:
        return ""


def _ended(process: BaseProcess, said: str) -> str:
    process.join()
    if not process.exitcode:
        return ""
    killed = process.exitcode < 0 and f"killed by {signal.Signals(-process.exitcode).name}"
    return said or killed or "stopped by an error that is no fault of its settings; see its log"


def _child(work: Callable[[Callable[[], None]], object], sender: Connection) -> None:
    def go_on() -> None:
        os.nice(19)
        sender.send(None)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    try:
        work(go_on)
    except UserError as error:
        sender.send(str(error)[:10_000])  # a pipe holds more, so that this never waits
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
