"""What stops a run in the middle: one message with cause and remedy, exit code 1, and nothing lost."""

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from runs import SMOKE, TINY, Finished, Patch, completed, run, timeless


def finished_stages(*runs: Finished) -> list[list[str]]:
    """Stages of each run's progress that ended, made or reused."""
    return [re.findall(r"\] (\w+): (?:done|reused)", r.stderr) for r in runs]


def reused(finished: Finished) -> list[str]:
    return [name for name, cached in finished.summary["cached"].items() if cached]


# ---- nothing to train on, a bad critic -----------------------------------------------------------------


def test_a_threshold_nobody_passes(smoke: Finished, tmp_path: Path) -> None:
    """By the critic's expected score, which is below 10 whatever it says."""
    words = (*TINY, "rft.select.by=critic")
    stopped = run(tmp_path / "1", *words, "rft.select.threshold=10", f"store={tmp_path / 'store'}")
    pool = next(tmp_path.glob("store/select/*/selected.parquet"))
    counts = pl.read_parquet(pool).group_by("reason").len()
    message = stopped.message
    assert "no response was selected" in message and "rft.select.threshold" in message
    assert all(f"{n} {reason}" in message for reason, n in counts.iter_rows())
    mended = completed(
        tmp_path / "2", *words, "rft.select.threshold=1", "until=rft_data", f"store={tmp_path / 'store'}"
    )
    assert reused(mended) == [s for s in mended.summary["cached"] if s not in ("select", "rft_data")]


def test_a_critic_under_the_gate(smoke: Finished, tmp_path: Path) -> None:
    words = (*SMOKE, f"store={smoke.store}", "critic.gate.on_fail=stop")
    stopped = run(tmp_path / "1", *words)
    value = smoke.summary["critic"]["balanced_accuracy"]
    for part in (f"{value:.3g}", "gate of 0.7", "critic.gate.min", "critic.train.epochs", "on_fail=warn"):
        assert part in stopped.message
    assert finished_stages(stopped)[0][-1] == "gate"  # nothing after it
    mended = completed(tmp_path / "2", *words, "critic.gate.min=0")
    assert all(mended.summary["cached"].values())


def test_a_critic_that_cannot_be_read(smoke: Finished, tmp_path: Path) -> None:
    words = (*SMOKE, f"store={smoke.store}")
    stopped = run(tmp_path / "1", *words, "critic.ask.max_parse_failures=0.01")
    path = next(word for word in stopped.message.split() if word.endswith("critiques.parquet."))
    share = pl.read_parquet(path.rstrip("."))["score"].null_count() / 120  # critic_dev, two critiques each
    for part in (f"{share:.0%} of 120", "allows 1%", "critic.ask.max_tokens", "critic.train.epochs"):
        assert part in stopped.message
    mended = completed(tmp_path / "2", *words)
    assert all(mended.summary["cached"].values())


def test_no_pairs(smoke: Finished, tmp_path: Path) -> None:
    """No two scores between 1 and 10 are 9.5 apart."""
    words = (*SMOKE, f"store={smoke.store}")
    stopped = run(tmp_path / "1", *words, "pairs.build.margin=9.5")
    pool = pl.read_parquet(smoke.artifact("scores_dpo") / "scored.parquet")
    usable = pool.filter(pl.col("score").is_not_null(), ~pl.col("truncated")).height
    for part in (f"from {pool.height} responses", f"{usable} no_partner", "pairs.build.margin"):
        assert part in stopped.message
    assert finished_stages(stopped)[0][-1] == "scores_dpo"
    assert "pairs" in reused(completed(tmp_path / "2", *words, "until=pairs"))


# ---- a training that diverges --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return completed(tmp_path_factory.mktemp("whole"), *TINY)


def nan_in_dpo() -> None:
    """The third loss of a DPO training is not a number."""
    from selfcritique.train import modules

    real, losses = modules.merged_loss, []

    def broken(*arguments: Any) -> Any:
        losses.append(real(*arguments))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1.0)

    modules.merged_loss = broken


def test_not_a_number(whole: Finished, tmp_path: Path) -> None:
    store = tmp_path / "store"
    stopped = run(tmp_path / "1", *TINY, f"store={store}", hook=nan_in_dpo)
    assert "loss is not finite at step 3" in stopped.message and "Lower lr" in stopped.message
    (good,) = store.glob("dpo/*.partial/scratch/last_good")
    assert str(good) in stopped.message and (good / "model.safetensors").is_file()
    assert finished_stages(stopped)[0][-1] == "reference"
    mended = completed(tmp_path / "2", *TINY, f"store={store}")
    assert reused(mended) == finished_stages(stopped)[0]
    assert timeless(mended.summary) == timeless(whole.summary)


# ---- a full disk ---------------------------------------------------------------------------------------


def full_after_writes(n: int) -> None:
    """The nth write to the store and all later ones find no room."""
    write, left = os.write, n

    def full(descriptor: int, data: bytes) -> int:
        nonlocal left
        if "/store/" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    os.write = full


class FullAfter:
    def __init__(self, writes: int) -> None:
        self.writes = writes

    def __call__(self) -> None:
        full_after_writes(self.writes)


def full_parquet(self: pl.DataFrame, file: Path, **rest: Any) -> None:
    if Path(file).stem == "selected":
        raise pl.exceptions.ComputeError("No space left on device (os error 28)")
    file.write_bytes(b"")
    self.lazy().sink_parquet(file)


def full_summary(path: Path, value: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize(
    "hook",
    [
        FullAfter(20),  # in a journal or a manifest
        Patch("polars.DataFrame.write_parquet", full_parquet),
        Patch("selfcritique.report.write_json", full_summary),
    ],
    ids=["journal", "parquet", "summary"],
)
def test_a_full_disk(whole: Finished, tmp_path: Path, hook: Callable[[], None]) -> None:
    store = tmp_path / "store"
    stopped = run(tmp_path / "1", *TINY, f"store={store}", hook=hook)
    for part in ("disk full while writing", "MiB free", "store gc", "run the same command again"):
        assert part in stopped.message
    mended = completed(tmp_path / "2", *TINY, f"store={store}")
    assert reused(mended) == finished_stages(stopped)[0] != []
    assert timeless(mended.summary) == timeless(whole.summary)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk(whole: Finished, tmp_path: Path, small_disk: Path) -> None:
    words = (*TINY, f"store={small_disk / 'store'}")
    stopped = run(tmp_path / "1", *words)
    assert "disk full while writing" in stopped.message
    subprocess.run(["mount", "-o", "remount,size=256m", small_disk], check=True)
    mended = completed(tmp_path / "2", *words)
    assert reused(mended) == finished_stages(stopped)[0] != []
    assert timeless(mended.summary) == timeless(whole.summary)
