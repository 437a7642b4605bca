"""What Hydra looks for here by name: the sweeper of `conf/config.yaml` and `hydra/launcher=ray`."""

import os
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus


class SharingSweeper(BasicSweeper):
    """Hydra's grid over `params` and the command line; the points share their stages."""

    def sweep(self, arguments: list[str]) -> None:
        from selfcritique.sweep import sweep  # Hydra imports this file whatever it is asked for

        sweep(self, arguments)


class RayLauncher(BasicLauncher):
    """Every job a task of Ray, on the cluster that RAY_ADDRESS names or one of this machine.

    The cluster's nodes see the same files under the same paths. A worker that dies costs its job alone.
    """

    def __init__(self, num_cpus: float, num_gpus: float) -> None:
        super().__init__()
        self.resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from selfcritique.cluster import start_ray

        ray = start_ray()
        task = ray.remote(**self.resources)(_ray_job)
        place = self, Singleton.get_state(), os.getcwd()
        started = [task.remote(*place, list(words), initial_job_idx + i)
                   for i, words in enumerate(job_overrides)]  # fmt: skip
        ended = []
        for job in started:
            try:
                ended.append(ray.get(job))
            except ray.exceptions.RayError as error:
                ended.append(JobReturn(status=JobStatus.FAILED))
                ended[-1].return_value = error
        return ended


def _ray_job(launcher: RayLauncher, state: Any, folder: str, words: list[str], number: int) -> JobReturn:
    os.chdir(folder)
    Singleton.set_state(state)
    (ended,) = BasicLauncher.launch(launcher, [words], number)
    return ended
