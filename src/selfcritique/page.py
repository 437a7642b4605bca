"""A report as one HTML page that needs nothing else, or as files for a paper."""

import base64
import csv
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique.figures import Figure, save, svg
from selfcritique.results import Run, samples, with_texts
from selfcritique.select import draw
from selfcritique.stats import Interval

MOST_SAMPLES = 20_000
MOST_BYTES = 24 * 2**20  # of the samples, compressed; the rest of the page stays well under 1 MiB
LONG = 12  # rows; a longer table is folded
CHUNK = 500  # samples that are unpacked together
STRATA = ("stage", "verdict", "decision")
INDEX = (*STRATA, "family")  # what the page filters by without the texts
# What LaTeX reads otherwise.
TEX = str.maketrans(
    {**{c: f"\\{c}" for c in "%_&#$"}, "λ": r"$\lambda$", "β": r"$\beta$", "−": "$-$", "–": "--"}
)

Cell = str | int | float | Interval | None


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
    parts: Sequence["Part"]

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return _section(self)


Part = Table | Figure | str  # a string is a paragraph


def page(title: str, facts: Sequence[str], sections: Sequence[Section], data: str) -> str:
    """The HTML; data: scripts of `packed_samples`, or nothing."""
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
    reached = ' tabindex="0"' if wide else ""  # by the keyboard, to scroll
    drawn = svg(figure).replace("<svg", f'<svg{wide} role="img" aria-label="{escape(figure.caption)}"', 1)
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f'<figure><div class="scroll"{reached}>{drawn}</div>{caption}</figure>'


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
    """A cell as text: four digits; an interval with the decimals that its width leaves, at least one."""
    match cell:
        case None:
            return "–"
        case Interval():
            width = cell.high - cell.low
            digits = max(1, 1 - math.floor(math.log10(width))) if width > 0 else 1
            return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
        case float():
            return f"{cell:.4g}"
        case int():
            return f"{cell:,}"
    return cell


def pick(rows: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most so many rows, each stratum in proportion and none left out while there is room for one of
    each; the draw depends on response ids alone. In the page's order: by stage and problem."""
    place = pl.col("drawn").rank("ordinal").over(STRATA)
    drawn = rows.with_columns(drawn=draw(0)).with_columns(at=(place - 1) / pl.len().over(STRATA))
    return drawn.sort("at", "drawn").head(most).sort("stage", "problem_id", "response_id").drop("at", "drawn")


def packed_samples(run: Run) -> str:
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


def _coded(column: pl.Series) -> Mapping[str, Any]:
    names = sorted(column.drop_nulls().unique())
    code = {name: i for i, name in enumerate(names)}
    return {"names": names, "codes": [code.get(value, -1) for value in column]}


def _packed(value: object) -> str:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


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
        return " & ".join(cell.translate(TEX) for cell in cells) + r" \\"

    ends = "".join(
        "l" if all(isinstance(row[i], str) for row in table.rows) else "r" for i in range(len(table.columns))
    )
    rows = [line([shown(cell) for cell in row]) for row in table.rows]
    return "\n".join([f"\\begin{{tabular}}{{{ends}}}", r"\toprule", line(table.columns), r"\midrule", *rows,
                      r"\bottomrule", r"\end{tabular}", ""])  # fmt: skip
