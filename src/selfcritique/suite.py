"""`selfcritique evaluate`: checkpoints on evaluation sets; the first checkpoint is the base of comparisons.

Every step is an artifact of the store. Answers are keyed by the checkpoint's content (weights, tokenizer and
template), the set and the sampling, so another judge or another comparison asks the model nothing anew.
Whatever a set measures becomes one table per model (problem_id, source, value; null: failed; source: the
stratum), from which all intervals and paired comparisons follow alike.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique import set_stages
from selfcritique.artifacts import Artifact, Store, write_json
from selfcritique.compare import markdown_table
from selfcritique.config import EngineConfig, EngineKind, EvalSet, SamplingConfig, SuiteConfig, key_part
from selfcritique.data import sets
from selfcritique.errors import UserError
from selfcritique.evaluate import (
    Result,
    adjust,
    compare_values,
    judge_summary,
    score_agreement,
    summarise_values,
)
from selfcritique.pipeline import CHECKPOINT, SAMPLE, Stage, checkpoint_of, run_stage
from selfcritique.progress import Progress
from selfcritique.records import Split
from selfcritique.results import load_run
from selfcritique.stages import Sample

LOAD_SET = Stage(set_stages.load_set, 1)
CONVERSE = Stage(set_stages.converse, 1)
JUDGE = Stage(set_stages.judge, 1)
CHOOSE = Stage(set_stages.choose, 1)
FORGETTING = Stage(set_stages.forgetting, 1)


@dataclass(frozen=True)
class Measured:
    """One metric of one model on one set."""

    values: pl.DataFrame  # problem_id, source, value
    details: Result  # what else its artifact says


class Suite:
    """One call: makes what is missing in the store."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config
        self.store = Store(Path(config.store))
        self.artifacts: dict[str, str] = {}  # what -> its folder in the store

    def make(self, name: str, stage: Stage, config: Any, **inputs: Artifact) -> Artifact:
        made = run_stage(self.store, stage, config, inputs, Progress(name))
        self.artifacts[name] = str(made.path)
        return made

    def load(self, name: EvalSet) -> Artifact:
        c = self.config
        path, hub = sets.locate(name, c.paths.get(name, ""))
        references = sets.beside(path) if name is EvalSet.mt_bench else ""
        supplement = c.supplement and name is EvalSet.mathusereval
        return self.make(name, LOAD_SET, set_stages.LoadSet(name, hub, c.limit, supplement, path, references))

    def measure(
        self, name: EvalSet, label: str, problems: Artifact, model: Artifact, base: Artifact
    ) -> dict[str, Measured]:
        """Metric -> what `model` reaches on the set."""
        make = partial(self.make, f"{name} {label}", problems=problems, model=model)
        about = pl.read_parquet(problems.path / "problems.parquet").select(
            "problem_id", source=pl.when(pl.col("family") == "").then("source").otherwise("family")
        )
        if name in sets.JUDGED:
            answers = make(CONVERSE, set_stages.Converse(self.config.engine, self.config.max_tokens))
            return self._judged(name, label, problems, answers, about)
        if name is EvalSet.mmlu:
            made = make(CHOOSE, set_stages.Choose(self.config.engine))
            rows = pl.read_parquet(made.path / "choices.parquet")
            return {"accuracy": _values(about, rows, pl.col("chosen") == pl.col("answer"), made.metrics)}
        if name is EvalSet.text:
            config = set_stages.Forgetting(self.config.window, self.config.engine.device)
            beside = {} if model is base else {"base": base}
            made = make(FORGETTING, config, **beside)
            rows = pl.read_parquet(made.path / "windows.parquet").select(
                "nll", "kl", problem_id=pl.col("window").cast(pl.String), source=pl.lit("text")
            )
            columns = ["nll", "kl"] if beside else ["nll"]
            return {c: Measured(rows.select("problem_id", "source", value=c), made.metrics) for c in columns}
        greedy = SamplingConfig(n=1, temperature=0.0, max_tokens=self.config.max_tokens)
        made = make(SAMPLE, Sample(Split.test, None, greedy, self.config.engine, self.config.prompts, 0))
        rows = pl.read_parquet(made.path / "responses.parquet")
        return {"accuracy": _values(about, rows, pl.col("verdict") == "correct", made.metrics)}

    def _judged(
        self, name: EvalSet, label: str, problems: Artifact, answers: Artifact, about: pl.DataFrame
    ) -> dict[str, Measured]:
        """By judge and critic; with both, how far they agree stands in the details of the second."""
        c, found = self.config, dict[str, Measured]()
        first: pl.Series | None = None
        for who, path in (
            ("judge", c.judge.model),
            ("critic", c.judge.critic if name is EvalSet.mathusereval else ""),
        ):
            server = c.judge.server if who == "judge" else None
            if not path and server is None:
                continue
            engine = c.engine if server is None else EngineConfig(EngineKind.openai, server=server)
            checkpoint = {}
            if path:
                checkpoint["judge"] = self.make(who, CHECKPOINT, checkpoint_of(checkpoint_folder(path)))
            prompt = c.judge.prompt_file if name is EvalSet.mathusereval and who == "judge" else ""
            config = set_stages.Judge(name, engine, c.judge.max_tokens, who == "critic", c.prompts, prompt)
            made = self.make(
                f"{name} {label} {who}", JUDGE, config, problems=problems, responses=answers, **checkpoint
            )
            rows = pl.read_parquet(made.path / "judged.parquet")
            whole = rows.group_by("problem_id", "source", "family", "subject", maintain_order=True).agg(
                pl.col("score", "published").mean(), pl.col("parse").max()
            )
            agreement: Result = {} if first is None else {"agreement": score_agreement(first, whole["score"])}
            first = whole["score"]
            found[who] = _values(about, whole, pl.col("score"), judge_summary(whole) | agreement)
        return found


