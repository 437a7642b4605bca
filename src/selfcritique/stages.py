"""The stages: each takes its own config and its input artifacts, writes its outputs, returns metrics.

`pipeline.py` says how they are joined. A stage imports what is heavy inside itself, keeps what an
interrupted run can go on with under `out/scratch/`, and depends on nothing but its arguments: its
artifact key covers them all. Change what a stage computes, and its version goes up (a test insists).
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from selfcritique.artifacts import Artifact, Journal, write_json
from selfcritique.checkpoints import has_code, plain_checkpoint
from selfcritique.config import (
    AnnotatorConfig,
    AskConfig,
    CriticDataConfig,
    CriticMode,
    DataConfig,
    DpoLossConfig,
    EngineConfig,
    EngineKind,
    Floor,
    PairConfig,
    PromptStyle,
    Reference,
    SamplingConfig,
    SelectConfig,
    ServerConfig,
    TinyConfig,
    TrainConfig,
    TrainerConfig,
)
from selfcritique.errors import UserError
from selfcritique.progress import Progress
from selfcritique.prompts import SCORE_PREFIX, critique_prompt, solve_prompt
from selfcritique.records import GROUPS, Message, Parse, Problem, Prompt, Response, Split, content_id

Inputs = Mapping[str, Artifact]
Metrics = dict[str, Any]

PROBLEM_FIELDS = ("question", "reference", "answer", "source", "subject", "family", "register", "difficulty")


# ---- problems ------------------------------------------------------------------------------------------


@dataclass
class Problems:
    data: DataConfig


def problems(config: Problems, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """problems.parquet: every split's problems."""
    from selfcritique.data.splits import build_splits

    table, counts = build_splits(config.data)
    table.write_parquet(out / "problems.parquet")
    if counts["removed_from_training"]:
        progress.close(
            f"{counts['removed_from_training']} test questions were found in training data and removed there"
        )
    sizes = dict(table.group_by("split").len().sort("split").iter_rows())
    found, asked = sizes.get("test", 0), config.data.splits.test
    if found < asked:
        progress.close(f"the test file has {found} questions, fewer than data.splits.test={asked}")
    return {"splits": sizes, **counts}


def load_problems(artifact: Artifact, split: Split | None = None, limit: int | None = None) -> list[Problem]:
    """The problems of one split (or all) in their order."""
    table = pl.scan_parquet(artifact.path / "problems.parquet")
    if split is not None:
        table = table.filter(pl.col("split") == split.value)
    rows = table.select(PROBLEM_FIELDS).slice(0, limit).collect()
    return [Problem(**row) for row in rows.iter_rows(named=True)]


# ---- training data -------------------------------------------------------------------------------------


