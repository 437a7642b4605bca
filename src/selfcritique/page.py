"""The report: sections of tables and figures on one HTML page that needs nothing else, or as files.

A section is a function of a run that returns None where the run has no data for it; another one is one more
function in SECTIONS (or SWEEP, over several runs). The page and the export take whatever they return.
"""

import base64
import csv
import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique.compare import adjust, compare_seeds
from selfcritique.evaluate import measure, threshold_curve
from selfcritique.figures import Figure, bars, curves, dots, graph, heat_map, save, svg
from selfcritique.progress import duration
from selfcritique.results import GROUPS, Run, samples, with_texts
from selfcritique.select import draw
from selfcritique.stats import Interval

MOST_SAMPLES = 20_000
MOST_BYTES = 24 * 2**20  # of the samples, compressed; the rest of the page stays well under 1 MiB
LONG = 12  # rows; a longer table is folded
CHUNK = 500  # samples that are unpacked together
STRATA = ("stage", "verdict", "decision")
INDEX = (*STRATA, "family")  # what the page filters by without the texts
STEPS = ({"loss"}, {"dpo_loss", "sft_loss"}, {"rewards_margin"}, {"rewards_accuracy"},
         {"chosen_logps_drift", "rejected_logps_drift"})  # fmt: skip

Cell = str | int | float | Interval | None
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows by name, as a table of a paper has them; an interval is three columns of the CSV."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[Table | Figure | str]


def percent(found: Json | None, value: str = "value") -> Interval | None:
    """A share with its interval, as percent."""
    if not found or found.get(value) is None:
        return None
    low, high = (found["low"], found["high"]) if "low" in found else found[f"{value}_interval"]
    return Interval(100 * found[value], 100 * low, 100 * high, found["n"])


# ---- sections ------------------------------------------------------------------------------------------


