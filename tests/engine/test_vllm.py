"""The real vLLM: what it shares, and what becomes of the work when a process of it is killed."""

import logging
import os
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from runs import TINY, Watch, completed, compose, events, run
from selfcritique.config import EngineConfig
from selfcritique.engine import vllm
from selfcritique.engine.base import SamplingParams
from selfcritique.engine.vllm import VllmEngine
from selfcritique.engine.vllm_process import CPU_BLOCK, Request
from selfcritique.errors import UserError
from selfcritique.pipeline import build
from selfcritique.records import Message, Prompt

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: make setup-vllm")
PROMPTS = [Prompt((Message("user", " ".join("abcdefghij"[i % 7 :]) + f" {i}"),)) for i in range(200)]


def opened(model: Path, folder: Path, kv_cache_gb: float = 0.1) -> VllmEngine:
    return VllmEngine(model, EngineConfig(max_batch_tokens=512, kv_cache_gb=kv_cache_gb), folder / "vllm.log")


def processes_that_print_to(log_file: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if os.readlink(entry / "fd" / "1") == str(log_file):
                found.append((entry / "cmdline").read_text())
        except OSError:  # no process, or one that has ended
            continue
    return found


def test_without_the_package_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="make setup-vllm"):
        opened(tiny_dir, tmp_path)


@needs_vllm
def test_a_killed_process_is_started_once_more_and_then_reported(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """200 prompts are more than vLLM's first wave of sequences: work is left when the first one ends."""
    params = SamplingParams(n=4, temperature=1.0, max_tokens=60, seed=0)
    with opened(tiny_dir, tmp_path) as engine, caplog.at_level(logging.WARNING):
        prefix = [7] * (2 * CPU_BLOCK)
        two = [Request(i, [*prefix, 8 + i], {"max_tokens": 1}) for i in range(2)]
        assert sorted(answer.cached for answer in engine._answers(two, 0)) == [0, len(prefix)]

        batches = []
        for batch in engine.generate(PROMPTS, params):
            if not batches:
                assert engine._process is not None
                os.kill(engine._process.pid, signal.SIGKILL)
            batches.append(batch)
        assert caplog.messages == ["vLLM's process ended (code -9) and is started again"]
        samples = [(c.prompt_index, c.sample) for b in batches for c in b.completions]
        assert sorted(samples) == [(i, k) for i in range(len(PROMPTS)) for k in range(4)]
        assert len({b.batch_id for b in batches}) == len(batches)

        stream = engine.generate(PROMPTS, params)
        next(stream)
        os.kill(engine._process.pid, signal.SIGKILL)
        with engine.log_file.open("a") as log:
            log.write("what it said last\n")
        with pytest.raises(UserError, match="ended twice") as caught:
            list(stream)
        assert str(caught.value).endswith("what it said last") and str(engine.log_file) in str(caught.value)
    assert processes_that_print_to(tmp_path / "vllm.log") == []


@needs_vllm
def test_settings_that_vllm_refuses_are_reported_with_its_reason(tiny_dir: Path, tmp_path: Path) -> None:
    """One block of keys and values does not hold the model's context."""
    with opened(tiny_dir, tmp_path, kv_cache_gb=1e-5) as engine:
        with pytest.raises(UserError, match="ended while loading") as caught:
            next(engine.generate(PROMPTS, SamplingParams(1, 0.0, 8, 0)))
        assert "No available memory for the cache blocks" in str(caught.value)


@needs_vllm
def test_a_killed_run_leaves_no_process_and_its_rerun_repeats_nothing(tmp_path: Path) -> None:
    """Ended while it journals the third of the critic's eight questions, whose torn line is asked again."""
    store = tmp_path / "store"
    words = (*TINY, "engine=vllm", "engine.kv_cache_gb=0.1", "until=scores_rft", f"store={store}")
    folder = f"sample/{build(compose(*words)).nodes['critic_pool'].key}"
    journal = f"write {folder}.partial/scratch/journal.jsonl #"
    first, second = (Watch(store, tmp_path / name) for name in ("first", "second"))
    died = run(tmp_path / "1", *words, hook=replace(first, kill_at=f"{journal}3"))
    assert died.code == -signal.SIGKILL
    log_file = store / f"{folder}.partial" / "scratch" / "vllm.log"
    assert log_file.is_file()
    deadline = time.monotonic() + 60
    while left := processes_that_print_to(log_file):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

    again = completed(tmp_path / "2", *words, hook=second)
    lines = [sum(e.startswith(journal) for e in events(w.log, "write")) for w in (first, second)]
    assert lines == [3, 6]
    table = pl.read_parquet(store / folder / "responses.parquet")
    assert table.select("problem_id", "sample").is_unique().all() and table.height == 8 * 2
    scored = pl.read_parquet(
        store / again.artifact("scores_rft").relative_to(again.store) / "critiques.parquet"
    )
    assert scored["score"].null_count() == 0 and scored["missing_mass"].is_between(0, 1).all()
