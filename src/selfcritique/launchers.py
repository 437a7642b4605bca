"""A sweep's jobs through submitit: on SLURM, or in processes of this machine."""

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton

from selfcritique.errors import UserError
from selfcritique.sweep import Job, blocked, cores

_POLL_S = 0.2


class _Submitted:
    """A job for submitit, whose exit code says whether it finished; requeued by SLURM it goes on."""

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def __call__(self, *arguments: Any) -> None:
        self.launcher(*arguments).return_value  # noqa: B018  raises what the job raised

    def checkpoint(self, *arguments: Any) -> Any:
        return self.launcher.checkpoint.__func__(self, *arguments)


def submit(launcher: Any, jobs: Sequence[Job], words: Sequence[list[str]]) -> dict[int, str]:
    """All jobs through the executor of `hydra/launcher=submitit_*`; place -> why it did not finish, or ''.

    SLURM gets all at once, each after those it needs (`afterok`), the points as one array. On this machine a
    job starts when those it needs have ended and a core for each of its threads is free.
    """
    Path(str(launcher.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    state = Singleton.get_state()
    calls = [(w, "hydra.sweep.dir", i, str(i), state) for i, w in enumerate(words)]
    if launcher._EXECUTOR == "local":
        return _submit_here(launcher, jobs, calls)
    by_needs: dict[tuple[int, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        by_needs.setdefault(job.after, []).append(i)
    submitted: dict[int, Any] = {}
    for after, places in by_needs.items():
        executor = _executor(launcher, [submitted[i].job_id for i in after])
        arguments = zip(*(calls[i] for i in places), strict=True)
        submitted |= zip(places, executor.map_array(_Submitted(launcher), *arguments), strict=True)
    outcomes: dict[int, str] = {}
    for i, handle in submitted.items():
        why = blocked(jobs[i], outcomes)
        if why:
            handle.cancel()
        outcomes[i] = why or _ended(handle)
    return outcomes


def _submit_here(launcher: Any, jobs: Sequence[Job], calls: Sequence[tuple[Any, ...]]) -> dict[int, str]:
    outcomes: dict[int, str] = {}
    running: dict[int, Any] = {}
    slots = max(1, cores() // (launcher.params["cpus_per_task"] or 1))
    executor = _executor(launcher, [])
    while len(outcomes) < len(jobs):
        for i, job in enumerate(jobs):
            waits = i in outcomes or i in running or not outcomes.keys() >= set(job.after)
            if not waits and (why := blocked(job, outcomes)):
                outcomes[i] = why
            elif not waits and len(running) < slots:
                running[i] = executor.submit(_Submitted(launcher), *calls[i])
        time.sleep(_POLL_S)
        for i in [i for i, handle in running.items() if handle.done()]:
            outcomes[i] = _ended(running.pop(i))
    return outcomes


def _ended(handle: Any) -> str:
    """Why a job did not finish, '' if it did: what it raised itself, or what submitit knows of it."""
    error = handle.exception()
    if error is None:
        return ""
    _, raised, said = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    if raised:
        return said.partition("\n-----")[0].strip()
    return f"{str(error).strip().splitlines()[0]} (its log: {handle.paths.stderr})"


def _executor(launcher: Any, after: Sequence[str]) -> Any:
    """As the plugin makes it of its settings, with a dependency on the jobs `after`."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    params, kind = dict(launcher.params), launcher._EXECUTOR
    first = {"folder": params.pop("submitit_folder")}
    if "max_num_timeout" in params:
        first["slurm_max_num_timeout"] = params.pop("max_num_timeout")
    if after:
        needs = {"dependency": "afterok:" + ":".join(after), "kill-on-invalid-dep": "yes"}
        params["additional_parameters"] = {**params["additional_parameters"], **needs}
    shared = {f.name for f in fields(BaseQueueConf)}
    try:
        executor = submitit.AutoExecutor(cluster=kind, **first)
    except RuntimeError as error:  # no SLURM here
        raise UserError(f"hydra/launcher: {error} hydra/launcher=submitit_local wants none.") from None
    executor.update_parameters(**{k if k in shared else f"{kind}_{k}": v for k, v in params.items()})
    return executor
