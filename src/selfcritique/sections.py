"""What a report shows: each section is a function of a run, None where the run has no data for it.

Another section is one more function in SECTIONS, or in SWEEP for several runs; the page and the export take
whatever they return.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from selfcritique.evaluate import adjust, compare_seeds, measure, threshold_curve
from selfcritique.figures import Figure, bars, curves, dots, graph, heat_map
from selfcritique.page import Cell, Part, Section, Table, packed_samples, page, write_files
from selfcritique.progress import duration
from selfcritique.results import GROUPS, Run, samples
from selfcritique.stats import Interval

STEPS = ({"loss"}, {"dpo_loss", "sft_loss"}, {"rewards_margin"}, {"rewards_accuracy"},
         {"chosen_logps_drift", "rejected_logps_drift"})  # fmt: skip


def percent(found: Mapping[str, Any] | None, value: str = "value") -> Interval | None:
    """A share with its interval, as percent."""
    if not found or found[value] is None:
        return None
    return Interval(100 * found[value], 100 * found["low"], 100 * found["high"], found["n"])


def results(run: Run) -> Section | None:
    models = run.summary["models"]
    if not models:
        return None
    metrics = ["accuracy", *(name for name in next(iter(models.values())) if "@" in name)]
    found = {
        (name, metric): percent(model.get(metric)) for name, model in models.items() for metric in metrics
    }
    parts: list[Part] = [
        Table("models", "Test set, percent with 95 % intervals.", ["model", *metrics],
              [[name, *(found[name, metric] for metric in metrics)] for name in models]),
        Figure("models", "Test set, 95 % intervals.", dots("percent", [
            (name, metric, cell.value, cell.low, cell.high) for (name, metric), cell in found.items() if cell
        ])),
    ]  # fmt: skip
    rows = [
        [f"{row['a']} − {row['b']}", row["metric"], percent(row, "delta"),
         None if row["relative"] is None else 100 * row["relative"], row["p_adjusted"], 100 * row["mde"]]
        for row in run.summary["comparisons"]
    ]  # fmt: skip
    columns = ["comparison", "metric", "points", "relative, %", "p (Holm)", "detectable from, points"]
    if rows:
        parts.append(Table("comparisons", "Paired on the same problems; one Holm family.", columns, rows))
    return Section("Results", parts)


def diagnosis(run: Run) -> Section:
    lines = ["{signature}: {evidence} → {setting}: {advice}".format(**f) for f in run.summary["diagnosis"]]
    return Section("Diagnosis", lines or ["No failure signature was recognised."])


def groups(run: Run) -> Section | None:
    parts: list[Part] = []
    models = run.summary["models"]
    for group in GROUPS:
        by = {name: model[f"by_{group}"] for name, model in models.items()}
        values = sorted({value for found in by.values() for value in found}, key=lambda v: (len(v), v))
        if len(values) > 1:
            rows = [[value, *(percent(found.get(value)) for found in by.values())] for value in values]
            marks = [(row[0], name, cell.value, cell.low, cell.high)
                     for row in rows for name, cell in zip(by, row[1:], strict=True) if cell]  # fmt: skip
            size = (5.0, 1.2 + 0.16 * len(values) * len(by))
            caption = f"Accuracy by {group}, percent."
            parts += [Table(f"by_{group}", caption, [group, *by], rows),
                      Figure(f"by_{group}", caption, dots("percent", marks), size)]  # fmt: skip
    return Section("Accuracy by group", parts) if parts else None


def training(run: Run) -> Section | None:
    parts = []
    for (stage,), rows in run.metrics.group_by("stage", maintain_order=True) if run.metrics.height else ():
        for names in STEPS:
            lines = {name: (rows["step"].to_list(), rows[name].to_list())
                     for name in sorted(names & set(rows.columns)) if rows[name].count()}  # fmt: skip
            if lines:
                title = " and ".join(name.replace("_", " ") for name in lines)
                draw_lines = curves("step", title if len(lines) == 1 else "nats", lines)
                parts.append(Figure(f"{stage}_{'_'.join(lines)}", f"{stage}: {title}.", draw_lines))
    return Section("Training", parts) if parts else None


def critic(run: Run) -> Section | None:
    cards = {name: artifact.metrics for name, artifact in run.stages("card").items()}
    figures = ("auroc", "f1", "ece", "parse_failure_rate", "n", "n_correct", "undecided")
    rows: list[list[Cell]] = []
    parts: list[Part] = []
    for name, card in cards.items():
        keys = ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high")
        balanced = dict(zip(("value", "low", "high"), map(card.get, keys), strict=True), n=card["n"])
        rows.append([name, percent(balanced), *(card[figure] for figure in figures)])
        counts = card["histogram"]
        cells = {"the critic": ([b["confidence"] for b in card["reliability"]],
                                [b["accuracy"] for b in card["reliability"]])}  # fmt: skip
        parts += [
            Figure(f"{name}_scores", f"{name}: scores of right and wrong answers.",
                   bars("score", "responses", [str(s) for s in range(1, 11)], counts)),
            Figure(f"{name}_calibration", f"{name}: calibration; the diagonal is perfect.",
                   curves("(score − 1) / 9", "share right", cells | {"perfect": ([0, 1], [0, 1])})),
        ]  # fmt: skip
    columns = ["card", "balanced accuracy, %", *(figure.replace("_", " ") for figure in figures)]
    caption = "Against the checker, on questions the critic never saw."
    return Section("Critic", [Table("critic", caption, columns, rows), *parts]) if rows else None


def thresholds(run: Run) -> Section | None:
    parts: list[Part] = []
    for scored, decided in run.decisions.items():
        rows = pl.read_parquet(run.path(scored, "scored.parquet"))
        curve = threshold_curve(rows, [1 + step / 2 for step in range(19)])
        chosen = run.threshold(decided)
        xs, columns = [row["threshold"] for row in curve], list(curve[0])
        lines = {name: (xs, [row[name] for row in curve]) for name in ("precision", "recall", "yield")}
        pool, name = run.inputs(scored)["responses"], f"threshold_{decided}"
        caption = f"{pool}: what each threshold accepts (dashed: this run's, {chosen:g})."
        parts += [Figure(name, caption, curves("threshold", "share", lines, chosen)),
                  Table(name, caption, columns, [list(row.values()) for row in curve])]  # fmt: skip
    return Section("Thresholds", parts) if parts else None


def selection(run: Run) -> Section | None:
    if not run.decisions:
        return None
    right = (pl.col("verdict") == "correct").mean() * 100
    counts = samples(run).drop_nulls("decision").group_by("stage", "decision").agg(pl.len(), right=right)
    rows = counts.sort("stage", "len", "decision", descending=[False, True, False]).collect().rows()
    figures = {name: run.artifacts[name].metrics for name in run.decisions.values()}
    cells = [[name, key, value] for name, metrics in figures.items() for key, value in metrics.items()
             if isinstance(value, int | float)]  # fmt: skip
    columns = ["pool", "decision", "responses", "right, %"]
    return Section("Selection and pairs", [
        Table("decisions", "What became of each pool.", columns, rows),
        Table("selection", "What selection and pairing report.", ["stage", "figure", "value"], cells),
    ])  # fmt: skip


def lengths(run: Run) -> Section | None:
    if not run.stages("sample"):
        return None
    table = samples(run).group_by("stage").agg(
        responses=pl.len(),
        right=(pl.col("verdict") == "correct").mean() * 100,
        tokens=pl.col("n_tokens").mean(),
        low=pl.col("n_tokens").quantile(0.1),
        high=pl.col("n_tokens").quantile(0.9),
        truncated=pl.col("truncated").mean() * 100,
        distinct=pl.struct("problem_id", "equations_hash").n_unique() / pl.len(),
        score=pl.col("score").mean(),
    )  # fmt: skip
    found = {row["stage"]: row for row in table.collect().iter_rows(named=True)}
    ordered = [found[name] for name in run.stages("sample")]
    columns = ["stage", "responses", "right, %", "tokens", "10 %", "90 %", "truncated, %",
               "equation lists per response", "mean score"]  # fmt: skip
    size = (5.0, 1.0 + 0.22 * len(ordered))
    tokens = [(r["stage"], "", r["tokens"], r["low"], r["high"]) for r in ordered]
    distinct = [(r["stage"], "", r["distinct"], None, None) for r in ordered]
    return Section("Length and diversity", [
        Figure("lengths", "Tokens per response: mean, 10 to 90 %.", dots("tokens", tokens), size),
        Figure("diversity", "Distinct equation lists per response.", dots("share", distinct), size),
        Table("lengths", "Every stage that sampled.", columns, [list(row.values()) for row in ordered]),
    ])  # fmt: skip


def stages(run: Run) -> Section:
    reused = {name for name, cached in run.summary["cached"].items() if cached}
    rows = [[name, made.stage, made.key, made.wall_s, "yes" if name in reused else ""]
            for name, made in run.artifacts.items()]  # fmt: skip
    chart, size = graph({name: sorted(set(run.inputs(name).values())) for name in run.artifacts}, reused)
    columns = ["name", "stage", "key", "seconds", "reused"]
    return Section("Stages", [
        Figure("lineage", "What was made from what (grey: reused from the store).", chart, size),
        Table("stages", "Seconds are of the making, whenever it was.", columns, rows),
    ])  # fmt: skip


SECTIONS = (results, diagnosis, groups, training, critic, thresholds, selection, lengths, stages)


def accuracies(runs: Sequence[Run]) -> Section:
    models = list(dict.fromkeys(name for run in runs for name in run.summary["models"]))
    rows: list[list[Cell]] = []
    for run in runs:
        found = (run.summary["models"].get(name, {}).get("accuracy") for name in models)
        rows.append([str(run.out), run.summary["seed"], *_loss(run), *map(percent, found)])
    return Section("Runs", [Table("runs", "Accuracy, percent.", ["run", "seed", "λ", "β", *models], rows)])


def _loss(run: Run) -> tuple[float, float]:
    loss = run.config["dpo"]["loss"]
    return loss["lam"], loss["beta"]


def lambda_beta(runs: Sequence[Run]) -> Section | None:
    """Final DPO accuracy per cell; a cell is marked if it is not told from the best (paired, Holm)."""
    cells: dict[tuple[float, float], dict[int, pl.DataFrame]] = {}
    for run in runs:
        final = [name for name in run.stages("evaluate") if re.fullmatch(r"eval_dpo(_\d+)?", name)]
        if final:
            answers = pl.read_parquet(run.path(final[-1], "eval.parquet"))
            cells.setdefault(_loss(run), {})[run.summary["seed"]] = answers
    if len(cells) < 2:
        return None
    values = {cell: 100 * fmean(measure(rows, "accuracy")["value"] for rows in seeds.values())
              for cell, seeds in cells.items()}  # fmt: skip
    best = max(values, key=values.__getitem__)
    found = {}
    for cell, seeds in cells.items():
        shared = sorted(seeds.keys() & cells[best].keys())
        if cell != best and shared:
            here, there = ([cells[c][seed] for seed in shared] for c in (cell, best))
            found[cell] = compare_seeds(here, there, "accuracy")
    against = dict(zip(found, adjust(list(found.values())), strict=True))
    marked = {best} | {cell for cell, row in against.items() if row["p_adjusted"] >= 0.05}
    rows: list[list[Cell]] = []
    for cell, value in sorted(values.items()):
        row = against.get(cell, {})
        same = "yes" if cell in marked else ""
        rows.append([*cell, len(cells[cell]), value, percent(row, "delta"), row.get("p_adjusted"), same])
    columns = ["λ", "β", "seeds", "accuracy, %", "− best, points", "p (Holm)", "not told from the best"]
    caption = "Accuracy after DPO, percent. Framed: the best cell and those not told from it (5 %, Holm)."
    chart = Figure("lambda_beta", caption, heat_map("λ", "β", values, marked))
    return Section("λ × β", [chart, Table("lambda_beta", caption, columns, rows)])


SWEEP = (lambda_beta, accuracies)


def write_report(runs: Sequence[Run], export: Path | None = None) -> Path:
    """report.html in the run's folder, or in the one that several share; `export` gets files for a paper."""
    summary, several = runs[0].summary, len(runs) > 1
    found = [section(runs) for section in SWEEP] if several else [section(runs[0]) for section in SECTIONS]
    sections = [section for section in found if section]
    folder = Path(os.path.commonpath([run.out.absolute() for run in runs])) if several else runs[0].out
    facts = [f"{len(runs)} runs"] if several else _facts(summary)
    data = "" if several else packed_samples(runs[0])
    (folder / "report.html").write_text(page(summary["experiment"], facts, sections, data))
    if export:
        write_files(sections, export)
    return folder / "report.html"


def _facts(summary: Mapping[str, Any]) -> list[str]:
    varies = f" (from {summary['seed_from']} on)" if summary["seed_from"] else ""
    reused = f"{sum(summary['cached'].values())} of {len(summary['cached'])} stages reused"
    took = f"{duration(summary['wall_s']['total'])} in all"
    return [f"seed {summary['seed']}{varies}", f"commit {summary['commit'][:12]}", took, reused]