def results(run: Run) -> Section | None:
    models = run.summary["models"]
    if not models:
        return None
    metrics = ["accuracy", *(name for name in next(iter(models.values())) if "@" in name)]
    found = {
        (name, metric): percent(model.get(metric)) for name, model in models.items() for metric in metrics
    }
    parts: list[Table | Figure | str] = [
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
    parts: list[Table | Figure | str] = []
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
    parts: list[Table | Figure | str] = []
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
    parts: list[Table | Figure | str] = []
    for scored, decided in run.decisions.items():
        rows = pl.read_parquet(run.path(scored, "scored.parquet"))
        curve = threshold_curve(rows, [1 + step / 2 for step in range(19)])
        config = run.artifacts[decided].manifest["config"]
        chosen = config.get("select", config.get("build"))["threshold"]
        xs, columns = [row["threshold"] for row in curve], list(curve[0])
        lines = {name: (xs, [row[name] for row in curve]) for name in ("precision", "recall", "yield")}
        pool, name = run.inputs(scored)["responses"], f"threshold_{decided}"
        caption = f"{pool}: what each threshold accepts (dashed: this run's, {chosen:g})."
        parts += [Figure(name, caption, curves("threshold", "share", lines, chosen)),
                  Table(name, caption, columns, [list(row.values()) for row in curve])]  # fmt: skip
    return Section("Thresholds", parts) if parts else None


def selection(run: Run) -> Section | None:
    right = (pl.col("verdict") == "correct").mean() * 100
    counts = samples(run).drop_nulls("decision").group_by("stage", "decision").agg(pl.len(), right=right)
    rows = counts.sort("stage", "len", "decision", descending=[False, True, False]).collect().rows()
    figures = {name: run.artifacts[name].metrics for name in run.decisions.values()}
    cells = [[name, key, value] for name, metrics in figures.items() for key, value in metrics.items()
             if isinstance(value, int | float)]  # fmt: skip
    if not rows:
        return None
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
    chart, size = graph({name: set(run.inputs(name).values()) for name in run.artifacts}, reused)
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
            rows = pl.read_parquet(run.path(final[-1], "eval.parquet"))
            cells.setdefault(_loss(run), {})[run.summary["seed"]] = rows
    if len(cells) < 2:
        return None
    values = {cell: 100 * sum(measure(rows, "accuracy")["value"] for rows in seeds.values()) / len(seeds)
              for cell, seeds in cells.items()}  # fmt: skip
    best = max(values, key=values.__getitem__)
    found = {}
    for cell, seeds in cells.items():
        shared = sorted(seeds.keys() & cells[best].keys())
        if cell != best and shared:
            sides = ([cells[c][seed] for seed in shared] for c in (cell, best))
            found[cell] = compare_seeds(*sides, "accuracy")
    against = dict(zip(found, adjust(list(found.values())), strict=True))
    marked = {best} | {cell for cell, row in against.items() if row["p_adjusted"] >= 0.05}
    rows: list[list[Cell]] = []
    for cell, value in sorted(values.items()):
        row = against.get(cell, {})
        same = "yes" if cell in marked else ""
        rows.append([*cell, len(cells[cell]), value, percent(row, "delta"), row.get("p_adjusted"), same])
    columns = ["λ", "β", "seeds", "accuracy, %", "− best, points", "p (Holm)", "as good as the best"]
    caption = "Accuracy after DPO, percent. Framed: the best cell and those not told from it (5 %, Holm)."
    chart = Figure("lambda_beta", caption, heat_map("λ", "β", values, marked))
    return Section("λ × β", [chart, Table("lambda_beta", caption, columns, rows)])


SWEEP = (lambda_beta, accuracies)


# ---- the page ------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Run], export: Path | None = None) -> Path:
    """report.html in the run's folder, or in the one that several share; `export` gets files for a paper."""
    run = runs[0]
    many = len(runs) > 1
    found = [section(runs) for section in SWEEP] if many else [section(run) for section in SECTIONS]
    sections = [section for section in found if section]
    folder = Path(os.path.commonpath([r.out.absolute() for r in runs])) if many else run.out
    facts = [f"{len(runs)} runs"] if many else _facts(run.summary)
    data = "" if many else _samples(run)
    (folder / "report.html").write_text(_page(run.summary["experiment"], facts, sections, data))
    if export:
        write_files(sections, export)
    return folder / "report.html"


def _facts(summary: Json) -> list[str]:
    varies = f" (from {summary['seed_from']} on)" if summary["seed_from"] else ""
    reused = f"{sum(summary['cached'].values())} of {len(summary['cached'])} stages reused"
    took = f"{duration(summary['wall_s']['total'])} in all"
    return [f"seed {summary['seed']}{varies}", f"commit {summary['commit'][:12]}", took, reused]


def _page(title: str, facts: Sequence[str], sections: Sequence[Section], data: str) -> str:
    names = [section.title for section in sections]
    parts = {
        "title": escape(title),
        "facts": "".join(f"<li>{escape(fact)}</li>" for fact in facts),
        "nav": "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in names)
        + ('<a href="#samples">Samples</a>' if data else ""),
        "sections": "\n".join(map(_section, sections)),
        "data": data,
    }
    for name in ("css", "js"):
        parts[name] = _web(f"report.{name}")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], _web("report.html"))


def _web(name: str) -> str:
    return (resources.files("selfcritique") / "web" / name).read_text()


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _section(section: Section) -> str:
    figures = "".join(_figure(part) for part in section.parts if isinstance(part, Figure))
    tables = "".join(_table(part) for part in section.parts if isinstance(part, Table))
    texts = "".join(f"<p>{escape(part)}</p>" for part in section.parts if isinstance(part, str))
    body = f'<div class="figures">{figures}</div><div class="tables">{tables}</div>{texts}'
    return f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>{body}</section>'


