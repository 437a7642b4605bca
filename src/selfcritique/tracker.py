"""Where a run's figures go beside its own files: nowhere, a CSV, or Weights & Biases.

`metrics.jsonl` is always written first. W&B gets what it got; if it fails, the run goes on without it.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique.artifacts import MANIFEST, Artifact
from selfcritique.config import Logger, RunConfig, key_part
from selfcritique.records import content_id


class Tracker:
    """Takes everything to nowhere."""

    def log(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Per-step figures of one stage."""

    def finish(
        self, summary: Mapping[str, Any], samples: pl.DataFrame | None, made: Mapping[str, Artifact]
    ) -> None:
        """The run is over."""


class _Csv(Tracker):
    """metrics.csv: one line per figure, so that stages with other figures share a file."""

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.csv"

    def log(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as lines:
            writer = csv.writer(lines)
            if fresh:
                writer.writerow(("stage", "step", "metric", "value"))
            for row in rows:
                figures = ((k, v) for k, v in row.items() if k not in ("stage", "step") and _is_number(v))
                writer.writerows((stage, row.get("step"), name, value) for name, value in figures)


class _Wandb(Tracker):
    """A W&B run, offline unless the user says otherwise (WANDB_MODE) or is logged in.

    Its id follows from the settings: the same command, run again after a kill, continues the same W&B run.
    An experiment is a group, whose members are its seeds and sweep points.
    """

    def __init__(self, run: RunConfig, out: Path, point: str) -> None:
        import wandb

        self.wandb, config = wandb, key_part(run)
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.run = wandb.init(
            project="selfcritique",
            id=content_id(json.dumps(config, sort_keys=True)),
            resume="allow",
            group=run.name,
            name="-".join(filter(None, (run.name, f"seed{run.seed}", point))),
            config=config,
            dir=str(out),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        known = self.run.summary.get(f"{stage}/step", 0)  # of a resumed run, logged before
        for row in rows:
            if row["step"] > known:
                self.run.log({f"{stage}/{name}": value for name, value in row.items() if _is_number(value)})

    def finish(
        self, summary: Mapping[str, Any], samples: pl.DataFrame | None, made: Mapping[str, Artifact]
    ) -> None:
        shown = ("models", "critic", "selection", "pairs")
        self.run.summary.update({name: summary[name] for name in shown if name in summary})
        if samples is not None:
            rows = [list(row) for row in samples.iter_rows()]
            self.run.log({"samples": self.wandb.Table(columns=list[str | int](samples.columns), data=rows)})
        for name, artifact in made.items():
            manifest = artifact.manifest
            inputs = {role: source["key"] for role, source in manifest["inputs"].items()}
            about = {"name": name, "key": artifact.key, "digest": artifact.digest, "inputs": inputs}
            logged = self.wandb.Artifact(f"{artifact.stage}-{artifact.key}", artifact.stage, metadata=about)
            logged.add_file(str(artifact.path / MANIFEST))
            self.run.log_artifact(logged)
        self.run.finish()


class Tracking:
    """metrics.jsonl first, then the chosen tracker; a tracker that fails is dropped with one warning."""

    def __init__(self, run: RunConfig, out: Path, point: str = "") -> None:
        """point: of a sweep."""
        self.path = out / "metrics.jsonl"
        self.tracker = Tracker()
        if run.logger is Logger.csv:
            self.tracker = _Csv(out)
        elif run.logger is Logger.wandb:
            self._try(lambda: setattr(self, "tracker", _Wandb(run, out, point)))

    def log(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a") as lines:
            lines.writelines(json.dumps({"stage": stage, **row}) + "\n" for row in rows)
        self._try(lambda: self.tracker.log(stage, rows))

    def finish(
        self, summary: Mapping[str, Any], samples: pl.DataFrame | None, made: Mapping[str, Artifact]
    ) -> None:
        self._try(lambda: self.tracker.finish(summary, samples, made))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            print(f"WARNING: logging stopped, the run goes on: {what}", file=sys.stderr)
            self.tracker = Tracker()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