def _values(about: pl.DataFrame, rows: pl.DataFrame, value: pl.Expr, details: Result) -> Measured:
    values = rows.select("problem_id", value=value.cast(pl.Float64))
    return Measured(about.join(values, on="problem_id", maintain_order="left"), details)


def labels(paths: Sequence[str]) -> list[str]:
    """What tells the folders apart: their paths without the part they share."""
    absolute = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    if len(set(absolute)) < len(absolute):
        raise UserError(f"model names a folder twice: {', '.join(paths)}.")
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, shared) for path in absolute]


def checkpoint_folder(path: str) -> str:
    """Of a checkpoint as it is named: its folder, or RUN/NAME, a model of a run."""
    run = Path(path).parent
    if not (run / "lineage.json").is_file():
        return path
    return str(load_run(run).trained(Path(path).name).path)


def evaluate(config: SuiteConfig) -> tuple[Result, pl.DataFrame]:
    """The summary (`results`, `comparisons`, `artifacts`) and every value it rests on."""
    suite = Suite(config)
    folders = dict(zip(labels(config.model), map(checkpoint_folder, config.model), strict=True))
    models = {name: suite.make(name, CHECKPOINT, checkpoint_of(path)) for name, path in folders.items()}
    base, tables = next(iter(models)), list[pl.DataFrame]()
    results, comparisons = list[Result](), list[Result]()
    for name in config.sets:
        problems, of_base = suite.load(name), dict[str, Measured]()
        for label, model in models.items():
            found = suite.measure(name, label, problems, model, models[base])
            of_base = of_base or found
            for metric, measured in found.items():
                about = {"set": name.value, "metric": metric, "model": label}
                results.append({**about, **summarise_values(measured.values), "details": measured.details})
                tables.append(measured.values.with_columns(**{k: pl.lit(v) for k, v in about.items()}))
                if label == base or metric not in of_base:
                    continue
                pair = _paired(measured.values, of_base[metric].values)
                if pair[0].height:
                    comparisons.append({**about, **compare_values(*pair, metric, config.seed, label, base)})
    summary = {
        "base": base,
        "config": key_part(config),
        "checkpoints": folders,
        "results": results,
        "comparisons": [{k: v for k, v in row.items() if k != "sentence"} for row in adjust(comparisons)],
        "artifacts": suite.artifacts,
    }
    return summary, pl.concat(tables)


