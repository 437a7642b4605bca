"""What a report shows: each section is a function of a run, None where the run has no data for it.

Another section is one more function in SECTIONS, or in SWEEP for several runs; the page and the export take
whatever they return.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from selfcritique.compare import against_best
from selfcritique.evaluate import measure, threshold_curve
from selfcritique.figures import Figure, Mark, bars, crosses, curves, dots, graph, heat_map
from selfcritique.page import Cell, Part, Section, Table, packed_samples, page, write_files
from selfcritique.progress import duration
from selfcritique.records import GROUPS
from selfcritique.results import Run, measured, samples
from selfcritique.stats import Interval
from selfcritique.suite import METRICS

GAINED = ("gsm8k", "math500", "cmath", "gsm_hard", "mathusereval")  # the other sets are what must not be lost
STEPS = ({"loss"}, {"dpo_loss", "sft_loss"}, {"rewards_margin"}, {"rewards_accuracy"},
         {"chosen_logps_drift", "rejected_logps_drift"})  # fmt: skip


def interval(
    found: Mapping[str, Any] | None, value: str = "value", unit: Callable[[float], float] = float
) -> Interval | None:
    """An estimate of a summary in another unit, None where there is none."""
    if not found or found[value] is None or found["low"] is None:
        return None
    return Interval(unit(found[value]), unit(found["low"]), unit(found["high"]), found["n"])


def percent(found: Mapping[str, Any] | None, value: str = "value") -> Interval | None:
    return interval(found, value, hundredfold)


def hundredfold(share: float) -> float:
    return 100 * share


def _difference(row: Mapping[str, Any]) -> Interval | None:
    """Of a comparison: in points, of 10, or nats per token."""
    return interval(row, "delta", hundredfold if row["metric"] == "accuracy" else float)


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


def probes(run: Run) -> Section | None:
    """The last `critic-card` of this run's critic: each way of reading, floors, and what fools it."""
    from selfcritique.card import MEASURES, measure_of

    cards = measured(run, "card.json")
    if not cards:
        return None
    card = cards[-1]
    readings, first = card["readings"], next(iter(card["readings"]))
    rows = [[name, *(measure_of(reading, name) for reading in readings.values())] for name in MEASURES]
    parts: list[Part] = [Table("readings", f"{card['set']}, {readings[first]['n']:,} responses.",
                               ["", *readings], rows)]  # fmt: skip
    fooled = {probe: [percent(found.get(probe)) for found in card["probes"].values()]
              for probe in card["probes"].get(first, {})}  # fmt: skip
    if fooled:
        bounds = {probe: rate["bound"] for probe, rate in card["probes"][first].items()}
        caption = "How often a response that deserves less reaches the bound, percent."
        marks = [(probe, first, cells[0].value, cells[0].low, cells[0].high)
                 for probe, cells in fooled.items() if cells[0]]  # fmt: skip
        parts += [Figure("probes", f"{caption[:-1]}: {first}.", dots("percent", marks)),
                  Table("probes", caption, ["probe", "bound", *card["probes"]],
                        [[probe, bounds[probe], *cells] for probe, cells in fooled.items()])]  # fmt: skip
    return Section("Critic card and probes", parts)


Evaluated = dict[tuple[str, str, str], tuple[Mapping[str, Any], Mapping[str, Any] | None]]


def _evaluated(run: Run) -> Evaluated:
    """(set, metric, model of the run) -> its latest result of `evaluate` and its comparison."""
    found: Evaluated = {}
    for whole in measured(run, "evaluate.json"):
        names = {label: name for name, label in whole["of"].items()}
        compared = {(row["set"], row["metric"], row["model"]): row for row in whole["comparisons"]}
        for row in whole["results"]:
            if row["model"] in names:
                against = compared.get((row["set"], row["metric"], row["model"]))
                against = against and against | {"b": names.get(against["b"], against["b"])}
                found[row["set"], row["metric"], names[row["model"]]] = row, against
    return found


