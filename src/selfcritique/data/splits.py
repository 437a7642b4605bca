"""The seven splits: disjoint by normalised question text, mixed from the sources by weight."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import accumulate, pairwise

import polars as pl

from selfcritique.config import DataConfig, SourceConfig, SplitsConfig
from selfcritique.data.sources import streams
from selfcritique.errors import UserError
from selfcritique.records import Problem, Split

MAX_REPEATS = 10_000  # repeated questions in a row after which an endless source has no new ones


def normalise(question: str) -> str:
    """NFKC, lower case, without spaces and punctuation; operators stay, since they carry the meaning."""
    text = unicodedata.normalize("NFKC", question).lower()
    return re.sub(r"[^\w+\-*/=<>^%]|_", "", text)


def build_splits(config: DataConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """Problems with their split, and counts: repeats dropped, test questions removed from training pools,
    near-duplicates (test questions that equal a training question up to the numbers)."""
    seen: dict[str, str] = {}
    counts = {"repeats": 0, "removed_from_training": 0}
    rows: list[dict[str, object]] = []
    sizes = _sizes(config)
    training = []
    # Every test first: a question that stands in both, of whatever source, is removed from training.
    for index, (source, wanted) in enumerate(zip(config.mix, sizes, strict=True)):
        stream, test = streams(source, config.seed + 7919 * index)
        taken = list(_take(test, Split.test, wanted[Split.test], seen, counts))
        rows += taken or _all(stream, source, Split.test, wanted, seen, counts)
        training.append(stream)
    for stream, source, wanted in zip(training, config.mix, sizes, strict=True):
        for split in Split:
            if split is not Split.test:
                rows += _all(stream, source, split, wanted, seen, counts)
    table = pl.DataFrame(rows)
    # Sources alternate within a split, so that the first n problems of a split are a mixture too.
    table = table.sort("split", pl.col("problem_id").hash(seed=0)) if len(config.mix) > 1 else table
    counts["near_duplicates"] = _near_duplicates(table)
    return table, counts


def _sizes(config: DataConfig) -> list[dict[Split, int]]:
    """Each source's part of every split, by weight; the parts add up to the split."""
    ends = list(accumulate(source.weight for source in config.mix))
    shares = [end / ends[-1] for end in (0.0, *ends)]
    splits = {Split(f.name): getattr(config.splits, f.name) for f in fields(SplitsConfig)}
    return [
        {split: round(size * end) - round(size * start) for split, size in splits.items()}
        for start, end in pairwise(shares)
    ]


def _all(
    stream: Iterator[Problem],
    source: SourceConfig,
    split: Split,
    sizes: dict[Split, int],
    seen: dict[str, str],
    counts: dict[str, int],
) -> list[dict[str, object]]:
    """As many problems as the split wants of the source, or an error."""
    taken = list(_take(stream, split, sizes[split], seen, counts))
    if len(taken) < sizes[split]:
        raise UserError(
            f"data: source {source.source.value} {source.path} has {len(taken)} problems left for split "
            f"{split.value}, which wants {sizes[split]}. Lower data.splits.{split.value} or add problems."
        )
    return taken


def _take(
    stream: Iterator[Problem], split: Split, size: int, seen: dict[str, str], counts: dict[str, int]
) -> Iterator[dict[str, object]]:
    taken = repeats = 0
    while taken < size and repeats < MAX_REPEATS:
        problem = next(stream, None)
        if problem is None:
            return
        text = normalise(problem.question)
        if text in seen:
            tested = seen[text] == Split.test and split is not Split.test
            counts["removed_from_training" if tested else "repeats"] += 1
            repeats += 1
            continue
        seen[text] = split.value
        taken, repeats = taken + 1, 0
        yield {"problem_id": problem.id, "split": split.value, **asdict(problem)}


def _near_duplicates(table: pl.DataFrame) -> int:
    masked = table.select("split", text=pl.col("question").str.replace_all(r"\d+", "0"))
    test = masked.filter(pl.col("split") == Split.test)
    return test.join(masked.filter(pl.col("split") != Split.test), on="text", how="semi").height
