"""Replicas of an engine on a Ray cluster, each an actor with CPUs and GPUs of its own.

The plan is the engine's own, made here without its weights; replicas get shards of it and give whole
batches back. So the journal is that of one process, and with hf every text too. A replica gets its next shard
when the results of the last one are taken. One that dies is started again and given its shard again, of which
nothing has been seen before.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from selfcritique.cluster import start_ray
from selfcritique.config import EngineConfig
from selfcritique.engine.base import PlannedBatch, SamplingParams
from selfcritique.engine.local import CheckpointEngine, Tails, open_local
from selfcritique.errors import UserError

RESTARTS = 3  # of a replica, before its death is reported


class RayEngine(CheckpointEngine):
    """As the engine of `config.kind`, by `config.ray`; every node sees the checkpoint under the same path."""

    def __init__(self, model_dir: Path, config: EngineConfig, logs: Path) -> None:
        assert config.ray is not None
        self.settings = config.ray
        self.local = open_local(model_dir, config, logs)  # which plans, and never works
        self.encoder, self.context = self.local.encoder, self.local.context
        self.how = model_dir.resolve(), config, logs.resolve()

    def plan(
        self, ids: Sequence[Sequence[int]], rows: int, new_tokens: int, logits: int, salt: str
    ) -> list[PlannedBatch]:
        return self.local.plan(ids, rows, new_tokens, logits, salt)

    @cached_property
    def replicas(self) -> list[Any]:
        ray, s = start_ray(log_to_driver=False), self.settings
        wanted = {"CPU": s.cpus, "GPU": s.gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(n.get(name, 0) / k) for name, k in wanted.items() if k) for n in nodes)
        if room < s.replicas:  # which would wait for ever
            raise UserError(
                f"The Ray cluster ({len(nodes)} nodes) has room for {room} replicas of {wanted}, not for "
                f"{s.replicas}: lower engine.ray.replicas, cpus or gpus, or set RAY_ADDRESS to a larger one."
            )
        restarts = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        actor = ray.remote(num_cpus=s.cpus, num_gpus=s.gpus, **restarts)(_Replica)
        return [actor.remote(s.cpus, i, *self.how) for i in range(s.replicas)]

    def work(self, batches: Sequence[PlannedBatch], task: SamplingParams | Tails) -> Iterator[Any]:
        replicas = self.replicas
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        waves = ceil(len(batches) / (len(replicas) * self.local.shard))
        size = ceil(len(batches) / (len(replicas) * waves))
        shards = [batches[i : i + size] for i in range(0, len(batches), size)]
        pool = ActorPool(replicas)
        try:
            for results in pool.map_unordered(lambda r, shard: r.work.remote(shard, task), shards):
                yield from results
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise UserError(
                f"A replica died more than {RESTARTS} times. The same command goes on from what is done. If "
                "memory was short, lower engine.max_batch_tokens or engine.ray.replicas. "
                f"Ray says: {error}"
            ) from None

    def close(self) -> None:
        for replica in vars(self).pop("replicas", []):
            start_ray().kill(replica)


class _Replica:
    """In a worker of Ray; the engine opens with the first shard, whose error it then is if it cannot."""

    def __init__(self, cpus: int, number: int, model_dir: Path, config: EngineConfig, logs: Path) -> None:
        import torch

        torch.set_num_threads(cpus)
        os.environ["OMP_NUM_THREADS"] = str(cpus)  # of vLLM's process
        self.how = model_dir, config, logs / f"replica_{number}"

    @cached_property
    def engine(self) -> CheckpointEngine:
        return open_local(*self.how)

    def work(self, batches: Sequence[PlannedBatch], task: SamplingParams | Tails) -> list[Any]:
        return list(self.engine.work(batches, task))