def _figure(figure: Figure) -> str:
    wide = f' class="wide" style="min-width:{90 * figure.size[0]:.0f}px"' if figure.size[0] > 6 else ""
    drawn = svg(figure).replace("<svg", f'<svg{wide} role="img" aria-label="{escape(figure.caption)}"', 1)
    return (
        f'<figure><div class="scroll">{drawn}</div><figcaption>{escape(figure.caption)}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    opened = " open" if len(table.rows) <= LONG else ""
    return (f'<details{opened}><summary>{escape(table.caption)}</summary><div class="scroll" tabindex="0">'
            f'<table id="table-{table.name}"><tr>{head}</tr>{rows}</table></div></details>')  # fmt: skip


def _cell(cell: Cell) -> str:
    kind = "text" if isinstance(cell, str) else "number"
    return f'<td class="{kind}">{escape(shown(cell))}</td>'


def shown(cell: Cell) -> str:
    """A cell as text: four digits; an interval with one decimal."""
    match cell:
        case None:
            return "–"
        case Interval():
            return f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]"
        case float():
            return f"{cell:.4g}"
        case int():
            return f"{cell:,}"
    return cell


# ---- samples -------------------------------------------------------------------------------------------


def pick(rows: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most so many rows, each stratum in proportion and none left out while there is room for one of
    each; the draw depends on response ids alone. In the page's order: by stage and problem."""
    place = pl.col("drawn").rank("ordinal").over(STRATA)
    drawn = rows.with_columns(drawn=draw(0)).with_columns(at=(place - 1) / pl.len().over(STRATA))
    return drawn.sort("at", "drawn").head(most).sort("stage", "problem_id", "response_id").drop("at", "drawn")


def _samples(run: Run) -> str:
    """The page's samples: an index, and their texts in chunks."""
    if not run.stages("sample"):
        return ""
    rows = samples(run).collect()
    most = MOST_SAMPLES
    while True:
        chosen = pick(rows, most)
        whole = with_texts(run, chosen.drop("equations_hash"))
        texts = [_packed(whole[start : start + CHUNK]) for start in range(0, len(whole), CHUNK)]
        size = sum(map(len, texts))
        if size <= MOST_BYTES:
            break
        most = int(0.95 * chosen.height * MOST_BYTES / size)
    index = {name: _coded(chosen[name]) for name in INDEX} | {
        "problem": chosen["problem_id"].rank("dense").to_list(),
        "id": chosen["response_id"].to_list(),
        "score": chosen["score"].to_list(),
        "total": rows.height,
        "chunk": CHUNK,
    }
    scripts = [f'<script type="text/plain" id="index">{_packed(index)}</script>']
    scripts += [f'<script type="text/plain" class="chunk">{text}</script>' for text in texts]
    return "\n".join(scripts)


def _coded(column: pl.Series) -> Json:
    names = sorted(column.drop_nulls().unique())
    code = {name: i for i, name in enumerate(names)}
    return {"names": names, "codes": [code.get(value, -1) for value in column]}


def _packed(value: object) -> str:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


# ---- files for a paper ---------------------------------------------------------------------------------


def write_files(sections: Sequence[Section], folder: Path) -> None:
    """Every figure as SVG and PNG, every table as CSV and LaTeX (booktabs)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Figure):
            save(part, folder)
        elif isinstance(part, Table):
            with (folder / f"{part.name}.csv").open("w", newline="") as lines:
                csv.writer(lines).writerows(_plain(part))
            (folder / f"{part.name}.tex").write_text(_latex(part))


def _plain(table: Table) -> Iterator[list[Any]]:
    """The table with numbers in full, an interval as three columns."""
    wide = [any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.columns))]
    yield [
        name
        for c, w in zip(table.columns, wide, strict=True)
        for name in ([c, f"{c} low", f"{c} high"] if w else [c])
    ]
    for row in table.rows:
        cells: list[Any] = []
        for cell, w in zip(row, wide, strict=True):
            if w:
                cells += [cell.value, cell.low, cell.high] if isinstance(cell, Interval) else [None] * 3
            else:
                cells.append(cell)
        yield cells


def _latex(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(re.sub(r"([%_&#$])", r"\\\1", cell) for cell in cells) + r" \\"

    ends = "".join(
        "l" if all(isinstance(row[i], str) for row in table.rows) else "r" for i in range(len(table.columns))
    )
    rows = [line([shown(cell) for cell in row]) for row in table.rows]
    return "\n".join([f"\\begin{{tabular}}{{{ends}}}", r"\toprule", line(table.columns), r"\midrule", *rows,
                      r"\bottomrule", r"\end{tabular}", ""])  # fmt: skip