def _paired(a: pl.DataFrame, b: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both models' values of the problems that neither failed on, in one order."""
    both = a.join(b.select("problem_id", b="value"), on="problem_id").drop_nulls().sort("problem_id")
    return both.drop("b"), both.select("problem_id", "source", value="b")


def write(summary: Result, values: pl.DataFrame, out: Path) -> Path:
    """evaluate.json and values.parquet in a folder of their own."""
    folder = out / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    write_json(folder / "evaluate.json", summary)
    values.write_parquet(folder / "values.parquet")
    return folder


def markdown(summary: Mapping[str, Any]) -> str:
    """Values with their 95 % intervals and paired differences to the base: accuracies in % and points,
    scores as they are, losses as perplexity and their differences in nats per token."""
    against = {(c["set"], c["metric"], c["model"]): c for c in summary["comparisons"]}
    head = ["set", "metric", "model", "value [95 %]", "n", "failed", f"− {summary['base']}", "p (Holm)", ""]
    rows = []
    for row in summary["results"]:
        c = against.get((row["set"], row["metric"], row["model"]))
        metric = METRICS[row["metric"]][0] if row["metric"] in METRICS else row["metric"]
        cells = [row["set"], metric, row["model"], _shown(row), str(row["n"]), str(row["failed"])]
        rows.append([*cells, *(_difference(c) if c else ("", "", ""))])
    judged = [r for r in summary["results"] if r["set"] == EvalSet.mathusereval]
    return "\n".join([markdown_table(head, rows), *(["", *_leaderboard(judged)] if judged else [])])


METRICS: dict[str, tuple[str, Callable[[float], float], int]] = {  # shown as, unit, digits
    "accuracy": ("accuracy, %", lambda share: 100 * share, 1),
    "nll": ("perplexity", math.exp, 2),
    "kl": ("KL(base ‖ model), nats/token", float, 4),
}


def _shown(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    _, change, digits = METRICS.get(row["metric"], ("", float, 2))
    cells = ("–" if row[k] is None else f"{change(row[k]):.{digits}f}" for k in ("value", "low", "high"))
    return "{} [{}, {}]".format(*cells)


def _difference(row: Mapping[str, Any]) -> tuple[str, str, str]:
    scale, digits = (100, 1) if row["metric"] == "accuracy" else (1, 4 if row["metric"] == "nll" else 2)
    shown = "{} [{}, {}]".format(*(f"{scale * row[k]:+.{digits}f}" for k in ("delta", "low", "high")))
    better = (row["delta"] > 0) != (row["metric"] == "nll")
    said = "better" if better else "worse"
    if row["finding"] == "indistinguishable":
        said = f"indistinguishable (detectable: {scale * row['mde']:.{digits}f})"
    return shown, f"{row['p_adjusted']:.2g}", said


def _leaderboard(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours above the published rows, which another judge scored."""
    from selfcritique.judge import LEADERBOARD, SUBJECTS

    parts = ("micro", "macro", "≥ 7, %", "published parser", *SUBJECTS)
    rows: list[tuple[str, str, list[float | None]]] = []
    for row in judged:
        d = row["details"]
        hard = None if d["hard"]["value"] is None else 100 * d["hard"]["value"]
        means = [d["by_subject"].get(subject, {}).get("value") for subject in SUBJECTS]
        published = d["published_parser"]["mean"] if row["metric"] == "judge" else None
        rows.append((row["model"], row["metric"], [d["micro"]["value"], d["macro"], hard, published, *means]))
    for name, (overall, *scores) in LEADERBOARD.items():
        macro = sum(scores) / len(scores)
        rows.append((f"{name} (published)", "GPT-4-1106-Preview", [overall, macro, None, overall, *scores]))
    cells = [
        [model, judge, *("–" if x is None else f"{x:.2f}" for x in values)] for model, judge, values in rows
    ]
    lines = [markdown_table(["MathUserEval", "scored by", *parts], cells)]
    for row in judged:
        if found := row["details"].get("agreement"):
            kappa, rho = ("–" if found[k] is None else f"{found[k]:.2f}" for k in ("kappa", "spearman"))
            lines += ["", f"Judge and critic on {row['model']}: κ {kappa}, Spearman {rho}, n {found['n']}."]
    return lines
