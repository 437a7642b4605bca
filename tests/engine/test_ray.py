"""The real Ray: a replica, the driver and a whole cluster that come and go in the middle of sampling."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

import polars as pl
import pytest

from runs import TINY, Watch, completed, compose, events, run
from selfcritique.config import EngineConfig, RayConfig, key_part
from selfcritique.engine import ray as engine_ray
from selfcritique.engine.base import SamplingParams
from selfcritique.engine.hf import HfEngine
from selfcritique.engine.ray import RayEngine
from selfcritique.errors import UserError
from selfcritique.pipeline import build
from selfcritique.records import Message, Prompt

ray = pytest.importorskip("ray")
PROMPTS = [Prompt((Message("user", " ".join("abcdefghij"[i % 7 :]) + f" {i}"),)) for i in range(60)]
PARAMS = SamplingParams(n=3, temperature=1.0, max_tokens=20, seed=0)


@pytest.fixture(scope="module", autouse=True)
def no_cluster_stays() -> Iterator[None]:
    yield
    ray.shutdown()


def opened(model: Path, folder: Path, **settings: float) -> RayEngine:
    return RayEngine(model, EngineConfig(max_batch_tokens=400, ray=RayConfig(**settings)), folder)


def pids(engine: RayEngine) -> list[int]:
    return ray.get([replica.__ray_call__.remote(lambda _: os.getpid()) for replica in engine.replicas])


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())  # a zombie has none
    except OSError:
        return False


def test_a_killed_replica_is_started_again_and_its_shard_redone(tiny_dir: Path, tmp_path: Path) -> None:
    """Both work on their next shards when the first result is taken."""
    with HfEngine(tiny_dir, 400) as alone:
        expected = {b.batch_id: b for b in alone.generate(PROMPTS, PARAMS)}
    with opened(tiny_dir, tmp_path, replicas=2) as engine:
        before, batches = pids(engine), []
        for batch in engine.generate(PROMPTS, PARAMS):
            if not batches:
                os.kill(before[0], signal.SIGKILL)
            batches.append(batch)
        assert len(batches) == len(expected) > 4
        assert {b.batch_id: b for b in batches} == expected
        after = pids(engine)
        assert after[0] != before[0] and after[1] == before[1]
    deadline = time.monotonic() + 120
    while any(map(alive, after)):
        assert time.monotonic() < deadline, "closed, but its replicas live"
        time.sleep(0.1)


def test_what_a_replica_cannot_do_is_said_once(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's error there is one here, and the pool goes on after it; deaths have an end."""
    weights = tmp_path / "model" / "model.safetensors"
    shutil.copytree(tiny_dir, weights.parent)
    weights.unlink()
    monkeypatch.setattr(engine_ray, "RESTARTS", 0)
    with opened(weights.parent, tmp_path, replicas=1) as engine:
        with pytest.raises(UserError, match=r"No usable checkpoint \(safetensors\)"):
            list(engine.generate(PROMPTS, PARAMS))
        shutil.copy(tiny_dir / "model.safetensors", weights)
        stream = engine.generate(PROMPTS, PARAMS)
        next(stream)
        os.kill(pids(engine)[0], signal.SIGKILL)
        with pytest.raises(UserError, match="died more than 0 times"):
            list(stream)
    with (
        opened(tiny_dir, tmp_path, replicas=99) as engine,
        pytest.raises(UserError, match=r"has room for \d+ replicas .* not for 99"),
    ):
        next(engine.generate(PROMPTS, PARAMS))


def test_without_the_package_the_command_that_installs_it_is_named(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with opened(tiny_dir, tmp_path) as engine, pytest.raises(UserError, match="pip install ray"):
        next(engine.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize(("spread", "plain"), [("ray", "hf"), ("ray_vllm", "vllm")])
def test_replicas_are_no_part_of_a_key(spread: str, plain: str) -> None:
    engines = [compose(f"engine={name}").engine for name in (spread, plain)]
    assert [e.ray is None for e in engines] == [False, True]
    assert key_part(engines[0]) == key_part(engines[1])


# ---- a run killed on its own cluster and ended on another one ------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of one node, which says that it has a GPU and wants a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token_hex(32))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = TemporaryDirectory(prefix="ray")  # sockets want short paths
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}",
               "--num-cpus=2", "--num-gpus=1", "--include-dashboard=false", f"--temp-dir={folder.name}",
               "--node-ip-address=127.0.0.1", "--disable-usage-stats"]  # fmt: skip
    with folder, (Path(folder.name) / "head.log").open("w+") as log:
        paths = os.pathsep.join(sys.path)
        head = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": paths})
        try:
            deadline = time.monotonic() + 300
            while "Ray runtime started" not in Path(log.name).read_text():
                assert head.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait()


def marked(mark: str) -> list[str]:
    """Processes with the variable in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_text())
        except OSError:  # ended
            continue
    return found


def test_a_killed_run_goes_on_elsewhere_as_if_nothing_had_been(
    started: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it journals its second batch, whose torn line is sampled again; the texts are hf's."""
    store = tmp_path / "store"
    shutil.copytree(started / "store", store, symlinks=True)
    words = (*TINY, "until=critic_pool", f"store={store}", "engine=ray", "engine.max_batch_tokens=400")
    folder = f"sample/{build(compose(*words)).nodes['critic_pool'].key}"
    journal = f"write {folder}.partial/scratch/journal.jsonl #"
    whole, first, second = (Watch(store, tmp_path / name) for name in ("whole", "first", "second"))
    shutil.rmtree(store / folder)
    completed(tmp_path / "0", *words, "engine.ray=null", hook=whole)
    expected = pl.read_parquet(store / folder / "responses.parquet")
    shutil.rmtree(store / folder)

    monkeypatch.setenv("RAY_TEST", folder)
    died = run(tmp_path / "1", *words, hook=replace(first, kill_at=f"{journal}2"))
    assert died.code == -signal.SIGKILL
    deadline = time.monotonic() + 120
    while left := marked(f"RAY_TEST={folder}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

    monkeypatch.setenv("RAY_ADDRESS", cluster)  # the only place that has a GPU to give
    completed(tmp_path / "2", *words, "engine.ray={replicas:1,gpus:1}", hook=second)
    assert pl.read_parquet(store / folder / "responses.parquet").equals(expected)
    n, n_first, n_second = (
        sum(e.startswith(journal) for e in events(w.log, "write")) for w in (whole, first, second)
    )
    assert n_first == 2 < n == n_second + 1
