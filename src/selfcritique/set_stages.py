"""Stages of `selfcritique evaluate`; those it shares with a run (checkpoint, sample) are in `stages.py`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique.config import EngineConfig, EvalSet, PromptStyle, Reference
from selfcritique.data import sets
from selfcritique.errors import UserError
from selfcritique.progress import Progress
from selfcritique.records import Message, Problem, Prompt
from selfcritique.stages import Inputs, Metrics, complete, journaled, open_engine, served


def read_problems(inputs: Inputs) -> pl.DataFrame:
    return pl.read_parquet(inputs["problems"].path / "problems.parquet")


@dataclass
class LoadSet:
    set: EvalSet
    hub: str
    limit: int
    supplement: bool
    path: str = field(default="", metadata={"content": True})
    references: str = field(default="", metadata={"content": True})


def load_set(config: LoadSet, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """problems.parquet: the questions of one set."""
    table, counts = sets.load_set(
        config.set, config.path, config.hub, config.references, config.limit, config.supplement
    )
    table.write_parquet(out / "problems.parquet")
    return counts


@dataclass
class Converse:
    engine: EngineConfig
    max_tokens: int


def converse(config: Converse, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """responses.parquet: `model`'s greedy answers, each turn after its own answers to those before."""
    from selfcritique.engine.base import SamplingParams

    asked = read_problems(inputs).select("problem_id", "turns").rows()
    talks: list[list[Message]] = [[] for _ in asked]
    params, rows = SamplingParams(1, 0.0, config.max_tokens, 0), []
    with open_engine(config.engine, inputs["model"].path, out) as engine:
        for turn in range(max(len(turns) for _, turns in asked)):
            here = [i for i, (_, turns) in enumerate(asked) if turn < len(turns)]
            for i in here:
                talks[i].append(Message("user", asked[i][1][turn]))
            prompts = [Prompt(tuple(talks[i])) for i in here]
            for k, _, text, n, cut in complete(engine, prompts, params, out, progress, f"turn{turn}"):
                talks[here[k]].append(Message("assistant", text))
                rows.append((asked[here[k]][0], turn, text, n, cut))
    table = pl.DataFrame(rows, schema=["problem_id", "turn", "text", "n_tokens", "truncated"], orient="row")
    table.write_parquet(out / "responses.parquet")
    return {"responses": table.height, "truncated": int(table["truncated"].sum()), **served(engine)}


@dataclass
class Judge:
    set: EvalSet
    engine: EngineConfig
    max_tokens: int
    critic: bool  # ask as the pipeline asks its critic, not by the set's protocol
    style: PromptStyle
    prompt_file: str = field(default="", metadata={"content": True})


