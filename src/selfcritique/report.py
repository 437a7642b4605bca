"""What a run leaves behind: summary.json, lineage.json, the table in the terminal (sections.py: report.html).

Every figure of the summary comes from the stages' metrics or from the per-example Parquet files of the
artifacts that `lineage.json` names.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Column, Table

from selfcritique.artifacts import TIMING, Artifact, write_json
from selfcritique.config import RunConfig, key_part
from selfcritique.diagnose import diagnose
from selfcritique.pipeline import Graph, PlanRow
from selfcritique.progress import duration


def summarise(
    run: RunConfig, graph: Graph, done: Mapping[str, Artifact], commit: str, total_s: float
) -> dict[str, Any]:
    """The run's summary; stages that did not run (`until`) leave their parts out."""
    from selfcritique.evaluate import comparison_table  # numpy: a plan does without

    metrics = {name: artifact.metrics for name, artifact in done.items()}
    evaluated = [name for name in graph.models if f"eval_{name}" in done]
    tables = {name: pl.read_parquet(done[f"eval_{name}"].path / "eval.parquet") for name in evaluated}
    summary: dict[str, Any] = {
        "experiment": run.name,
        "seed": run.seed,
        "seed_from": run.seed_from,
        "commit": commit,
        "wall_s": {"total": total_s, **{name: artifact.wall_s for name, artifact in done.items()}},
        "cached": {name: artifact.cached for name, artifact in done.items()},
        "data": {
            "registers": sorted({r for source in run.data.mix for r in source.registers}),
            **metrics.get("problems", {}),
        },
        "models": {name: _model(metrics[f"eval_{name}"]) for name in tables},
        "comparisons": [],
    }
    if "base" in tables:
        against = [name for name in ("base", "sft", "rft") if name in tables]
        summary["comparisons"] = comparison_table(tables, run.seed, against)
    if "gate" in metrics:
        summary["critic"] = {**_flat(metrics["gate"]), "gate": key_part(run.critic.gate)}
    for part, stage in (("regate", "regate"), ("selection", "select"), ("pairs", "pairs")):
        if stage in metrics:
            summary[part] = _flat(metrics[stage])
    if "dpo" in metrics:
        summary["dpo"] = {"start": run.dpo.start}
        summary["pairs"]["policy"] = run.pairs.policy
    summary["pools"] = {name: metrics[name] for name in metrics if name.startswith(("pool_", "critic_pool"))}
    summary["training"] = {
        name: metrics[name] for name in metrics if name in graph.models or name == "critic"
    }
    summary["diagnosis"] = [asdict(finding) for finding in diagnose(summary)]
    return summary


def _model(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in metrics.items() if name != "by"}
    return rest | {f"by_{group}": found for group, found in metrics["by"].items()}


