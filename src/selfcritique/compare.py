"""Several runs side by side: one Markdown table of accuracies and one of paired differences over seeds.

A model is known by its greedy answers: what two runs share (a base, an arm) is one model, not two. The first
experiment, of a sweep its first point, lends plain names; what others trained differently is called
`rft@experiment`, with a sweep's settings `rft@by=random`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import polars as pl

from selfcritique.artifacts import MANIFEST
from selfcritique.errors import UserError
from selfcritique.evaluate import adjust, compare_models, compare_seeds, measure, problem_values
from selfcritique.records import GROUPS
from selfcritique.stats import seeds_interval

Key = TypeVar("Key")
AGAINST = ("base", "sft", "rft")  # models of the first experiment that the others are compared with
# Of a summary's parts: what a setting does before the last model is trained.
FIGURES = (
    ("critic", "balanced_accuracy"),
    ("selection", "yield"),
    ("selection", "precision"),
    ("selection", "diversity"),
    ("pairs", "pairs"),
)


@dataclass
class Model:
    """A trained model under several seeds: seed -> its evaluation artifact's rows."""

    name: str
    keys: dict[int, str] = field(default_factory=dict)
    rows: dict[int, pl.DataFrame] = field(default_factory=dict)
    paths: dict[int, Path] = field(default_factory=dict)


def load_models(patterns: Sequence[str], store: Path, where: str = "") -> list[Model]:
    """The evaluated models of the run directories that the patterns match, in the order given.

    where: GROUP=VALUE,... (source, family, register, difficulty): on these test problems only.
    """
    group, _, values = where.partition("=")
    if where and group not in GROUPS:
        raise UserError(
            f"where={where}: problems are grouped by {', '.join(GROUPS)}, as in family=bus,money."
        )
    models: dict[str, Model] = {}
    first: list[str] = []
    for folder in folders(patterns):
        summary, lineage = (json.loads((folder / f"{n}.json").read_text()) for n in ("summary", "lineage"))
        seed, variant = summary["seed"], [summary["experiment"], *_point(folder)]
        first = first or variant
        named = variant[variant[0] == first[0] :]
        for name in summary["models"]:
            key = lineage[f"test_{name}"]["key"]
            known = any(model.keys.get(seed) == key for model in models.values())
            label = name if variant == first else f"{name}@{','.join(named)}"
            if known:
                continue
            model = models.setdefault(label, Model(label))
            if seed in model.keys:
                raise UserError(
                    f"{folder}: {label} with seed {seed} stands in two of the runs with different settings; "
                    "give runs of one experiment that differ in their seed only, or name one of them anew "
                    "(name=...)."
                )
            path = store / "evaluate" / lineage[f"eval_{name}"]["key"] / "eval.parquet"
            if not path.is_file():
                raise UserError(
                    f"{folder}: its evaluation {path} is gone; run it again or name its store (store=...)."
                )
            rows = pl.read_parquet(path)
            if where:
                rows = rows.filter(pl.col(group).cast(pl.String).is_in(values.split(",")))
            if rows.is_empty():
                raise UserError(f"{folder}: no test problem has {where}.")
            model.keys[seed], model.rows[seed], model.paths[seed] = key, rows, path.parent
    return list(models.values())


def _point(folder: Path) -> list[str]:
    """What a sweep set at this point, but for the seed: NAME=VALUE with the last part of the names."""
    told = folder.parent / "sweep.json"
    points = json.loads(told.read_text())["points"] if told.is_file() else []
    labels: dict[str, dict[str, str]] = {Path(point["folder"]).name: point["label"] for point in points}
    label = labels.get(folder.name, {})
    return [f"{name.rpartition('.')[2]}={value}" for name, value in label.items() if name != "seed"]


def folders(patterns: Sequence[str]) -> Iterator[Path]:
    """The finished runs that the patterns match, point 2 of a sweep before point 11."""
    for pattern in patterns:
        named = sorted(glob(pattern), key=lambda name: re.sub(r"\d+", lambda m: m[0].zfill(20), name))
        found = [p for p in map(Path, named) if (p / "summary.json").is_file()]
        if not found:
            raise UserError(f"There is no finished run (summary.json) at {pattern}.")
        yield from found


def differences(
    models: Sequence[Model], metric: str, against: Sequence[str] = AGAINST
) -> list[dict[str, Any]]:
    """Every later model against those named, over the seeds both have; one Holm-adjusted family."""
    rows = []
    for a, b, seeds in _compared(models, against):
        over = compare_seeds([a.rows[s] for s in seeds], [b.rows[s] for s in seeds], metric)
        each = {s: compare_models(a.rows[s], b.rows[s], metric, s) for s in seeds}
        rows.append({**over, "a": a.name, "b": b.name, "each": each})
    return adjust(rows)


