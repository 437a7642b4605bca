"""Where figures go: metrics.csv, nowhere, or an offline W&B run read back from its file."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from runs import SMOKE, Finished, Patch, completed, read_json


def tracked(smoke: Finished, folder: Path, logger: str, hook: Patch | None = None) -> Finished:
    return completed(folder, *SMOKE, f"store={smoke.store}", f"logger={logger}", hook=hook)


def metrics(finished: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]


def test_csv_has_every_figure_of_the_metrics(smoke: Finished) -> None:
    with (smoke.out / "metrics.csv").open(newline="") as lines:  # logger=csv is the default
        rows = list(csv.DictReader(lines))
    found = {(r["stage"], int(r["step"]), r["metric"]): float(r["value"]) for r in rows}
    expected = {
        (row["stage"], row["step"], name): value
        for row in metrics(smoke)
        for name, value in row.items()
        if name not in ("stage", "step")
    }
    assert found == expected and len(rows) == len(found) > 100


def test_none_leaves_the_metrics_alone(smoke: Finished, tmp_path: Path) -> None:
    quiet = tracked(smoke, tmp_path, "none")
    assert metrics(quiet) == metrics(smoke)
    assert not list(quiet.out.glob("*.csv")) and not (quiet.out / "wandb").exists()


# ---- Weights & Biases ----------------------------------------------------------------------------------


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length, type, data) behind a
    header of 7 bytes, whose entries are W&B's own protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, message = 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def items(entries: Any) -> dict[str, Any]:
    """Key (nested ones joined by a slash) -> value of a history, summary or config message."""
    return {"/".join(e.nested_key) or e.key: json.loads(e.value_json) for e in entries}


@pytest.fixture(scope="module")
def offline(smoke: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return tracked(smoke, tmp_path_factory.mktemp("wandb"), "wandb")


@pytest.fixture(scope="module")
def logged(offline: Finished) -> list[Any]:
    (path,) = offline.out.glob("wandb/offline-run-*/run-*.wandb")
    return list(records(path))


def test_wandb_has_config_and_group(logged: list[Any]) -> None:
    (run, *_) = [r.run for r in logged if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name) == ("selfcritique", "smoke", "smoke-seed0")
    config = items(run.config.update)
    assert config["dpo"]["loss"]["lam"] == 1.0 and config["dpo"]["loss"]["beta"] == 0.5
    assert config["rft"]["select"]["threshold"] == 4 and config["seed"] == 0


def test_wandb_has_every_metric(logged: list[Any], offline: Finished) -> None:
    history = [items(r.history.item) for r in logged if r.WhichOneof("record_type") == "history"]
    for stage in ("base", "critic", "rft", "dpo"):
        found = [row for row in history if f"{stage}/loss" in row]
        expected = [row for row in metrics(offline) if row["stage"] == stage]
        assert [row[f"{stage}/loss"] for row in found] == [row["loss"] for row in expected]
        assert [row[f"{stage}/step"] for row in found] == [row["step"] for row in expected]
    last = [row for row in history if "dpo/loss" in row][-1]
    expected_names = {f"dpo/{name}" for name in metrics(offline)[-1] if name != "stage"}
    assert expected_names <= last.keys()


def test_wandb_has_the_summary_and_the_samples(logged: list[Any], offline: Finished, smoke: Finished) -> None:
    final: dict[str, Any] = {}
    for record in logged:
        if record.WhichOneof("record_type") == "summary":
            final |= items(record.summary.update)
    value = final.get("models/dpo/accuracy/value", final.get("models", {}))
    if isinstance(value, dict):
        value = value["dpo"]["accuracy"]["value"]
    assert value == smoke.summary["models"]["dpo"]["accuracy"]["value"]

    (path,) = offline.out.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"][:7] == [
        *("question", "response", "critique", "score", "verdict", "selected", "reason")
    ]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    stored = pl.read_parquet(smoke.artifact("select") / "selected.parquet")
    assert [(r["response_id"], r["score"], r["reason"]) for r in rows] == list(
        stored.select("response_id", "score", "reason").head(len(rows)).iter_rows()
    )
    assert len(rows) == min(200, stored.height) and all(r["question"] and r["critique"] for r in rows)


def test_wandb_has_what_every_artifact_was_made_from(logged: list[Any], offline: Finished) -> None:
    """One W&B artifact per stage of lineage.json, with its manifest and the keys of its inputs."""
    lineage = read_json(offline.out / "lineage.json")
    found = [r.artifact for r in logged if r.WhichOneof("record_type") == "artifact"]
    names = {f"{entry['stage']}-{entry['key']}" for entry in lineage.values()}
    stages = [a for a in found if a.type != "run_table"]
    assert {a.name for a in stages} == names and len(stages) == len(names)
    (policy,) = (json.loads(a.metadata) for a in stages if a.type == "dpo")
    inputs = {role: "pool_dpo" if role == "responses" else role for role in policy["inputs"]} | {
        "model": "rft"
    }
    assert policy["inputs"] == {role: lineage[name]["key"] for role, name in inputs.items()}
    assert all([c.path for c in a.manifest.contents] == ["manifest.json"] for a in stages)


def test_the_points_of_a_sweep_are_a_group_and_a_rerun_is_the_same_wandb_run(
    smoke: Finished, tmp_path: Path, logged: list[Any]
) -> None:
    words = ("-m", *SMOKE, f"store={smoke.store}", "logger=wandb", "until=gate", "pairs.build.margin=0.5,1")
    found = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        swept = completed(folder, *words)
        paths = sorted(swept.out.glob("*/wandb/offline-run-*/run-*.wandb"))
        runs = [next(r.run for r in records(p) if r.WhichOneof("record_type") == "run") for p in paths]
        assert [(r.run_group, r.display_name) for r in runs] == [
            ("smoke", "smoke-seed0-0"), ("smoke", "smoke-seed0-1")
        ]  # fmt: skip
        found.append([r.run_id for r in runs])
    (whole, *_) = [r.run for r in logged if r.WhichOneof("record_type") == "run"]
    assert found[0] == found[1] and len({*found[0], whole.run_id}) == 3


def broken(*arguments: Any, **named: Any) -> None:
    raise ConnectionError("W&B is down")


@pytest.mark.parametrize("target", ["wandb.init", "wandb.sdk.wandb_run.Run.log", "wandb.Artifact.add_file"])
def test_a_failing_wandb_never_stops_a_run(smoke: Finished, tmp_path: Path, target: str) -> None:
    finished = tracked(smoke, tmp_path, "wandb", Patch(target, broken))
    assert finished.stderr.count("WARNING: logging stopped, the run goes on: ConnectionError") == 1
    assert metrics(finished) == metrics(smoke)
    assert finished.summary["models"] == smoke.summary["models"]