def evaluations(run: Run) -> Section | None:
    """`evaluate` of this run's models: sets, judge, retention."""
    rows: list[list[Cell]] = []
    subjects: dict[str, dict[str, Cell]] = {}
    for (kind, metric, name), (row, against) in _evaluated(run).items():
        shown, unit, _ = METRICS.get(metric, (metric, float, 2))
        cells: list[Cell] = [None, None, ""]
        if against:
            cells = [_difference(against), against["p_adjusted"], against["b"]]
        rows.append([kind, shown, name, interval(row, unit=unit), row["failed"], *cells])
        for subject, found in row["details"].get("by_subject", {}).items():
            subjects.setdefault(subject, {})[f"{name}, {metric}"] = found["value"]
    if not rows:
        return None
    columns = ["set", "metric", "model", "value", "failed", "difference", "p (Holm)", "against"]
    caption = "By `selfcritique evaluate`, 95 % intervals; differences in points, of 10, or nats per token."
    parts: list[Part] = [Table("evaluations", caption, columns, rows)]
    if subjects:
        by = list(dict.fromkeys(name for found in subjects.values() for name in found))
        cells_of = [[subject, *map(found.get, by)] for subject, found in subjects.items()]
        parts.append(Table("subjects", "MathUserEval by subject, of 10.", ["subject", *by], cells_of))
    return Section("Evaluation sets and judge", parts)


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


def retention(runs: Sequence[Run]) -> Section | None:
    """What each model keeps of everything else (`evaluate`), against what it gained on the run's own test."""
    gains: dict[tuple[str, str], list[tuple[str, Interval, Interval]]] = {}
    for run in runs:
        gained = {row["a"]: percent(row, "delta") for row in run.summary["comparisons"]
                  if row["b"] == "base" and row["metric"] == "accuracy"}  # fmt: skip
        for (kind, metric, name), (_, row) in _evaluated(run).items():
            gain = gained.get(name)
            kept = row and row["b"] == "base" and _difference(row)
            if gain and kept and kind not in GAINED:
                label = name if len(runs) == 1 else f"{run.out.name} {name}"
                gains.setdefault((kind, metric), []).append((label, gain, kept))
    parts: list[Part] = []
    for (kind, metric), marks in gains.items():
        what = {"accuracy": "points", "nll": "nats per token, less is better"}.get(metric, "of 10")
        caption = f"{kind}, {metric}: change against accuracy gained, both − base."
        columns = ["model", "gained, points", f"{kind}, {what}"]
        chart = crosses(columns[1], columns[2], marks)
        parts += [Figure(f"retention_{kind}", caption, chart),
                  Table(f"retention_{kind}", caption, columns, marks)]  # fmt: skip
    return Section("Retention against gain", parts) if parts else None


def _retention(run: Run) -> Section | None:
    return retention([run])


SECTIONS = (results, diagnosis, groups, evaluations, _retention, training, critic, probes, thresholds,
            selection, lengths, stages)  # fmt: skip


