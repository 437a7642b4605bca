"""Human annotation: a blind sheet goes out, marks come back, agreement with the critic is measured.

A sheet is drawn from one stage of a finished run, evenly over the bands of its scores, and shows none of
them. `stage=gate_scores` asks how good the critic is on unseen questions. `stage=critic_data` marks again
what the critic is taught (its scores are the annotator's): what comes back is the file of `annotator=file`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import polars as pl

from selfcritique.annotate import band
from selfcritique.compare import markdown_table
from selfcritique.errors import UserError
from selfcritique.evaluate import score_agreement
from selfcritique.results import Run

COLUMNS = ("id", "question", "reference", "response", "score", "comment")
_SCORES = {"score": "scored.parquet", "critic_data": "examples.parquet"}  # stage -> where its scores stand
_FORMULA = tuple("=+-@\t\r＝＋－＠")  # a cell that starts so would be computed by a spreadsheet program
_SHOWN = 20  # mistakes of one sheet told of at once


class Mark(NamedTuple):
    score: int  # 1 to 10
    comment: str


def load_scored(run: Run, stage: str) -> pl.DataFrame:
    """One row per scored response of a stage: response_id, score, question, reference, response."""
    stages = [name for name, made in run.artifacts.items() if made.stage in _SCORES]
    if stage not in stages:
        raise UserError(f"stage={stage}: the run has no such scores; it has {', '.join(stages) or 'none'}.")
    made_from = run.inputs(stage)
    problems, responses = (
        pl.scan_parquet(run.path(made_from[role], f"{role}.parquet")) for role in ("problems", "responses")
    )
    shown = pl.when(pl.col("reference") == "").then("answer").otherwise("reference")
    questions = problems.select("problem_id", "question", reference=shown).unique("problem_id")
    texts = responses.select("problem_id", "response_id", response="text")
    return (
        pl.scan_parquet(run.path(stage, _SCORES[run.artifacts[stage].stage]))
        .select("response_id", pl.col("score").cast(pl.Float64))
        .join(texts, on="response_id", how="inner", maintain_order="left")
        .join(questions, on="problem_id", how="inner", maintain_order="left")
        .drop("problem_id")
        .collect()
    )


def draw(scored: pl.DataFrame, n: int, seed: int) -> pl.DataFrame:
    """Up to `n` different scored responses, as even over the bands as they allow, in random order."""
    shuffled = (
        scored.drop_nulls("score")
        .unique(["question", "response"], keep="first", maintain_order=True)
        .sample(fraction=1.0, shuffle=True, seed=seed)
    )
    bands = pl.Series([band(int(score)) for score in shuffled["score"]], dtype=pl.String)
    turn = pl.int_range(pl.len()).over("band")
    chosen = shuffled.with_columns(band=bands).with_columns(turn=turn).sort("turn", maintain_order=True)
    return chosen.head(n).drop("band", "turn").sample(fraction=1.0, shuffle=True, seed=seed + 1)


def write_sheet(drawn: pl.DataFrame, path: Path) -> None:
    """CSV with a byte-order mark, for spreadsheet programs; refuses to replace a sheet that may be filled."""
    if path.exists():
        raise UserError(f"out={path} exists and may hold marks; name another file.")
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(COLUMNS)
        for row in drawn.iter_rows(named=True):
            texts = (_as_text(row[name]) for name in ("question", "reference", "response"))
            sheet.writerow([_sheet_id(row["response_id"]), *texts, "", ""])


def _sheet_id(response_id: str) -> str:
    """Begins with a letter: 16 hexadecimal digits such as 12e4567890123456 would be read as a number."""
    return f"r{response_id}"


def _as_text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def read_sheet(path: Path, scored: pl.DataFrame) -> dict[str, Mark]:
    """Response id -> mark; rows without a score are not marked yet. All mistakes are raised together."""
    if not path.is_file():
        raise UserError(f"sheet={path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as `CSV UTF-8` in the spreadsheet program.") from None
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # which one is written depends on the locale
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restval="")
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; keep the first row of the sheet.")
    responses = {_sheet_id(i): (i, text) for i, text in scored.select("response_id", "response").iter_rows()}
    marks: dict[str, Mark] = {}
    seen: set[str] = set()
    mistakes = []
    for row in reader:
        if any(row[name].strip() for name in COLUMNS):
            mistake = _mistake(row, responses, seen)
            seen.add(row["id"])
            if mistake:
                mistakes.append(f"{path}:{reader.line_num}: {mistake}")
            elif row["score"].strip():
                marks[responses[row["id"]][0]] = Mark(int(row["score"]), row["comment"].strip())
    if mistakes:
        rest = f"\nand {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise UserError("\n".join(mistakes[:_SHOWN]) + rest)
    if not marks:
        raise UserError(f"{path}: no row has a score; write whole numbers from 1 to 10 into that column.")
    return marks


def _mistake(row: Mapping[str, str], responses: Mapping[str, tuple[str, str]], seen: set[str]) -> str:
    if row["id"] not in responses:
        return f"id {row['id']!r} is no response of this run and stage; give the stage= of the export"
    if row["id"] in seen:
        return f"id {row['id']} stands in the sheet twice; delete one of the rows"
    original = _as_text(responses[row["id"]][1]).replace("\r\n", "\n").replace("\r", "\n")
    if row["response"] != original:
        return "the response was changed, so the mark is of another text; put it back as it was exported"
    if row["score"].strip() not in {"", *map(str, range(1, 11))}:
        return f"score {row['score']!r} is not a whole number from 1 to 10"
    return ""


def agreement(marks: Mapping[str, Mapping[str, Mark]], scored: pl.DataFrame) -> list[dict[str, Any]]:
    """Every two annotators, and each with the stage's own scores, on the responses that both scored."""
    raters: dict[str, dict[str, float]] = {
        name: {i: float(mark.score) for i, mark in of.items()} for name, of in marks.items()
    }
    raters["critic"] = dict(scored.select("response_id", "score").drop_nulls().iter_rows())
    rows = []
    for (a, x), (b, y) in combinations(raters.items(), 2):
        shared = sorted(x.keys() & y.keys())
        series = (pl.Series([of[i] for i in shared], dtype=pl.Float64) for of in (x, y))
        rows.append({"a": a, "b": b, **score_agreement(*series)})
    return rows


def write_annotations(marks: Sequence[Mapping[str, Mark]], path: Path) -> int:
    """The CSV of `annotator=file`; returns its number of responses.

    Of several marks the (lower) median counts; the analysis is the first comment that came with that score.
    """
    by_id: dict[str, list[Mark]] = {}
    for of in marks:
        for response_id, mark in of.items():
            by_id.setdefault(response_id, []).append(mark)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("response_id", "score", "analysis"))
        for response_id, given in sorted(by_id.items()):
            score = median_low(mark.score for mark in given)
            comments = (mark.comment for mark in given if mark.score == score and mark.comment)
            rows.writerow((response_id, score, next(comments, "")))
    return len(by_id)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `agreement`; what the marks do not define is a dash."""
    measures = ("kappa_quadratic", "kappa", "spearman", "mean_absolute_difference")
    head = ("scores", "n", "κ, quadratic", "κ of ≥ 6", "rank correlation", "mean distance")
    return markdown_table(
        head,
        [
            [f"{r['a']} – {r['b']}", str(r["n"]), *("-" if r[m] is None else f"{r[m]:.3f}" for m in measures)]
            for r in rows
        ],
    )
