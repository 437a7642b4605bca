"""The stages `select` and `pairs` on synthetic scored pools: seconds per response and memory as pools grow.

A pool has eight responses to a question, a tenth of them repeated; scores are means of one or two critiques.
Each size runs in a process of its own, so that the greatest resident memory is that of its stages.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import polars as pl
from run import Measured

from selfcritique.config import PairConfig, SelectConfig
from selfcritique.progress import Progress
from selfcritique.stages import Pairs, Select, pairs, select

SIZES = {10_000: 21, 100_000: 5, 1_000_000: 3}  # responses -> timed repetitions
PER_QUESTION = 8
RATE = 20_000  # responses a second that both stages together shall do


def write_pool(folder: Path, size: int, seed: int = 0) -> None:
    """scored.parquet and problems.parquet, as the stages `score` and `problems` write them."""
    rng = np.random.default_rng(seed)

    def ids(numbers: np.ndarray) -> pl.Series:
        return pl.Series([f"{x:016x}" for x in numbers.tolist()])

    unique = rng.integers(2**63, size=size)
    texts = np.where(rng.random(size) < 0.1, np.roll(unique, 1), unique)
    problems = np.repeat(rng.integers(2**63, size=-(-size // PER_QUESTION)), PER_QUESTION)[:size]
    scores = rng.integers(2, 21, size=size) / 2
    pool = pl.DataFrame({
        "problem_id": ids(problems),
        "response_id": ids(rng.permutation(unique)),
        "n_tokens": rng.integers(5, 200, size=size),
        "truncated": rng.random(size) < 0.02,
        "text_hash": ids(texts),
        "equations_hash": ids(texts ^ 1),
        "score": pl.Series(scores).set(pl.Series(rng.random(size) < 0.02), None),
        "parse": "ok",
        "verdict": np.where(scores >= 6, "correct", "incorrect"),
    })  # fmt: skip
    folder.mkdir(parents=True)
    pool.write_parquet(folder / "scored.parquet")
    questions = pool.select("problem_id").unique()
    families = pl.Series([f"family {i % 8}" for i in range(questions.height)])
    questions.with_columns(family=families).write_parquet(folder / "problems.parquet")


def run(folder: Path, repetitions: int) -> dict[str, float]:
    """Both stages once to warm up, then timed; bytes: the most that was resident."""
    inputs = {role: SimpleNamespace(path=folder) for role in ("scored", "problems")}
    seconds, progress = [], Progress("selection")
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        select(Select(SelectConfig(), 0), inputs, folder, progress)  # type: ignore[arg-type]
        pairs(Pairs(PairConfig(), 0), inputs, folder, progress)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
    # ru_maxrss would count what the parent held as it started this process
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {"seconds": median(seconds[1:]), "low": min(seconds[1:]), "high": max(seconds[1:]), "bytes": peak}


def measure(what: str) -> Measured:
    found = {}
    for size, repetitions in SIZES.items():
        with TemporaryDirectory() as folder:
            write_pool(Path(folder) / "pool", size)
            command = [sys.executable, __file__, str(Path(folder) / "pool"), str(repetitions)]
            found[size] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    small, large = min(SIZES), max(SIZES)
    if what == "scaling":
        per_record = found[small]["seconds"] / small
        low, middle, high = (found[large][k] / large / per_record for k in ("low", "seconds", "high"))
        about = {f"MiB above {small:,}": {f"{size:,}": round((f["bytes"] - found[small]["bytes"]) / 2**20)
                                          for size, f in found.items() if size > small}}  # fmt: skip
        return Measured(middle, low, high, "times the time per response", f"{small:,} responses", about)
    slow, middle, fast = (large / found[large][k] / RATE for k in ("high", "seconds", "low"))
    about = {"responses/s": {f"{size:,}": round(size / f["seconds"]) for size, f in found.items()}}
    return Measured(middle, slow, fast, "times as fast", f"{RATE:,} responses/s", about)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
