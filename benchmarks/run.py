"""Ratios against peers, measured side by side: `make bench` runs all, `make bench NAME=...` one of them.

Each benchmark is a file here with `measure(...) -> Measured` and its arguments. A result is appended to
results.json and the table in README.md is rendered from the newest result of each name.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from selfcritique.artifacts import code_version
from selfcritique.errors import UserError

HERE = Path(__file__).resolve().parent
ROUNDS = 7
BENCHMARKS: dict[str, tuple[Any, ...]] = {  # name -> its file, and what its `measure` is given
    "checker_vs_math_verify_int": ("checker_int",),
    "checker_vs_math_verify_symbolic": ("checker_symbolic",),
    "checker_hostile": ("checker_hostile",),
    "critic_logit_vs_generate": ("critic_modes",),
    "engine_overhead": ("engines", "overhead"),
    "vllm_vs_hf_n1": ("engines", "hf", 1),
    "vllm_vs_hf_n8": ("engines", "hf", 8),
    "selection_scaling": ("selection", "scaling"),
    "selection_throughput": ("selection", "throughput"),
    "sweep_sharing": ("sweeps",),
    "matmul_peak_fraction": ("training", "peak", "dpo", "ours", "smollm2"),
} | {
    f"{name}_{size}": ("training", *arguments, size)
    for size in ("smollm2", "tiny")
    for name, arguments in {
        "dpo_step_vs_trl_default": ("step", "dpo", "default"),
        "dpo_step_vs_trl_best": ("step", "dpo", "best"),
        "dpo_memory_vs_trl": ("memory", "dpo", "default"),
        "sft_step_vs_trl": ("step", "sft", "best"),
        "sft_memory_vs_trl": ("memory", "sft", "best"),
    }.items()
}


@dataclass(frozen=True)
class Measured:
    """How many times the baseline's figure ours is: median, least and greatest over paired rounds."""

    ratio: float
    low: float
    high: float
    unit: str
    baseline: str
    about: dict[str, Any] = field(default_factory=dict)  # data, lengths, batch, settings


def speed_ratio(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    name: str,
    rounds: int = ROUNDS,
    before: Callable[[], object] = lambda: None,
) -> Measured:
    """Baseline's time over ours, A B A B after one warm-up of each; `before` each round, and not timed."""
    ratios = []
    for _ in range(rounds + 1):
        before()
        seconds = [_seconds(run) for run in (ours, baseline)]
        ratios.append(seconds[1] / seconds[0])
    ratios = ratios[1:]
    return Measured(median(ratios), min(ratios), max(ratios), "times faster", name)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def render(results: list[dict[str, object]]) -> str:
    """The table of the newest result of each name."""
    lines = ["| name | ratio | range | baseline | commit | load | date |", "|" + " --- |" * 7]
    for name, r in sorted({str(r["name"]): r for r in results}.items()):
        ratio = f"{r['ratio']:.3g} {r['unit']}"
        spread = f"{r['low']:.3g} to {r['high']:.3g}"
        cells = (f"`{name}`", ratio, spread, r["baseline"], f"`{str(r['commit'])[:7]}`", r["load"], r["date"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        raise UserError(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    file, page = HERE / "results.json", HERE / "README.md"
    results = json.loads(file.read_text()) if file.exists() else []
    for name in names or BENCHMARKS:
        load = round(os.getloadavg()[0], 1)
        module, *arguments = BENCHMARKS[name]
        measured = importlib.import_module(module).measure(*arguments)
        about = {"commit": code_version(), "load": load, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        results.append({"name": name, **asdict(measured), **about})
        print(f"{name}: {measured.ratio:.3g} [{measured.low:.3g}, {measured.high:.3g}] {measured.unit}")
        file.write_text(json.dumps(results, indent=1) + "\n")
        head = page.read_text().partition("| name |")[0]
        page.write_text(head + render(results) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"ERROR: {error}")
