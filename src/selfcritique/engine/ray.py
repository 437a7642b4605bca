"""Replicas of an engine on a Ray cluster, each an actor with CPUs and GPUs of its own.

The plan is the engine's own, made here without its weights; replicas get shards of it and give whole
batches back. So the journal is that of one process, and with hf every text too. A replica gets its next shard
when the results of the last one are taken. One that dies is started again and given its shard again, of which
nothing has been seen before.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from selfcritique.config import EngineConfig
from selfcritique.engine.base import PlannedBatch, SamplingParams
from selfcritique.engine.local import CheckpointEngine, Tails, open_local
from selfcritique.errors import UserError

RESTARTS = 3  # of a replica, before its death is reported


def start_ray(**options: Any) -> Any:
    """The package, connected to the cluster that RAY_ADDRESS names, or to one of this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed: run `pip install ray==2.60.0`, or do without it.") from None
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, logging_level=logging.WARNING, **options)
        except ConnectionError as error:
            raise UserError(f"No Ray cluster at RAY_ADDRESS: {error}") from None
    return ray


class RayEngine(CheckpointEngine):
    """As the engine of `config.kind`, by `config.ray`; every node sees the checkpoint under the same path."""

    def __init__(self, model_dir: Path, config: EngineConfig, logs: Path) -> None:
        assert config.ray is not None
        self.ray, self.config, self.settings = start_ray(log_to_driver=False), config, config.ray
        self.model_dir, self.logs = model_dir.resolve(), logs.resolve()
        self.local = open_local(model_dir, config, logs)  # which plans, and never works
        self.encoder, self.context, self.plan = self.local.encoder, self.local.context, self.local.plan
        self._check_room()

    def _check_room(self) -> None:
        """Raise if the replicas would wait for ever."""
        wanted = {"CPU": self.settings.cpus, "GPU": self.settings.gpus}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(min(int(n.get(name, 0) / k) for name, k in wanted.items() if k) for n in nodes)
        if room < self.settings.replicas:
            raise UserError(
                f"The Ray cluster's {len(nodes)} nodes have room for {room} replicas of {wanted}, not for "
                f"{self.settings.replicas}: lower engine.ray.replicas, cpus or gpus, or set RAY_ADDRESS."
            )

    @cached_property
    def replicas(self) -> list[Any]:
        s = self.settings
        actor = self.ray.remote(
            num_cpus=s.cpus,
            num_gpus=s.gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(s.cpus)}},
        )(_Replica)
        return [
            actor.remote(self.model_dir, self.config, self.logs / f"replica_{i}") for i in range(s.replicas)
        ]

    def work(self, batches: Sequence[PlannedBatch], task: SamplingParams | Tails) -> Iterator[Any]:
        from ray.util import ActorPool

        waves = ceil(len(batches) / (len(self.replicas) * self.local.shard))
        size = ceil(len(batches) / (len(self.replicas) * waves))
        shards = [batches[i : i + size] for i in range(0, len(batches), size)]
        pool = ActorPool(self.replicas)
        try:
            for results in pool.map_unordered(lambda r, shard: r.work.remote(shard, task), shards):
                yield from results
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayActorError as error:
            raise UserError(
                f"A replica died more than {RESTARTS} times. The same command goes on from what is done. If "
                "memory was short, lower engine.max_batch_tokens or engine.ray.replicas. "
                f"Ray says: {error}"
            ) from None

    def close(self) -> None:
        for replica in vars(self).pop("replicas", []):
            self.ray.kill(replica)


class _Replica:
    """In a worker of Ray; the engine opens with the first shard, whose error it then is if it cannot."""

    def __init__(self, *how: Any) -> None:
        self.how = how

    @cached_property
    def engine(self) -> CheckpointEngine:
        return open_local(*self.how)

    def work(self, batches: Sequence[PlannedBatch], task: SamplingParams | Tails) -> list[Any]:
        return list(self.engine.work(batches, task))