def _compared(
    models: Sequence[Model], against: Sequence[str] = AGAINST
) -> Iterator[tuple[Model, Model, list[int]]]:
    """The pairs to compare and the seeds that both have."""
    for i, b in enumerate(models):
        for a in models[i + 1 :] if b.name in against else ():
            if seeds := sorted(a.rows.keys() & b.rows.keys()):
                yield a, b, seeds


def changes(models: Sequence[Model], most: int) -> Iterator[str]:
    """Per pair and seed the problems that only one answers right (greedily): how many, and `most` of each."""
    for a, b, seeds in _compared(models):
        for seed in seeds:
            both = _answers(a, seed).join(_answers(b, seed), on="problem_id", suffix="_b").sort("problem_id")
            right, right_b = pl.col("verdict") == "correct", pl.col("verdict_b") == "correct"
            gained, lost = both.filter(right & ~right_b), both.filter(~right & right_b)
            yield (f"{a.name} − {b.name}, seed {seed}: {gained.height} right only by {a.name}, "
                   f"{lost.height} only by {b.name}")  # fmt: skip
            for row in pl.concat([gained.head(most), lost.head(most)]).iter_rows(named=True):
                yield f"\n{row['question']}\nReference answer: {row['gold']}"
                yield f"  {a.name}, {row['verdict']}: {row['text']}"
                yield f"  {b.name}, {row['verdict_b']}: {row['text_b']}"


def _answers(model: Model, seed: int) -> pl.DataFrame:
    """problem_id, question, gold, verdict and text of the greedy answers."""
    made_from = json.loads((model.paths[seed] / MANIFEST).read_text())["inputs"]
    store = model.paths[seed].parents[1]
    places = {role: store / source["stage"] / source["key"] for role, source in made_from.items()}
    asked = pl.read_parquet(places["problems"] / "problems.parquet").unique("problem_id")
    texts = pl.read_parquet(places["greedy"] / "responses.parquet")
    return texts.select("problem_id", "verdict", "text").join(
        asked.select("problem_id", "question", gold="answer"), on="problem_id"
    )


def markdown(models: Sequence[Model], metric: str = "accuracy", against: Sequence[str] = AGAINST) -> str:
    """Both tables; intervals are 95 %, differences in points (hundredths).

    A seed's interval is over problems (that training run alone), the one over seeds over both.
    """
    seeds = sorted({seed for model in models for seed in model.rows})
    head = [*(f"seed {s}" for s in seeds), "mean"]
    accuracies, compared = [], []
    for model in models:
        values = {s: measure(rows, metric) for s, rows in model.rows.items()}
        mean = sum(v["value"] for v in values.values()) / len(values)
        cells = [_interval(values[s], 1) if s in values else "" for s in seeds]
        accuracies.append([model.name, *cells, f"{100 * mean:.1f}"])
    beside = ("over seeds", "relative", "p (Holm)", "detectable from", "finding")
    for row in differences(models, metric, against):
        cells = [_interval(row["each"][s], 1, "+", "delta") if s in row["each"] else "" for s in seeds]
        relative = "" if row["relative"] is None else f"{100 * row['relative']:+.1f} %"
        cells += [_interval(row, 1, "+", "delta"), relative]
        found = (f"{row['p_adjusted']:.2g}", f"{100 * row['mde']:.1f}", row["finding"])
        compared.append([f"{row['a']} − {row['b']}", *cells, *found])
    return "\n\n".join(
        (
            markdown_table([f"{metric}, %", *head], accuracies),
            markdown_table(["difference, points", *head[:-1], *beside], compared),
        )
    )


def _interval(row: Mapping[str, Any], digits: int, sign: str = "", value: str = "value") -> str:
    shown = (f"{100 * row[name]:{sign}.{digits}f}" for name in (value, "low", "high"))
    return "{} [{}, {}]".format(*shown)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


# ---- a sweep -------------------------------------------------------------------------------------------


