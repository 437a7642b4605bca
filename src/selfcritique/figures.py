"""Figures of a report by Matplotlib: inline SVG that follows the page's colours, files for a paper."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.patches
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from selfcritique.stats import Interval

PAGE, PAPER = "#010203", "#000000"  # ink; the page's is replaced by currentColor
COLOURS = ("#3f8fe0", "#e0742b", "#2a9d74", "#d1548a", "#c29200", "#8f7bea", "#7d8790")
FILLS = ("#2b6cb0", "#5c6670")  # of nodes, with white text: made, reused
DASHES = ("-", "--", "-.", ":")  # so that curves differ without colour
LEGEND = 4  # names in a line of it
POINTS = 200  # of a curve; longer ones are means over as many equal parts

Curves = Mapping[str, tuple[Sequence[float], Sequence[float | None]]]  # label -> x, y (None: a gap)
Mark = tuple[str, str, float, float | None, float | None]  # row, series, value, low, high


@dataclass(frozen=True)
class Figure:
    """A chart by name; `draw` fills the axes."""

    name: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (5.0, 3.2)  # inches


def _canvas(figure: Figure) -> Canvas:
    """Margins by a rule of thumb, on the left by the longest label: fitting them takes as long as drawing."""
    width, height = figure.size
    canvas = Canvas(figsize=figure.size)
    ax = canvas.add_subplot()
    figure.draw(ax)
    names = [label.get_text() for label in ax.get_yticklabels()]
    room = int(6 * width)  # letters that leave the axes two fifths of the width
    if max(map(len, names), default=0) > room:
        names = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names]
        ax.set_yticks(ax.get_yticks(), names)
    legend = ax.get_legend()
    lines = -(-len(legend.get_texts()) // LEGEND) if legend else 1
    left, top = max(0.6, 0.1 * max(map(len, names), default=0)), 0.12 + 0.22 * lines
    canvas.subplots_adjust(left / width, 0.55 / height, 1 - 0.1 / width, 1 - top / height)
    return canvas


def _style(ink: str) -> Any:
    rc: dict[Any, Any] = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
        "ytick.color": ink, "axes.facecolor": "none", "savefig.facecolor": "none",
        "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#8888884d",
        "axes.titlesize": 11, "axes.titlelocation": "left", "lines.linewidth": 1.6, "font.size": 11,
        "legend.frameon": False, "legend.fontsize": 10, "legend.columnspacing": 1,
        "legend.handletextpad": 0.3, "svg.fonttype": "none", "svg.hashsalt": "selfcritique",
        "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    return matplotlib.rc_context(rc)


def svg(figure: Figure) -> str:
    """As an element of a page, in the colour of its text."""
    text = StringIO()
    with _style(PAGE):
        _canvas(figure).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    whole = whole[whole.index("<svg") :].replace(PAGE, "currentColor").replace("'DejaVu Sans'", "sans-serif")
    whole = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|(?<=<g) id=\"[^\"]*\"", "", whole, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"(?<=<svg)[^>]*(?= viewBox)", "", whole))


def save(figure: Figure, folder: Path) -> None:
    """NAME.svg and NAME.png, black on white."""
    with _style(PAPER):
        canvas = _canvas(figure)
        canvas.savefig(folder / f"{figure.name}.svg", metadata={"Date": None}, facecolor="white")
        canvas.savefig(folder / f"{figure.name}.png", dpi=200, facecolor="white")


def curves(x: str, y: str, lines: Curves, at: float | None = None) -> Callable[[Axes], None]:
    """Lines over a common axis; `at` marks a value of x."""

    def draw(ax: Axes) -> None:
        for number, (label, (xs, ys)) in enumerate(lines.items()):
            values = np.array([xs, [np.nan if v is None else v for v in ys]], dtype=float)
            parts = np.array_split(values, min(POINTS, values.shape[1]), axis=1)
            mean = np.array([part.mean(axis=1) for part in parts])
            marker = "." if 2 < len(parts) < 25 else None
            ax.plot(mean[:, 0], mean[:, 1], DASHES[number % 4], label=label, marker=marker)
        if at is not None:
            ax.axvline(at, color=COLOURS[-1], linestyle="--", linewidth=1)
        if x == "step":
            ax.locator_params(axis="x", integer=True)
        ax.set(xlabel=x, title=y)
        if len(lines) > 1:
            ax.legend()

    return draw


def dots(x: str, marks: Sequence[Mark]) -> Callable[[Axes], None]:
    """A row per label, a dot with its interval per series."""
    rows = list(dict.fromkeys(mark[0] for mark in marks))
    series = list(dict.fromkeys(mark[1] for mark in marks))

    def draw(ax: Axes) -> None:
        for number, name in enumerate(series):
            own = [mark for mark in marks if mark[1] == name]
            shift = (number - (len(series) - 1) / 2) * 0.7 / len(series)
            at = [rows.index(mark[0]) + shift for mark in own]
            ax.plot([mark[2] for mark in own], at, "o", markersize=4, label=name, color=COLOURS[number % 7])
            for place, (_, _, _, low, high) in zip(at, own, strict=True):
                if low is not None and high is not None:
                    ax.plot([low, high], [place, place], color=COLOURS[number % 7])
        ax.set(xlabel=x, yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6))
        if len(series) > 1:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(LEGEND, len(series)))

    return draw


def crosses(x: str, y: str, marks: Sequence[tuple[str, Interval, Interval]]) -> Callable[[Axes], None]:
    """A labelled dot with its intervals per mark, over the lines of no change."""

    def draw(ax: Axes) -> None:
        for number, (label, across, up) in enumerate(marks):
            colour = COLOURS[number % 7]
            ax.plot(across.value, up.value, "o", markersize=4, color=colour, label=label)
            ax.plot([across.low, across.high], [up.value] * 2, color=colour)
            ax.plot([across.value] * 2, [up.low, up.high], color=colour)
        ax.axhline(0, color=COLOURS[-1], linewidth=0.8)
        ax.axvline(0, color=COLOURS[-1], linewidth=0.8)
        ax.set(xlabel=x, title=y)
        ax.legend()

    return draw


def bars(
    x: str, y: str, labels: Sequence[str], series: Mapping[str, Sequence[float]]
) -> Callable[[Axes], None]:
    """Groups of bars beside each other."""

    def draw(ax: Axes) -> None:
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            ax.bar(np.arange(len(labels)) + number * width, values, width, label=name)
        ax.set(xlabel=x, title=y, xticks=np.arange(len(labels)) + 0.4 - width / 2, xticklabels=labels)
        ax.legend()

    return draw


def heat_map(
    x: str, y: str, cells: Mapping[tuple[float, float], float], marked: set[Any]
) -> Callable[[Axes], None]:
    """Values (percent) over a grid of (x, y); marked cells have a frame."""
    xs, ys = (sorted({cell[i] for cell in cells}) for i in (0, 1))

    def draw(ax: Axes) -> None:
        grid = np.array([[cells.get((a, b), np.nan) for a in xs] for b in ys])
        ax.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
        ax.grid(False)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (a, b), value in cells.items():
            at, colour = (xs.index(a), ys.index(b)), "black" if value > middle else "white"
            ax.annotate(f"{value:.1f}", at, ha="center", va="center", color=colour)
            if (a, b) in marked:
                place = (at[0] - 0.44, at[1] - 0.44)
                ax.add_patch(
                    matplotlib.patches.Rectangle(place, 0.88, 0.88, fill=False, edgecolor=colour, lw=2)
                )
        ax.set(xlabel=x, title=y, xticks=range(len(xs)), xticklabels=[f"{v:g}" for v in xs],
               yticks=range(len(ys)), yticklabels=[f"{v:g}" for v in ys])  # fmt: skip

    return draw


def graph(
    inputs: Mapping[str, Sequence[str]], filled: set[str]
) -> tuple[Callable[[Axes], None], tuple[float, float]]:
    """Nodes (in an order in which inputs come first) in layers, joined to what they were made from, and the
    chart's size. An edge that a longer way implies is left out."""
    above: dict[str, set[str]] = {}
    y: dict[str, int] = {}
    x: dict[str, float] = {}
    for node, sources in inputs.items():
        above[node] = set(sources).union(*(above[source] for source in sources))
        y[node] = 1 + max((y[source] for source in sources), default=-1)
    edges = [(a, b) for b in inputs for a in inputs[b] if not any(a in above[c] for c in inputs[b])]
    layers = [[node for node in inputs if y[node] == layer] for layer in range(max(y.values()) + 1)]
    widest = max(map(len, layers))
    for nodes in layers:
        near = {node: fmean([x[a] for a, b in edges if b == node] or [widest / 2]) for node in nodes}
        for number, node in enumerate(sorted(nodes, key=near.__getitem__)):
            x[node] = (number + 0.5) * widest / len(nodes)

    def draw(ax: Axes) -> None:
        for edge in edges:
            ax.plot([x[node] for node in edge], [y[node] for node in edge], color=COLOURS[-1], linewidth=0.8)
        for node in inputs:
            box = {"boxstyle": "round", "facecolor": FILLS[node in filled], "edgecolor": "none"}
            ax.text(x[node], y[node], node, ha="center", va="center", fontsize=9, color="white", bbox=box)
        ax.set(xlim=(0, widest), ylim=(len(layers) - 0.5, -0.5))
        ax.axis("off")

    return draw, (1.6 * widest, 0.9 + 0.42 * len(layers))