def _flat(card: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals of a card as their value, the interval beside it."""
    flat: dict[str, Any] = {}
    for name, value in card.items():
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            flat |= {name: value["value"], f"{name}_interval": [value["low"], value["high"]]}
        else:
            flat[name] = value
    return flat


def training_rows(name: str, artifact: Artifact) -> list[dict[str, Any]]:
    """The per-step rows a training stage wrote, with their times."""
    paths = artifact.path / "metrics.jsonl", artifact.path / TIMING
    if not all(path.is_file() for path in paths):
        return []
    rows = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    return [{"stage": name, **row, **timing} for row, timing in zip(*rows, strict=True)]


def write(out: Path, summary: Mapping[str, Any], done: Mapping[str, Artifact]) -> None:
    """summary.json, and lineage.json: stage of this run -> where its artifact stands in the store."""
    lineage = {name: {"stage": a.stage, "key": a.key, "digest": a.digest} for name, a in done.items()}
    write_json(out / "summary.json", summary)
    write_json(out / "lineage.json", lineage)


def _percent(interval: Mapping[str, Any] | None) -> str:
    if not interval or interval.get("value") is None:
        return "-"
    return f"{100 * interval['value']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _decimal(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def show(summary: Mapping[str, Any], out: Path, console: Console) -> None:
    """The results: accuracies, comparisons, the critic, what was selected, what to change."""
    sampled: Mapping[str, Any] = next((m for m in summary["models"].values() if "critic_score" in m), {})
    extra = [name for name in sampled if "@" in name]
    columns = ("model", "accuracy (95 % interval)", *extra)
    models = _table(f"{summary['experiment']}, seed {summary['seed']}", *columns)
    for name, model in summary["models"].items():
        models.add_row(name, _percent(model["accuracy"]), *(_percent(model.get(metric)) for metric in extra))
    if summary["models"]:
        console.print(models)
    if summary["comparisons"]:
        console.print(_comparisons(summary["comparisons"]))
    critic = summary.get("critic")
    if critic:
        console.print(
            f"Critic on {critic['n']:,} unseen responses: "
            f"balanced accuracy {_decimal(critic['balanced_accuracy'])}, AUROC {_decimal(critic['auroc'])}, "
            f"F1 {_decimal(critic['f1'])}, parse failures {100 * critic['parse_failure_rate']:.1f} %."
        )
    for part in ("selection", "pairs"):
        if part in summary:
            console.print(f"{part.capitalize()}: " + ", ".join(_figures(summary[part])))
    for finding in summary["diagnosis"]:
        console.print(
            f"[bold]{finding['signature']}[/]: {finding['evidence']} "
            f"→ {finding['setting']}: {finding['advice']}"
        )
    reused = sum(summary["cached"].values())
    console.print(
        f"{duration(summary['wall_s']['total'])} in all; {reused} of {len(summary['cached'])} stages reused"
        f"{' (everything)' if reused == len(summary['cached']) else ''}. Results: {out}"
    )


def _figures(part: Mapping[str, Any]) -> Iterator[str]:
    for name, value in part.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            shown = f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"
            yield f"{name.replace('_', ' ')} {shown}"


def _comparisons(rows: list[dict[str, Any]]) -> Table:
    columns = ("comparison", "points (95 % interval)", "relative", "p adjusted", "detectable from", "finding")
    table = _table("Paired comparisons (Holm-adjusted)", *columns)
    for row in rows:
        points = f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        relative = "-" if row["relative"] is None else f"{100 * row['relative']:+.1f} %"
        p, detectable = f"{row['p_adjusted']:.2g}", f"{100 * row['mde']:.1f}"
        table.add_row(f"{row['a']} − {row['b']}", points, relative, p, detectable, row["finding"])
    return table


def _table(title: str, *columns: str, no_wrap: bool = False) -> Table:
    headers = [Column(column, no_wrap=no_wrap) for column in columns]
    return Table(*headers, title=title, title_justify="left")


def _taking(missing: Sequence[PlanRow]) -> str:
    seconds = sum(row.seconds or 0.0 for row in missing)
    unknown = sum(row.seconds is None for row in missing)
    never = f" and {unknown} never timed here" if unknown else ""
    return f"about {duration(seconds)} by this store's past stages{never}"


def show_plan(rows: list[PlanRow], console: Console) -> None:
    """What a run would do, stage by stage."""
    table = _table("Plan: nothing is run", "stage", "key", "", "work", "disk", "time", no_wrap=True)
    for row in rows:
        time = "?" if row.seconds is None else duration(row.seconds)
        disk = f"{row.bytes / 2**20:.1f} MiB" if row.hit else ""
        state = "hit" if row.hit else "miss"
        table.add_row(row.name, row.key, state, row.work, disk, time if row.hit else f"~{time}")
    console.print(table)
    missing = [row for row in rows if not row.hit]
    stand = f"{sum(row.bytes for row in rows) / 2**20:.1f} MiB stand"
    console.print(f"{len(missing)} of {len(rows)} stages would run, {_taking(missing)}; {stand}.")


def show_sweep_plan(points: Sequence[Sequence[PlanRow]], console: Console) -> None:
    """What a sweep would do: every stage of any of its points once, however many need it."""
    stages: dict[str, dict[str, PlanRow]] = {}
    needing = Counter(row.name for rows in points for row in rows)
    for row in (row for rows in points for row in rows):
        stages.setdefault(row.name, {})[row.key] = row
    title, columns = (
        f"Plan of {len(points)} points: nothing is run",
        ("points", "keys", "runs", "work", "time"),
    )
    table = _table(title, "stage", *columns, no_wrap=True)
    once = {row.key: row for rows in stages.values() for row in rows.values()}
    for name, rows in stages.items():
        missing = [row for row in rows.values() if not row.hit]
        work = " or ".join(sorted({row.work for row in rows.values()}))
        known = duration(sum(row.seconds or 0.0 for row in missing))
        time = "" if not missing else "?" if any(row.seconds is None for row in missing) else f"~{known}"
        cells = (needing[name], len(rows), len(missing))
        table.add_row(name, *map(str, cells), work, time)
    console.print(table)
    missing = [row for row in once.values() if not row.hit]
    alone = sum(not row.hit for rows in points for row in rows)
    counted = f"{len(missing)} of {len(once)} stages would run (each point by itself: {alone})"
    console.print(f"{counted}, {_taking(missing)}.")