def overview(runs: Sequence[Run]) -> Section:
    """Each run with the settings that differ, what it reached, made and reused."""
    names, models = varied(runs), list(dict.fromkeys(name for run in runs for name in run.summary["models"]))
    rows: list[list[Cell]] = []
    marks: list[Mark] = []
    for run in runs:
        found = {name: percent(model["accuracy"]) for name, model in run.summary["models"].items()}
        cached = run.summary["cached"]
        made = f"{len(cached) - sum(cached.values())} of {len(cached)}"
        setting = [flat(run.config).get(name) for name in names]
        rows.append([run.out.name, run.summary["seed"], *setting, *map(found.get, models),
                     made, duration(run.summary["wall_s"]["total"])])  # fmt: skip
        marks += [(run.out.name, name, x.value, x.low, x.high) for name, x in found.items() if x]
    columns = ["run", "seed", *map(_symbol, names), *models, "stages made", "time"]
    caption = "Accuracy, percent, with 95 % intervals. Each run's folder has a report of its own."
    parts: list[Part] = [Table("runs", caption, columns, rows)]
    if marks:
        size = (5.0, 1.2 + 0.2 * len(marks))
        parts.append(Figure("runs", "Accuracy of every run, 95 % intervals.", dots("percent", marks), size))
    return Section("Runs", parts)


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, `data.mix.0.source` in a list of them."""
    if isinstance(settings, list) and settings and all(isinstance(part, Mapping) for part in settings):
        settings = dict(enumerate(settings))
    if not isinstance(settings, Mapping):
        return {name: settings if isinstance(settings, int | float | str) else json.dumps(settings)}
    parts = (flat(value, f"{name}.{key}" if name else key) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings that differ between the runs, the seed and where things lie apart."""
    found = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for settings in found for name in settings)
    apart = ("seed", "store", "name", "threads", "logger")
    return [n for n in names if n not in apart and len({settings.get(n) for settings in found}) > 1]


def _symbol(setting: str) -> str:
    return {"dpo.loss.lam": "λ", "dpo.loss.beta": "β"}.get(setting, setting)


def lambda_beta(runs: Sequence[Run]) -> Section | None:
    """Final accuracy per cell of the settings that differ (λ and β if no others do).

    A cell is marked if it is not told from the best (paired, Holm).
    """
    loss = ["dpo.loss.lam", "dpo.loss.beta"]
    names = loss if set(varied(runs)) <= set(loss) else varied(runs)
    cells: dict[tuple[Any, ...], dict[int, pl.DataFrame]] = {}
    for run in runs:
        if models := list(run.summary["models"]):
            answers = pl.read_parquet(run.path(f"eval_{models[-1]}", "eval.parquet"))
            settings = flat(run.config)
            cells.setdefault(tuple(settings.get(n) for n in names), {})[run.summary["seed"]] = answers
    if len(cells) < 2:
        return None
    best, against = against_best(cells)
    values = {cell: 100 * fmean(measure(rows, "accuracy")["value"] for rows in seeds.values())
              for cell, seeds in cells.items()}  # fmt: skip
    marked = {best} | {cell for cell, row in against.items() if row["p_adjusted"] >= 0.05}
    rows: list[list[Cell]] = []
    for cell, value in values.items():
        row = against.get(cell, {})
        same = "yes" if cell in marked else ""
        rows.append([*cell, len(cells[cell]), value, percent(row, "delta"), row.get("p_adjusted"), same])
    labels = [_symbol(name) for name in names]
    columns = [*labels, "seeds", "accuracy, %", "− best, points", "p (Holm)", "not told from the best"]
    caption = (
        "Accuracy of the last model, percent. Framed: the best cell and those not told from it (5 %, Holm)."
    )
    parts: list[Part] = [Table("lambda_beta", caption, columns, rows)]
    if len(names) == 2 and all(isinstance(value, int | float) for cell in cells for value in cell):
        parts.append(Figure("lambda_beta", caption, heat_map(labels[0], labels[1], values, marked)))
    else:
        best_itself = {"delta": 0.0, "low": 0.0, "high": 0.0}
        gaps = {", ".join(map(str, cell)): against.get(cell, best_itself) for cell in values}
        marks: list[Mark] = [
            (name, "", 100 * gap["delta"], 100 * gap["low"], 100 * gap["high"]) for name, gap in gaps.items()
        ]
        caption = "Difference to the best setting, with its interval over problems and seeds."
        size = (6.0, 0.8 + 0.25 * len(marks))
        parts.append(Figure("settings", caption, dots("− best, points", marks), size))
    return Section(" × ".join(labels), parts)


def diagnoses(runs: Sequence[Run]) -> Section:
    return Section("Diagnosis", [f"{run.out.name}: {line}" for run in runs for line in diagnosis(run).parts])


SWEEP = (lambda_beta, overview, retention, diagnoses)


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