def settings(
    points: Sequence[tuple[Path, Mapping[str, str]]], store: Path, metric: str = "accuracy"
) -> list[dict[str, Any]]:
    """One row per setting of a sweep (its points but for the seed): the last model it trained.

    points: (run folder, what the sweep varies). value, low, high: over the seeds, as in `compare_seeds`.
    figures: means over the seeds of FIGURES, None where no run has one. rft, best: the differences to the
    setting's own RFT model and to the setting with the highest value, each family Holm-adjusted; None for
    that model itself.
    """
    found: dict[tuple[tuple[str, str], ...], Model] = {}
    starts: dict[tuple[tuple[str, str], ...], dict[int, pl.DataFrame]] = defaultdict(dict)
    figures: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = defaultdict(list)
    for folder, label in points:
        summary, lineage = (json.loads((folder / f"{n}.json").read_text()) for n in ("summary", "lineage"))
        if summary["models"]:
            name = list(summary["models"])[-1]
            setting = tuple((k, v) for k, v in label.items() if k != "seed")
            model = found.setdefault(setting, Model(name))
            figures[setting].append({f: summary.get(part, {}).get(f) for part, f in FIGURES})
            for trained, rows in ((name, model.rows), ("rft", starts[setting])):
                if f"eval_{trained}" in lineage:
                    path = store / "evaluate" / lineage[f"eval_{trained}"]["key"] / "eval.parquet"
                    rows[summary["seed"]] = pl.read_parquet(path)
    if not found:
        return []
    cells = {setting: model.rows for setting, model in found.items()}
    over_rft = _paired(
        cells, {s: rows for s, rows in starts.items() if found[s].name != "rft"}, metric, "rft"
    )
    _, against = against_best(cells, metric)
    return [
        {"setting": dict(s), "model": m.name, **_over_seeds(m, metric), "figures": _means(figures[s]),
         "rft": over_rft.get(s), "best": against.get(s)}
        for s, m in found.items()
    ]  # fmt: skip


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    known = {name: [v for row in rows if (v := row[name]) is not None] for name in rows[0]}
    return {name: fmean(values) if values else None for name, values in known.items()}


def against_best(
    cells: Mapping[Key, Mapping[int, pl.DataFrame]], metric: str = "accuracy"
) -> tuple[Key, dict[Key, dict[str, Any]]]:
    """The cell with the highest mean over its seeds, and each other's difference to it over the seeds that
    both have: paired, one Holm-adjusted family.

    cells: setting -> seed -> answers.
    """
    means = {cell: fmean(measure(rows, metric)["value"] for rows in seeds.values())
             for cell, seeds in cells.items()}  # fmt: skip
    best = max(means, key=means.__getitem__)
    return best, _paired(cells, {cell: cells[best] for cell in cells if cell != best}, metric, "best")


def _paired(
    cells: Mapping[Key, Mapping[int, pl.DataFrame]],
    others: Mapping[Key, Mapping[int, pl.DataFrame]],
    metric: str,
    name: str,
) -> dict[Key, dict[str, Any]]:
    """Each cell's difference to its other, called `name`, over the seeds that both have."""
    found = {}
    for cell, other in others.items():
        if shared := sorted(cells[cell].keys() & other.keys()):
            here, there = ([rows[seed] for seed in shared] for rows in (cells[cell], other))
            found[cell] = compare_seeds(here, there, metric, "setting", name)
    return dict(zip(found, adjust(list(found.values())), strict=True))


def _over_seeds(model: Model, metric: str) -> dict[str, Any]:
    values = {seed: measure(rows, metric) for seed, rows in model.rows.items()}
    if len(values) == 1:
        (found,) = values.values()
        return {**found, "seeds": list(values)}
    per_problem = [problem_values(rows, metric)["value"].to_numpy() for rows in model.rows.values()]
    same = len({len(v) for v in per_problem}) == 1
    over = seeds_interval(per_problem if same else [v.mean() for v in per_problem])
    return {"value": over.delta, "low": over.low, "high": over.high, "seeds": list(values)}


def settings_markdown(rows: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """Of the figures, those that differ between the settings."""
    differ = [name for name in rows[0]["figures"] if len({row["figures"][name] for row in rows}) > 1]
    others = [name for name in ("rft", "best") if any(row[name] for row in rows)]
    beside = [cell for name in others for cell in (f"− {name}, points", "p (Holm)", "finding")]
    head = [*rows[0]["setting"], *differ, "model", "seeds", f"{metric}, %", *beside]
    lines = []
    for row in rows:
        values = (row["figures"][name] for name in differ)
        cells = [*row["setting"].values(), *("" if v is None else f"{v:.4g}" for v in values)]
        cells += [row["model"], str(len(row["seeds"])), _interval(row, 1)]
        for name in others:
            found = row[name]
            cells += (
                [_interval(found, 1, "+", "delta"), f"{found['p_adjusted']:.2g}", found["finding"]]
                if found
                else ["", "", name if name == "best" else ""]
            )
        lines.append(cells)
    return markdown_table(head, lines)
