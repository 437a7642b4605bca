"""What became of one response: from its question through critique and selection to the steps it trained."""

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from selfcritique.errors import UserError
from selfcritique.results import Run, samples, with_texts


def explain(run: Run, prefix: str) -> Iterator[str]:
    """Paragraphs about the response whose id begins so."""
    rows = samples(run).filter(pl.col("response_id").str.starts_with(prefix)).collect()
    ids = rows["response_id"].unique().sort().to_list()
    if not ids:
        pool = next(iter(run.stages("sample")), None)
        where = f", and in files such as {run.path(pool, 'responses.parquet')}" if pool else ""
        raise UserError(
            f"No response of {run.out} has an id that begins with {prefix!r}. Ids are in its report.html, "
            f"under Samples{where}."
        )
    if len(ids) > 1:
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise UserError(f"{len(ids)} responses begin with {prefix!r}: {shown}. Give more digits.")
    found = with_texts(run, rows.sort("stage"))
    first = found[0]
    yield f"Response {ids[0]} of {run.out}, sampled in {', '.join(row['stage'] for row in found)}"
    kind = ", ".join(str(first[name]) for name in ("source", "family", "register") if first[name])
    yield f"\nQuestion ({kind}):\n{first['question']}"
    yield f"\nReference (answer {first['gold']}):\n{first['reference'] or '-'}"
    yield f"\nResponse ({first['n_tokens']} tokens{', cut off' * first['truncated']}):\n{first['response']}"
    yield f"\nChecker: {first['verdict']}, {first['answer'] or 'no answer'} for {first['gold']}"
    for row in found:
        yield from _judged(run, row)
    used = list(_uses(run, ids[0]))
    yield "\nTrained on: " + ("; ".join(used) if used else "by no stage of this run")


def _judged(run: Run, row: Mapping[str, Any]) -> Iterator[str]:
    """The critic's reading in one stage, and what followed from it."""
    for number, critique in enumerate(row["critiques"], 1):
        said = (
            critique["parse"] if critique["score"] is None else f"{critique['score']:g} ({critique['parse']})"
        )
        yield f"\nCritique {number} in {row['stage']}, score {said}:\n{critique['text']}"
    if row["decision"] is None:
        return
    decided = run.decisions[run.scores[row["stage"]]]
    score = "no score" if row["score"] is None else f"score {row['score']:.3g}"
    yield f"\n{decided}: {row['decision']} ({score}, threshold {run.threshold(decided):g})"
    for pair in row["partners"]:
        yield f"  paired with {pair['partner']}, score {pair['score']:.3g}, margin {pair['margin']:.3g}"


def _uses(run: Run, response_id: str) -> Iterator[str]:
    """Each stage that trained on the response, with its steps."""
    for name in run.stages("sft") | run.stages("dpo"):
        inputs = run.inputs(name)
        if "pairs" in inputs:
            rows = pl.read_parquet(run.path(inputs["pairs"], "pairs.parquet"))
            hit = (pl.col("chosen_id") == response_id) | (pl.col("rejected_id") == response_id)
        else:
            rows = pl.read_parquet(run.path(inputs["examples"], "examples.parquet"))
            hit = pl.col("response_id") == response_id
        places = rows.select(pl.arg_where(hit)).to_series().implode()
        trained = pl.read_parquet(run.path(name, "trained.parquet"))
        steps = trained.filter(pl.col("example").is_in(places))["step"].unique().sort()
        if len(places.item()):
            shown = ", ".join(map(str, steps)) or "none (too long)"
            yield f"{name}, steps {shown} of {run.artifacts[name].metrics['steps']}"