def judge(config: Judge, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """judged.parquet: every answer with the verdict of `judge` (greedy) and what was read from it."""
    from selfcritique.critique import parse_score
    from selfcritique.engine.base import SamplingParams
    from selfcritique.judge import Rating, parse_rating, published_rating
    from selfcritique.prompts import DIMENSIONS

    answers = pl.read_parquet(inputs["responses"].path / "responses.parquet")
    rows = answers.select("problem_id", "turn", answer="text").join(
        read_problems(inputs), on="problem_id", maintain_order="left"
    )
    earlier = {(p, t): text for p, t, text in answers.select("problem_id", "turn", "text").iter_rows()}
    prompts = [_judge_prompt(config, row, earlier) for row in rows.iter_rows(named=True)]
    checkpoint = inputs["judge"].path if "judge" in inputs else None
    with open_engine(config.engine, checkpoint, out) as engine:
        said = complete(engine, prompts, SamplingParams(1, 0.0, config.max_tokens, 0), out, progress)
    names = tuple(DIMENSIONS) if config.set is EvalSet.mathusereval else ()
    texts = [text for _, _, text, _, _ in said]
    cuts = [cut for *_, cut in said]
    if config.critic:
        read = [Rating(score, {}, parse) for score, parse in map(parse_score, texts, cuts)]
    else:
        read = [parse_rating(text, cut, names) for text, cut in zip(texts, cuts, strict=True)]
    table = rows.select("problem_id", "turn", "source", "family", "subject").with_columns(
        score=pl.Series([r.score for r in read], dtype=pl.Float64),
        parse=pl.Series([r.parse.value for r in read]),
        published=pl.Series([published_rating(text) for text in texts]),
        dimensions=pl.Series([json.dumps(r.dimensions, ensure_ascii=False) for r in read]),
        verdict=pl.Series(texts),
    )
    table.write_parquet(out / "judged.parquet")
    return {"answers": table.height, "failed": table["score"].null_count(), **served(engine)}


def _judge_prompt(config: Judge, row: Mapping[str, Any], answers: Mapping[tuple[str, int], str]) -> Prompt:
    from selfcritique.prompts import MATHUSEREVAL, MT_BENCH, MT_BENCH_ZH, critique_prompt, judge_prompt

    turns, turn = row["turns"], row["turn"]
    reference = "\n\n".join(row["references"][: turn + 1]).strip()
    if config.critic:
        problem = Problem(turns[turn], reference, reference, row["source"])
        return critique_prompt(config.style, problem, row["answer"], Reference.solution)
    before = [
        f"User: {turns[t]}\n\nAssistant: {answers[row['problem_id'], t]}\n\nUser: " for t in range(turn)
    ]
    own = {EvalSet.mathusereval: MATHUSEREVAL, EvalSet.mt_bench: MT_BENCH, EvalSet.mt_bench_zh: MT_BENCH_ZH}
    template = Path(config.prompt_file).expanduser().read_text() if config.prompt_file else own[config.set]
    return judge_prompt(template, "".join(before) + turns[turn], reference, row["answer"], row["family"])


@dataclass
class Choose:
    engine: EngineConfig


def choose(config: Choose, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """choices.parquet: per question the letter likeliest as the whole answer, and what else was likely."""
    from selfcritique.prompts import choice_prompt

    asked = read_problems(inputs)
    choices = asked["choices"].to_list()
    letters = sets.LETTERS[: max(map(len, choices))]
    prompts = [
        choice_prompt(q, dict(zip(letters, c, strict=False)))
        for q, c in zip(asked["question"], choices, strict=True)
    ]

    def batches(done: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        for batch in engine.continuation_logprobs(prompts, letters, done=done):
            yield batch.batch_id, [[s.prompt_index, list(s.logps), s.missing_mass] for s in batch.scores]

    with open_engine(config.engine, inputs["model"].path, out) as engine:
        rows = sorted(journaled(batches, len(prompts), out, progress))
    likeliest = [max(range(len(choices[i])), key=logps.__getitem__) for i, logps, _ in rows]
    table = asked.select("problem_id", "answer").with_columns(
        chosen=pl.Series([letters[i] for i in likeliest]), missing_mass=pl.Series([m for _, _, m in rows])
    )
    table.write_parquet(out / "choices.parquet")
    return {"questions": table.height, "missing_mass": table["missing_mass"].mean(), **served(engine)}


@dataclass
class Forgetting:
    window: int
    device: str = field(metadata={"key": False})


def forgetting(config: Forgetting, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """windows.parquet: loss of `model` on pieces of general text and, given `base`, KL(base || model)."""
    from selfcritique.retention import text_windows, window_losses
    from selfcritique.stages import load_encoder

    text = "\n".join(read_problems(inputs)["question"])
    folders = [inputs[role].path for role in ("model", "base") if role in inputs]
    windows = [text_windows(load_encoder(folder), text, config.window) for folder in folders]
    if windows[0] != windows[-1]:
        raise UserError("text: base and model read it with different tokenizers, so that KL is not defined.")
    rows = []
    for row in window_losses(folders, windows[0], config.device):
        rows.append(row)
        progress(len(rows), len(windows[0]))
    table = pl.DataFrame(rows, schema={"nll": pl.Float64, "kl": pl.Float64}, orient="row").with_row_index(
        "window"
    )
    table.write_parquet(out / "windows.parquet")
    return {"windows": table.height, "tokens": sum(map(len, windows[0]))}
