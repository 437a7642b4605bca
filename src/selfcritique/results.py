"""A finished run, read back: its figures, and its samples with all that was decided about them.

The report, `why` and the notebooks read runs through this. Everything comes from the run's folder and the
artifacts that its lineage.json names; how stages are joined stands in their manifests.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from selfcritique.artifacts import Artifact, Store
from selfcritique.compare import folders
from selfcritique.errors import UserError
from selfcritique.records import GROUPS

_SAMPLE = ("problem_id", "response_id", "n_tokens", "truncated", "answer", "verdict", "equations_hash")


@dataclass(frozen=True)
class Run:
    """A run folder with its artifacts by the names that the run gave them."""

    out: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    artifacts: Mapping[str, Artifact]

    @cached_property
    def _names(self) -> dict[str, str]:
        return {self.artifacts[name].key: name for name in reversed(list(self.artifacts))}

    def stages(self, stage: str) -> dict[str, Artifact]:
        """This run's artifacts of one stage of `stages.py`."""
        return {name: artifact for name, artifact in self.artifacts.items() if artifact.stage == stage}

    def inputs(self, name: str) -> dict[str, str]:
        """Role -> name of what a stage of this run was made from."""
        made_from = self.artifacts[name].manifest["inputs"]
        return {role: self._names[source["key"]] for role, source in made_from.items()}

    def trained(self, model: str) -> Artifact:
        """The checkpoint of an evaluated model, or of the stage that is named (critic, checkpoint)."""
        if f"eval_{model}" in self.artifacts:
            return self.artifacts[self.inputs(self.inputs(f"eval_{model}")["greedy"])["model"]]
        made = {n: a for n, a in self.artifacts.items() if (a.path / "config.json").is_file()}
        if model not in made:
            there = ", ".join(made) or "none"
            raise UserError(f"{self.out}: there is no model {model!r}; there are {there}.")
        return made[model]

    def path(self, name: str, file: str) -> Path:
        return self.artifacts[name].path / file

    def threshold(self, name: str) -> float:
        """That a selection or pairing went by."""
        config = self.artifacts[name].manifest["config"]
        return config["select" if "select" in config else "build"]["threshold"]

    @cached_property
    def metrics(self) -> pl.DataFrame:
        """Every training step: stage, step, loss, ..."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return pl.DataFrame([json.loads(line) for line in lines], infer_schema_length=None)

    @cached_property
    def scores(self) -> dict[str, str]:
        """Name of a pool of responses -> name of its critic scores."""
        scored = self.stages("score") | self.stages("corrupt")  # the scores that decide are the last
        return {self.inputs(name)["responses"]: name for name in scored}

    @cached_property
    def decisions(self) -> dict[str, str]:
        """Name of critic scores -> name of the selection or the pairs made by them."""
        return {self.inputs(n)["scored"]: n for n in self.stages("select") | self.stages("pairs")}


def load_run(folder: Path | str = "", store: Path | str = "") -> Run:
    """A run from its output folder, by default the last one under outputs/. store: where its artifacts are,
    if not where its settings say, seen from here or from a folder above the run."""
    from omegaconf import OmegaConf

    finished = sorted(Path("outputs").glob("*/*/summary.json"), key=lambda path: path.stat().st_mtime)
    out = Path(folder) if folder or not finished else finished[-1].parent
    if not (out / "summary.json").is_file():
        raise UserError(f"There is no finished run (summary.json) in {out}; name a folder under outputs/.")
    config: Any = OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))
    places = [folder / (store or config["store"]) for folder in (Path(), *out.resolve().parents)]
    root = next((place for place in places if place.is_dir()), places[0])
    found = {}
    for name, entry in json.loads((out / "lineage.json").read_text()).items():
        artifact = Store(root).find(entry["stage"], entry["key"], None)
        if artifact is None:
            raise UserError(
                f"{out}: its stage {name} is not in {root.absolute() / entry['stage'] / entry['key']}; name "
                "its store (store=DIR), or run it again."
            )
        found[name] = artifact
    return Run(out, json.loads((out / "summary.json").read_text()), config, found)


def load_runs(*patterns: str, store: Path | str = "") -> list[Run]:
    """The finished runs whose folders match, by name: the newest of an experiment is last."""
    return [load_run(folder, store) for folder in folders(patterns)]


def measured(run: Run, file: str) -> list[dict[str, Any]]:
    """Each critic card (card.json) and evaluation (evaluate.json) near the run's folder that measured one of
    its models, oldest first; `of` holds its label for each model of this run."""
    paths = sorted({path for up in run.out.resolve().parents[1:3] for path in up.glob(f"*/*/{file}")})
    made = {name: run.trained(name) for name in run.summary["models"]} if paths else {}
    made |= {name: artifact for name, artifact in run.artifacts.items() if name == "critic"}
    names = {(artifact.stage, artifact.key): name for name, artifact in made.items()}
    found = []
    for path in paths:
        whole = json.loads(path.read_text())
        places = {label: Path(folder) for label, folder in whole.get("checkpoints", {}).items()}
        known = {label: names.get((place.parent.name, place.name)) for label, place in places.items()}
        if any(known.values()):
            found.append(whole | {"of": {name: label for label, name in known.items() if name}})
    return found


def problems(run: Run) -> pl.LazyFrame:
    return pl.scan_parquet(run.path("problems", "problems.parquet")).unique("problem_id")


def samples(run: Run) -> pl.LazyFrame:
    """Every response of the run, one row per stage that sampled it, without texts.

    stage, problem_id, response_id, n_tokens, truncated, answer, verdict, equations_hash; source, family,
    register, difficulty; score and parse (null where no critic was asked); decision: what selection or
    pairing made of it (selected, chosen, rejected, or the reason against it), null where neither looked.
    """
    parts = []
    unknown = pl.LazyFrame(schema={"score": pl.Float64, "parse": pl.String, "decision": pl.String})
    for name in run.stages("sample"):
        rows = pl.scan_parquet(run.path(name, "responses.parquet")).select(
            pl.lit(name).alias("stage"), *_SAMPLE
        )
        scored = run.scores.get(name)
        if scored:
            scores = pl.scan_parquet(run.path(scored, "scored.parquet")).select(
                "response_id", "score", "parse"
            )
            rows = rows.join(scores, on="response_id", how="left")
            if scored in run.decisions:
                rows = rows.join(_decided(run, run.decisions[scored]), on="response_id", how="left")
        parts.append(rows)
    return pl.concat([*parts, unknown], how="diagonal").join(
        problems(run).select("problem_id", *GROUPS), on="problem_id", how="left"
    )


def _decided(run: Run, name: str) -> pl.LazyFrame:
    if run.artifacts[name].stage == "select":
        return pl.scan_parquet(run.path(name, "selected.parquet")).select("response_id", decision="reason")
    side = pl.when(pl.col("role") == "none").then("reason").otherwise("role")
    return pl.scan_parquet(run.path(name, "reasons.parquet")).select("response_id", decision=side)


def with_texts(run: Run, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of `samples`, in their order, with question, reference, gold (answer), response, critiques
    (text, score, parse) and partners (the other response of each pair, its score, the margin)."""
    asked = problems(run).select("problem_id", "question", "reference", gold="answer")
    whole = rows.join(asked.collect(), on="problem_id", how="left", maintain_order="left")
    extra: dict[tuple[str, str], dict[str, Any]] = {}
    for (stage,), part in rows.group_by("stage"):
        name, ids = str(stage), part.lazy().select("response_id").unique()
        texts = pl.scan_parquet(run.path(name, "responses.parquet")).select("response_id", response="text")
        for row in texts.join(ids, on="response_id", how="semi").collect().iter_rows(named=True):
            extra[name, row["response_id"]] = {**row, "critiques": [], "partners": []}
        scored = run.scores.get(name, "")
        if scored:
            critiques = pl.scan_parquet(run.path(scored, "critiques.parquet")).sort("response_id", "sample")
            for row in critiques.join(ids, on="response_id", how="semi").collect().iter_rows(named=True):
                read = {column: row[column] for column in ("text", "score", "parse")}
                extra[name, row["response_id"]]["critiques"].append(read)
        if run.decisions.get(scored) in run.stages("pairs"):
            for row in _partners(run, run.decisions[scored], ids).iter_rows(named=True):
                extra[name, row.pop("response_id")]["partners"].append(row)
    return [row | extra[row["stage"], row["response_id"]] for row in whole.iter_rows(named=True)]


def _partners(run: Run, name: str, ids: pl.LazyFrame) -> pl.DataFrame:
    pairs = pl.scan_parquet(run.path(name, "pairs.parquet"))
    sides = [
        pairs.select("margin", response_id=f"{mine}_id", partner=f"{other}_id", score=f"{other}_score")
        for mine, other in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    return pl.concat(sides).join(ids, on="response_id", how="semi").collect()


def sample_table(run: Run, most: int = 200) -> pl.DataFrame | None:
    """Responses of the RFT pool with critique, score, verdict and whether they were selected."""
    if "select" not in run.artifacts:
        return None
    rows = samples(run).filter(pl.col("stage") == "pool_rft").sort("response_id").head(most).collect()
    return pl.DataFrame([
        {"question": row["question"], "response": row["response"], "critique": row["critiques"][0]["text"],
         "score": row["score"], "verdict": row["verdict"], "selected": row["decision"] == "selected",
         "reason": row["decision"], "problem_id": row["problem_id"], "response_id": row["response_id"]}
        for row in with_texts(run, rows)
    ], infer_schema_length=None)  # fmt: skip