def _write_examples(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """examples.parquet: `prompt` is the user's message; other columns say where an example comes from."""
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(out / "examples.parquet")


@dataclass
class ReferenceSolutions:
    style: PromptStyle
    split: Split = Split.base_train


def reference_solutions(config: ReferenceSolutions, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """The original SFT data: questions with their reference solutions."""
    rows = [
        _solution(config.style, problem, problem.reference)
        for problem in load_problems(inputs["problems"], config.split)
        if problem.reference
    ]
    if not rows:
        raise UserError(
            f"Split {config.split.value} has no reference solutions; set model.sft=null or add some."
        )
    _write_examples(rows, out)
    return {"examples": len(rows)}


def _solution(style: PromptStyle, problem: Problem, text: str, response_id: str = "") -> dict[str, Any]:
    prompt = solve_prompt(style, problem.question).messages[-1].content
    return {"problem_id": problem.id, "response_id": response_id, "prompt": prompt, "response": text}


@dataclass
class CriticData:
    data: CriticDataConfig
    annotator: AnnotatorConfig
    reference: Reference
    style: PromptStyle
    seed: int


def critic_data(config: CriticData, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """What the critic learns from: sampled answers and corruptions of right ones, balanced by band."""
    from selfcritique.annotate import (
        annotate,
        annotator,
        answers_only,
        balance,
        band,
        corruptions,
    )

    rng = Random(config.seed)
    by_id = {p.id: p for p in load_problems(inputs["problems"], Split.critic_train)}
    table = pl.read_parquet(inputs["responses"].path / "responses.parquet").filter(~pl.col("truncated"))
    candidates = [
        (by_id[pid], rid, text)
        for pid, rid, text in table.select("problem_id", "response_id", "text").iter_rows()
    ]
    if config.annotator.server is not None:
        marked, asked = _taught(config.annotator.server, candidates, out, progress)
    else:
        marked, asked = _marked(annotator(config.annotator), candidates, progress), {}
    clean = [(problem, text) for problem, _, text, a in marked if band(a.score) == "top"]
    broken = corruptions(clean, config.data.corruptions, rng)
    marked += [(problem, "", text, annotate(problem, text)) for problem, text in broken]
    chosen = balance(marked, config.data.balance, config.data.max_examples, rng)
    bare = answers_only(list(by_id.values()), config.data.answers_only, rng)
    chosen += [(problem, "", text, annotate(problem, text)) for problem, text in bare]
    rows = []
    for problem, response_id, text, annotation in chosen:
        only = rng.random() < config.data.score_only
        prompt = critique_prompt(config.style, problem, text, config.reference, score_only=only)
        rows.append(
            {
                "problem_id": problem.id,
                "response_id": response_id,
                "prompt": prompt.messages[-1].content,
                "response": f"{SCORE_PREFIX}{annotation.score}" if only else annotation.analysis,
                "score": annotation.score,
                "corrupted": response_id == "",
            }
        )
    scores = pl.DataFrame(rows).group_by("score").len().sort("score")
    _write_examples(rows, out)
    return {
        "marked": len(marked),
        "examples": len(rows),
        "by_score": {str(s): n for s, n in scores.iter_rows()},
        **asked,
    }


TEACHER_TOKENS = 1024
Candidate = tuple[Problem, str, str]  # with a response's id and text


def _marked(mark: Any, candidates: Sequence[Candidate], progress: Progress) -> list[Any]:
    """The candidates that the annotator marks, with its marks."""
    marked = []
    for done, (problem, response_id, text) in enumerate(candidates, 1):
        annotation = mark(problem, response_id, text)
        if annotation is not None:
            marked.append((problem, response_id, text, annotation))
        progress(done, len(candidates))
    return marked


def _taught(
    server: ServerConfig, candidates: Sequence[Candidate], out: Path, progress: Progress
) -> tuple[list[Any], Metrics]:
    """As `_marked` by a served teacher, who sees the reference; unreadable answers are left out."""
    from selfcritique.annotate import from_teacher
    from selfcritique.engine.base import SamplingParams

    prompts = [
        critique_prompt(
            PromptStyle.instruct, p, text, Reference.solution if p.reference else Reference.answer
        )
        for p, _, text in candidates
    ]
    with open_engine(EngineConfig(EngineKind.openai, server=server), None, out) as engine:
        said = complete(engine, prompts, SamplingParams(1, 0.0, TEACHER_TOKENS, 0), out, progress)
    found = [from_teacher(*candidates[i][::2], text, cut) for i, _, text, _, cut in said]
    marked = [(*c, a) for c, a in zip(candidates, found, strict=True) if a is not None]
    return marked, {"teacher_failures": len(found) - len(marked), **served(engine)}


@dataclass
class RftData:
    mix: float
    style: PromptStyle
    seed: int


def rft_data(config: RftData, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """Accepted responses of every round so far, with copies of the original SFT data mixed in."""
    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    rows = []
    selections = sorted(r for r in inputs if r.startswith("selected"))
    for role in selections:
        chosen = (
            pl.scan_parquet(inputs[role].path / "selected.parquet").filter("selected").select("response_id")
        )
        texts = pl.scan_parquet(inputs[role.replace("selected", "responses")].path / "responses.parquet")
        accepted = texts.join(chosen, on="response_id", how="semi").select(
            "problem_id", "response_id", "text"
        )
        rows += [_solution(config.style, by_id[p], text, r) for p, r, text in accepted.collect().iter_rows()]
    n_accepted = len(rows)
    if not n_accepted:
        reasons = _counts(pl.scan_parquet([inputs[r].path / "selected.parquet" for r in selections]))
        raise UserError(
            f"RFT has nothing to train on: no response was selected ({reasons}). Lower rft.select.threshold, "
            "raise rft.sampling.n or train a better critic."
        )
    if "original" in inputs and config.mix > 0:
        original = pl.read_parquet(inputs["original"].path / "examples.parquet").to_dicts()
        whole, part = divmod(config.mix, 1)
        rows += original * int(whole) + Random(config.seed).sample(original, round(part * len(original)))
    _write_examples(rows, out)
    return {"examples": len(rows), "accepted": n_accepted, "original": len(rows) - n_accepted}


@dataclass
class MatchedData:
    seed: int


def matched_data(config: MatchedData, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """The original SFT data, repeated in shuffled passes to as many tokens as the `like` examples have."""
    original = pl.read_parquet(inputs["original"].path / "examples.parquet").to_dicts()
    lengths = token_counts(inputs["model"].path, original)
    wanted = sum(
        token_counts(
            inputs["model"].path, pl.read_parquet(inputs["like"].path / "examples.parquet").to_dicts()
        )
    )
    rng, rows, total = Random(config.seed), [], 0
    while total < wanted:
        for i in rng.sample(range(len(original)), len(original)):
            if total >= wanted:
                break
            rows.append(original[i])
            total += lengths[i]
    _write_examples(rows, out)
    return {"examples": len(rows), "tokens": total, "wanted_tokens": wanted}


def token_counts(model: Path, rows: Sequence[Mapping[str, str]]) -> list[int]:
    """Tokens of each example's prompt and response together."""
    encoder = load_encoder(model)
    prompts = encoder.prompt_ids_many([_prompt(row["prompt"]) for row in rows])
    responses = encoder.response_ids_many([row["response"] for row in rows])
    return [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]


def load_encoder(model: Path) -> Any:
    from transformers import AutoTokenizer

    from selfcritique.prompts import PromptEncoder

    return PromptEncoder(AutoTokenizer.from_pretrained(model, trust_remote_code=has_code(model)))


def _prompt(content: str) -> Prompt:
    return Prompt((Message("user", content),))


# ---- training ------------------------------------------------------------------------------------------


@dataclass
class TinyBase:
    tiny: TinyConfig
    numbers: int  # largest in the problems; up to three times as much is one token
    train: TrainConfig
    trainer: TrainerConfig
    seed: int


def tiny_base(config: TinyBase, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """The embedded default: tokenizer and model made here, trained on the reference solutions.

    Beside them it learns to copy and compare numbers, as any pretrained model can: a critic that has to
    learn this too needs several times the training.
    """
    from selfcritique.annotate import VOCABULARY, comparisons
    from selfcritique.train.tiny import build_tokenizer, save_tiny

    rows = pl.read_parquet(inputs["examples"].path / "examples.parquet").select("prompt", "response")
    drills = comparisons(config.numbers, round(config.tiny.drills * rows.height), Random(config.seed))
    rows = pl.concat([rows, pl.DataFrame(drills, schema=rows.schema, orient="row")])
    init = out / "scratch" / "init"
    if not (init / "config.json").exists():
        tokenizer = build_tokenizer([*rows["prompt"], *rows["response"]], VOCABULARY, 3 * config.numbers)
        save_tiny(config.tiny, tokenizer, config.seed, init)
    return _fit_sft(config.train, config.trainer, init, rows, out, config.seed, progress)


@dataclass
class Checkpoint:
    digest: str  # of the folder's or file's content, or a commit: the key must not name a path
    remote_code: bool  # whether the model's own code comes along, and by that may run
    path: Path = field(default=Path(), metadata={"key": False})


def checkpoint(config: Checkpoint, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """A given checkpoint as an artifact: links, not copies; of a GGUF file, its weights de-quantised."""
    if config.path.suffix == ".gguf":
        from selfcritique.train.model import dequantise

        dequantise(config.path, out)
        return {}
    for file in sorted(config.path.iterdir()):
        if file.is_file() and (config.remote_code or file.suffix != ".py"):
            (out / file.name).symlink_to(file.resolve())
    settings = out / "config.json"
    try:
        about = json.loads(settings.read_text()) if settings.exists() else {}
    except ValueError as error:
        raise UserError(f"{config.path / settings.name} is not JSON ({error}); copy it again.") from None
    if "AutoModelForCausalLM" in about.get("auto_map", {}) and not config.remote_code:
        from transformers import CONFIG_MAPPING

        if about.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"The checkpoint {config.path} runs code of its own ({about['auto_map']}). Read it, and if "
                "you trust it set model.trust_remote_code=true."
            )
    return {}


@dataclass
class Sft:
    train: TrainConfig
    trainer: TrainerConfig
    seed: int


def sft(config: Sft, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """Fine-tune `model` on `examples`."""
    rows = pl.read_parquet(inputs["examples"].path / "examples.parquet")
    return _fit_sft(config.train, config.trainer, inputs["model"].path, rows, out, config.seed, progress)


def _fit_sft(
    train: TrainConfig,
    trainer: TrainerConfig,
    model: Path,
    rows: pl.DataFrame,
    out: Path,
    seed: int,
    progress: Progress,
) -> Metrics:
    from selfcritique.train.batch import TokenExample
    from selfcritique.train.fit import fit_sft

    encoder = load_encoder(model)
    prompts = encoder.prompt_ids_many([_prompt(text) for text in rows["prompt"]])
    responses = encoder.response_ids_many(rows["response"].to_list())
    examples = [TokenExample(p, r) for p, r in zip(prompts, responses, strict=True)]
    return fit_sft(train, trainer, model, examples, out, seed, progress)


def token_pairs(style: PromptStyle, inputs: Inputs) -> list[Any]:
    """A `TokenPair` per row of pairs.parquet."""
    from selfcritique.train.batch import TokenPair

    encoder = load_encoder(inputs["model"].path)
    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    texts = pl.read_parquet(inputs["responses"].path / "responses.parquet").select("response_id", "text")
    text_of = dict(texts.iter_rows())
    pairs = pl.read_parquet(inputs["pairs"].path / "pairs.parquet")
    prompts = encoder.prompt_ids_many([solve_prompt(style, by_id[p].question) for p in pairs["problem_id"]])
    sides = (encoder.response_ids_many([text_of[r] for r in pairs[c]]) for c in ("chosen_id", "rejected_id"))
    return [TokenPair(*ids) for ids in zip(prompts, *sides, strict=True)]


@dataclass
class ReferenceLogps:
    trainer: TrainerConfig
    style: PromptStyle
    quantize: bool  # as the policy that starts from it


def reference_logps(config: ReferenceLogps, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """Log-probabilities of every pair under the frozen reference; no part of them depends on λ, β or lr."""
    from selfcritique.train import fit

    pairs = token_pairs(config.style, inputs)
    logps = fit.reference_logps(config.trainer, inputs["model"].path, pairs, progress, config.quantize)
    logps.save(out / "reference.safetensors")
    return {"pairs": len(pairs)}


@dataclass
class Dpo:
    loss: DpoLossConfig
    train: TrainConfig
    trainer: TrainerConfig
    style: PromptStyle
    seed: int


def dpo(config: Dpo, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """Train `model`, which is also the reference, on its pairs with the merged loss."""
    from selfcritique.train import fit

    pairs = token_pairs(config.style, inputs)
    reference = fit.ReferenceLogps.load(inputs["reference"].path / "reference.safetensors")
    model = inputs["model"].path
    return fit.fit_dpo(
        config.train, config.loss, config.trainer, model, pairs, reference, out, config.seed, progress
    )


# ---- sampling and scoring ------------------------------------------------------------------------------


@contextmanager
def open_engine(config: EngineConfig, model: Path | None, out: Path) -> Iterator[Any]:
    """The engine on a checkpoint (a server may name its model itself); what a process of its own prints is
    kept in `out`'s scratch folder."""
    plain = None if model is None else plain_checkpoint(model)
    opened: AbstractContextManager[Any]
    if config.kind is EngineKind.openai:
        from selfcritique.engine.openai import OpenAIEngine

        assert config.server is not None
        opened = OpenAIEngine(config.server, plain)
    elif config.ray is not None:
        from selfcritique.engine.ray import RayEngine

        assert plain is not None
        opened = RayEngine(plain, config, out / "scratch")
    else:
        from selfcritique.engine.local import open_local

        assert plain is not None
        opened = open_local(plain, config, out / "scratch")
    with opened as engine:
        yield engine


def served(engine: Any) -> Metrics:
    """What a server was asked and what that cost; nothing of an engine of this machine."""
    from selfcritique.engine.openai import OpenAIEngine

    return {"server": engine.usage()} if isinstance(engine, OpenAIEngine) else {}


def journaled(
    batches: Callable[[Mapping[str, Any]], Iterator[tuple[str, list[Any]]]],
    total: int,
    out: Path,
    progress: Progress,
    part: str = "journal",
) -> list[Any]:
    """The `total` rows of `batches(done)`, each batch journaled as it comes; a rerun asks for the rest.

    A stage that asks several times names each `part`.
    """
    journal = Journal(_journal(out, part))
    done: dict[str, list[Any]] = journal.load()
    n_rows = sum(map(len, done.values()))
    progress(n_rows, total)
    for batch_id, rows in batches(done):
        journal.append(batch_id, rows)
        done[batch_id] = rows
        n_rows += len(rows)
        progress(n_rows, total)
    return [row for rows in done.values() for row in rows]


def _journal(out: Path, part: str = "journal") -> Path:
    return out / "scratch" / f"{part}.jsonl"


def complete(
    engine: Any,
    prompts: Sequence[Prompt],
    params: Any,
    out: Path,
    progress: Progress,
    part: str = "journal",
) -> list[tuple[int, int, str, int, bool]]:
    """(prompt index, sample, text, tokens, truncated) of every completion, in that order."""

    def batches(done: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        for batch in engine.generate(prompts, params, done):
            yield (
                batch.batch_id,
                [[c.prompt_index, c.sample, c.text, c.n_tokens, c.truncated] for c in batch.completions],
            )

    return sorted(map(tuple, journaled(batches, len(prompts) * params.n, out, progress, part)))


@dataclass
class Sample:
    split: Split
    limit: int | None
    sampling: SamplingConfig
    engine: EngineConfig
    style: PromptStyle
    seed: int


def sample(config: Sample, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """responses.parquet: answers of `model` to a split, each with its final answer and the checker's verdict.

    The verdict is for reports; selection never reads it, the oracle ablation apart.
    """
    from selfcritique.engine.base import SamplingParams

    asked = load_problems(inputs["problems"], config.split, config.limit)
    s = config.sampling
    params = SamplingParams(s.n, s.temperature, s.max_tokens, config.seed, s.top_p, s.top_k)
    with open_engine(config.engine, inputs["model"].path, out) as engine:
        rows = complete(
            engine, [solve_prompt(config.style, p.question) for p in asked], params, out, progress
        )
    responses = [Response(asked[i].id, k, text, n, cut) for i, k, text, n, cut in rows]
    table = _graded([asked[row[0]] for row in rows], responses)
    table.write_parquet(out / "responses.parquet")
    verdicts = dict(table.group_by("verdict").len().sort("verdict").iter_rows())
    return {
        "questions": len(asked),
        "responses": table.height,
        "correct": verdicts.get("correct", 0) / max(table.height, 1),
        "verdicts": verdicts,
        "truncated": int(table["truncated"].sum()),
        "tokens": int(table["n_tokens"].sum()),
        **served(engine),
    }


def _graded(asked: Sequence[Problem], responses: Sequence[Response]) -> pl.DataFrame:
    from selfcritique.annotate import equations
    from selfcritique.answers import canonical, compare_many, extract

    answers = [extract(r.text) for r in responses]
    lists = [equations(r.text) for r in responses]
    return pl.DataFrame(
        {
            "problem_id": [r.problem_id for r in responses],
            "response_id": [r.id for r in responses],
            "sample": [r.sample for r in responses],
            "text": [r.text for r in responses],
            "n_tokens": [r.n_tokens for r in responses],
            "truncated": [r.truncated for r in responses],
            "answer": answers,
            "canonical": [None if a is None else canonical(a) for a in answers],
            "verdict": [v.value for v in compare_many([p.answer for p in asked], answers)],
            "text_hash": [content_id(r.text) for r in responses],
            "equations_hash": [content_id(*e) if e else None for e in lists],
        },
        schema_overrides={"answer": pl.String, "canonical": pl.String, "equations_hash": pl.String},
    )


@dataclass
class Score:
    ask: AskConfig
    engine: EngineConfig
    style: PromptStyle
    seed: int


def score(config: Score, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """critiques.parquet (texts) and scored.parquet (one row per response, no texts), by `critic`."""
    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    responses = pl.read_parquet(inputs["responses"].path / "responses.parquet")
    ask = config.ask
    prompts = [
        critique_prompt(config.style, by_id[p], text, ask.reference, score_only=ask.mode is CriticMode.logit)
        for p, text in responses.select("problem_id", "text").iter_rows()
    ]
    with open_engine(config.engine, inputs["critic"].path, out) as engine:
        read = _by_logits if ask.mode is CriticMode.logit else _by_text
        resumed, start = _journal(out).exists(), time.perf_counter()
        rows = read(config, engine, prompts, out, progress)
        seconds = (time.perf_counter() - start) / max(len(prompts), 1)
    times = {"seconds_per_response": None if resumed else seconds}
    return write_scores(responses, rows, out) | times | served(engine)


Reading = tuple[int, int, str, float | None, str, float | None]
"""(response's row, sample, critique, score, parse, missing mass: what all ten scores leave to other texts)"""


def write_scores(responses: pl.DataFrame, rows: Sequence[Reading], out: Path) -> Metrics:
    """critiques.parquet and scored.parquet of some critic's readings."""
    from selfcritique.critique import mean_scores

    ids = responses["response_id"].to_list()
    schema = {
        "response_id": pl.String,
        "sample": pl.Int64,
        "text": pl.String,
        "score": pl.Float64,
        "parse": pl.String,
        "missing_mass": pl.Float64,
    }
    critiques = pl.DataFrame([(ids[i], *rest) for i, *rest in rows], schema=schema, orient="row")
    critiques.write_parquet(out / "critiques.parquet")
    scored = responses.drop("text").join(
        mean_scores(critiques), on="response_id", how="left", maintain_order="left"
    )
    scored.write_parquet(out / "scored.parquet")
    failures = critiques["score"].null_count() / max(critiques.height, 1)
    return {
        "critiques": critiques.height,
        "parse_failure_rate": failures,
        "mean_score": critiques["score"].mean(),
        "missing_mass": critiques["missing_mass"].mean(),
    }


@dataclass
class Corrupt:
    noise: float
    seed: int


def corrupt(config: Corrupt, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """scored.parquet with a share of the scores permuted; the critiques stay as they were written."""
    from selfcritique.select import permute_scores

    clean = inputs["scored"].path
    scored = pl.scan_parquet(clean / "scored.parquet")
    permute_scores(scored, config.noise, config.seed).collect().write_parquet(out / "scored.parquet")
    shutil.copy(clean / "critiques.parquet", out)
    return dict(inputs["scored"].metrics)


def _by_text(
    config: Score, engine: Any, prompts: Sequence[Prompt], out: Path, progress: Progress
) -> list[Reading]:
    from selfcritique.critique import parse_score
    from selfcritique.engine.base import SamplingParams

    params = SamplingParams(config.ask.samples, config.ask.temperature, config.ask.max_tokens, config.seed)
    rows = complete(engine, prompts, params, out, progress)
    read = ((i, k, text, parse_score(text, cut)) for i, k, text, _, cut in rows)
    return [(i, k, text, value, parse.value, None) for i, k, text, (value, parse) in read]


def _by_logits(
    config: Score, engine: Any, prompts: Sequence[Prompt], out: Path, progress: Progress
) -> list[Reading]:
    from selfcritique.critique import SCORES, expected_score

    def batches(done: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        for batch in engine.continuation_logprobs(prompts, SCORES, SCORE_PREFIX, done):
            yield batch.batch_id, [[s.prompt_index, list(s.logps), s.missing_mass] for s in batch.scores]

    rows = sorted(journaled(batches, len(prompts), out, progress))
    return [(i, 0, "", expected_score(logps), Parse.ok.value, m) for i, logps, m in rows]


@dataclass
class Card:
    """No settings: a card marks by the rules, whoever marked what the critic learned from.

    Responses of a labelled set come with marks of their own.
    """


def card(config: Card, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """A critic card: card.json and its rows, rows.parquet."""
    from selfcritique.annotate import annotate
    from selfcritique.critique import named_first_error, step_of
    from selfcritique.evaluate import critic_card

    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    texts = pl.read_parquet(inputs["responses"].path / "responses.parquet").select("response_id", "text")
    critiques = pl.read_parquet(inputs["scored"].path / "critiques.parquet").filter(pl.col("sample") == 0)
    rows = pl.read_parquet(inputs["scored"].path / "scored.parquet").join(
        texts, on="response_id", maintain_order="left"
    )
    rows = rows.join(
        critiques.select("response_id", critique="text"), on="response_id", maintain_order="left"
    )
    named = [named_first_error(critique) for critique in rows["critique"]]
    if "annotator_score" not in rows.columns:
        marks = [annotate(by_id[p], text) for p, text in rows.select("problem_id", "text").iter_rows()]
        rows = rows.with_columns(
            annotator_score=pl.Series([float(m.score) for m in marks]),
            first_error=pl.Series([m.first_error or 0 for m in marks]),
        )
    else:  # steps of the response, not equations
        steps = zip(named, rows["step_equations"], strict=True)
        named = [k if k is None or counts is None else step_of(k, counts) for k, counts in steps]
    groups = {g: [getattr(by_id[p], g) for p in rows["problem_id"]] for g in (*GROUPS, "subject")}
    table = rows.drop("text", "critique").with_columns(
        predicted_first_error=pl.Series(named, dtype=pl.Int64),
        **{g: pl.Series(values) for g, values in groups.items()},
    )
    table.write_parquet(out / "rows.parquet")
    result = critic_card(table)
    write_json(out / "card.json", result)
    return result


# ---- critics measured by themselves ----------------------------------------------------------------------


@dataclass
class Asked:
    """How a critic is going to be asked: what does not fit its context is left out and counted."""

    style: PromptStyle
    references: list[Reference]
    max_tokens: int

    def lengths(self, critic: Path, responses: Sequence[tuple[Problem, str]]) -> list[int | None]:
        """Tokens of each response; None where prompt and critique exceed the context."""
        encoder = load_encoder(critic)
        config = json.loads((critic / "config.json").read_text())
        room = config.get("max_position_embeddings", sys.maxsize) - self.max_tokens - len(SCORE_PREFIX)
        longest = [0] * len(responses)
        for reference in self.references:
            prompts = [critique_prompt(self.style, p, text, reference, True) for p, text in responses]
            longest = list(map(max, longest, map(len, encoder.prompt_ids_many(prompts))))
        counts = map(len, encoder.response_ids_many([text for _, text in responses]))
        return [n if prompt <= room else None for n, prompt in zip(counts, longest, strict=True)]


@dataclass
class Labelled:
    asked: Asked
    limit: int
    set: str = field(metadata={"content": True})


def labelled(config: Labelled, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """problems.parquet and responses.parquet of a labelled set, with its labels in place of the checker's."""
    from selfcritique.annotate import equations
    from selfcritique.critic_sets import read

    found = read(Path(config.set).expanduser())
    n = min(config.limit or len(found), len(found))
    found = [found[i * len(found) // n] for i in range(n)]  # of every file of a folder
    lengths = config.asked.lengths(inputs["critic"].path, [(r.problem, r.text) for r in found])
    kept = [(row, n) for row, n in zip(found, lengths, strict=True) if n is not None]
    if not kept:
        raise UserError(f"{config.set}: no response fits the critic's context with its prompt.")
    rows, samples = [row for row, _ in kept], Counter[str]()
    responses = []
    for row, n in kept:
        responses.append(Response(row.problem.id, samples[row.problem.id], row.text, n, False))
        samples[row.problem.id] += 1
    table = _graded([row.problem for row in rows], responses)
    labels = {True: "correct", False: "incorrect"}
    verdicts = [
        verdict if row.correct is None else labels[row.correct]
        for row, verdict in zip(rows, table["verdict"], strict=True)
    ]
    steps = [[len(equations(step)) for step in row.steps] or None for row in rows]
    table.with_columns(
        verdict=pl.Series(verdicts),
        annotator_score=pl.Series([row.band_score for row in rows], dtype=pl.Float64),
        first_error=pl.Series([row.first_error for row in rows], dtype=pl.Int64),
        step_equations=pl.Series(steps, dtype=pl.List(pl.Int64)),
    ).write_parquet(out / "responses.parquet")
    asked = {row.problem.id: row.problem for row in rows}
    pl.DataFrame([{"problem_id": i, **asdict(p)} for i, p in asked.items()]).write_parquet(
        out / "problems.parquet"
    )
    return {"responses": len(rows), "questions": len(asked), "too_long": len(found) - len(rows)}


@dataclass
class ByFloor:
    critic: Floor
    reference: Reference
    seed: int


def floor(config: ByFloor, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """As `score`, by a critic that needs no model."""
    from selfcritique.annotate import guess, judge

    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    responses = pl.read_parquet(inputs["responses"].path / "responses.parquet")
    rows: list[Reading] = []
    for i, (pid, rid, text) in enumerate(responses.select("problem_id", "response_id", "text").iter_rows()):
        if config.critic is Floor.rules:
            value, critique = judge(by_id[pid], text, config.reference)
        else:
            value, critique = guess(text, Random(f"{config.seed}/{rid}"))
        rows.append((i, 0, critique, float(value), Parse.ok.value, None))
    return write_scores(responses, rows, out)


@dataclass
class Probe:
    asked: Asked
    n: int
    seed: int


def probe(config: Probe, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """responses.parquet: texts written to fool a critic (probes.py), from responses that are known."""
    from selfcritique.probes import build_probes

    by_id = {p.id: p for p in load_problems(inputs["problems"])}
    table = pl.read_parquet(inputs["responses"].path / "responses.parquet")
    known = [
        (by_id[p], text, verdict)
        for p, text, verdict in table.select("problem_id", "text", "verdict").iter_rows()
    ]
    made = build_probes(known, config.n, Random(config.seed))
    lengths = config.asked.lengths(inputs["critic"].path, [(p, text) for _, p, text in made])
    rows = [
        {"probe": name, "problem_id": p.id, "response_id": content_id("probe", i, p.id, text), "text": text}
        for i, ((name, p, text), n) in enumerate(zip(made, lengths, strict=True))
        if n is not None
    ]
    pl.DataFrame(
        rows, schema=dict.fromkeys(("probe", "problem_id", "response_id", "text"), pl.String)
    ).write_parquet(out / "responses.parquet")
    return {"probes": len(rows), "too_long": len(made) - len(rows)}


# ---- selection -----------------------------------------------------------------------------------------


@dataclass
class Select:
    select: SelectConfig
    seed: int


PART = 50_000  # responses that selection and pairing hold at a time


def _pool(inputs: Inputs) -> pl.LazyFrame:
    scored = pl.scan_parquet(inputs["scored"].path / "scored.parquet")
    families = pl.scan_parquet(inputs["problems"].path / "problems.parquet").select(
        "problem_id", cluster="family"
    )
    return scored.join(families.unique("problem_id"), on="problem_id", how="left", maintain_order="left")


def _parts(inputs: Inputs, whole: bool) -> Iterator[pl.LazyFrame]:
    """The pool in parts of whole questions that memory holds, or as one."""
    pool = _pool(inputs)
    n = 1 if whole else -(-pool.select(pl.len()).collect().item() // PART) or 1
    for i in range(n):
        yield (pool.filter(pl.col("problem_id").hash() % n == i) if n > 1 else pool).collect().lazy()


class _Parts:
    """A table that is written part by part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[Path] = []

    def append(self, rows: pl.DataFrame) -> None:
        self.written.append(self.path.with_suffix(f".{len(self.written)}"))
        rows.write_parquet(self.written[-1])

    def join(self) -> None:
        if len(self.written) == 1:
            self.written[0].rename(self.path)
            return
        pl.scan_parquet(self.written).sink_parquet(self.path)
        for part in self.written:
            part.unlink()


def select(config: Select, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """selected.parquet: every response with whether it was selected and why (not)."""
    from selfcritique.select import select_responses, selection_counts, selection_report, wants_whole_pool

    table, counts = _Parts(out / "selected.parquet"), []
    for pool in _parts(inputs, wants_whole_pool(config.select)):
        chosen = select_responses(pool, config.select, config.seed).collect()
        table.append(chosen)
        counts.append(selection_counts(chosen.lazy()))
    table.join()
    return selection_report(counts)


@dataclass
class Pairs:
    build: PairConfig
    seed: int


def pairs(config: Pairs, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """pairs.parquet, and reasons.parquet: per response its side, or why it has none."""
    from selfcritique.select import build_pairs, pair_reasons, pair_sides, pairs_report, wants_whole_pool

    made, reasons, sides = _Parts(out / "pairs.parquet"), _Parts(out / "reasons.parquet"), []
    for pool in _parts(inputs, wants_whole_pool(config.build)):
        built = build_pairs(pool, config.build, config.seed).collect()
        made.append(built)
        reasons.append(pair_reasons(pool, built.lazy(), config.build, config.seed).collect())
        sides.append(pair_sides(pool, built.lazy()))
    made.join()
    reasons.join()
    rows = pl.concat(sides)
    if not rows.height:
        why = pl.scan_parquet(reasons.path)
        raise UserError(
            f"No pair could be built from {why.select(pl.len()).collect().item():,} responses "
            f"({_counts(why)}). Lower pairs.build.margin, set pairs.build.threshold between the scores, or "
            "raise pairs.sampling.n."
        )
    return pairs_report(rows)


def _counts(rows: pl.LazyFrame) -> str:
    """How many rows have each `reason`, most first."""
    counts = rows.group_by("reason").len().sort("len", "reason", descending=[True, False]).collect()
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.iter_rows())


# ---- evaluation ----------------------------------------------------------------------------------------


@dataclass
class Evaluate:
    threshold: float  # the critic score from which an answer counts as accepted


def evaluate(config: Evaluate, inputs: Inputs, out: Path, progress: Progress) -> Metrics:
    """eval.parquet: one row per answer to a test problem; metrics over it with intervals."""
    from selfcritique.evaluate import accuracy, by_group, critic_score_summary, measure

    groups = pl.read_parquet(inputs["problems"].path / "problems.parquet").select("problem_id", *GROUPS)
    greedy = pl.read_parquet(inputs["greedy"].path / "responses.parquet").drop("text")
    parts = [greedy.with_columns(kind=pl.lit("greedy"), score=pl.lit(None, pl.Float64))]
    if "sampled" in inputs:
        sampled = pl.read_parquet(inputs["sampled"].path / "scored.parquet").select(
            [*greedy.columns, "score"]
        )
        parts.append(sampled.with_columns(kind=pl.lit("sample")).select(parts[0].columns))
    rows = pl.concat(parts).join(groups, on="problem_id", how="left", maintain_order="left")
    rows.write_parquet(out / "eval.parquet")
    metrics: Metrics = {"accuracy": accuracy(rows), "by": {g: by_group(rows, g) for g in GROUPS}}
    if "sampled" in inputs:
        n = sampled.select(pl.col("sample").max() + 1).item()
        metrics |= {f"{name}@{n}": measure(rows, f"{name}@{n}") for name in ("pass", "maj", "best")}
        metrics["critic_score"] = critic_score_summary(rows, config.threshold)
    return metrics
