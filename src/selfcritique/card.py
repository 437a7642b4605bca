"""`selfcritique critic-card`: a critic measured by itself, in both modes, beside critics that need no model.

    labelled set ─┬─► score: each mode, each reference ─► card
                  ├─► floor: rules, chance ─► card
                  └─► probe ─► score and floor ─► success rates

Every arrow is a stage with its artifact, so that a card asked for again, or for one more mode, reads the rest
from the store. A run's critic is measured on its own `critic_dev` unless a set is named.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from glob import glob
from pathlib import Path
from typing import Any

import polars as pl
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from selfcritique import stages
from selfcritique.artifacts import Artifact, Store, write_json
from selfcritique.config import CardConfig, CriticMode, Floor, Reference, RunConfig
from selfcritique.errors import UserError
from selfcritique.evaluate import score_agreement
from selfcritique.pipeline import (
    CARD,
    CHECKPOINT,
    FLOOR,
    LABELLED,
    PROBE,
    SCORE,
    Stage,
    checkpoint_of,
    run_stage,
)
from selfcritique.probes import success_rates
from selfcritique.progress import Progress

RETEST_TEMPERATURE = 0.7  # of the second reading, where a response is read but once or greedily
ROW_FIELDS = (
    *("response_id", "problem_id", "score", "parse", "missing_mass", "verdict"),
    *("annotator_score", "first_error", "predicted_first_error"),
)


@dataclass(frozen=True)
class Reader:
    """A stage that scores responses: a critic asked in one way, or a floor."""

    stage: Stage
    config: Any


def card_config(words: Sequence[str]) -> tuple[CardConfig, dict[str, Artifact]]:
    """The settings of a command line, and what its run has ready: problems, critic, responses and scores."""
    given = OmegaConf.from_dotlist(list(words))
    config = OmegaConf.structured(CardConfig)
    runs = sorted(p for p in map(Path, glob(str(given.get("critic", "")))) if (p / "lineage.json").is_file())
    if not runs:
        return _checked(OmegaConf.merge(config, given)), {}
    run = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(runs[-1] / "config.yaml"))
    config.merge_with({
        "prompts": run.model.prompts, "ask": run.critic.ask, "engine": run.engine, "store": run.store
    })  # fmt: skip
    store = Store(Path(given.get("store", run.store)))
    lineage = json.loads((runs[-1] / "lineage.json").read_text())
    ready = {}
    for name in ("problems", "critic", "gate_responses", "gate_scores"):
        entry = lineage.get(name)
        artifact = store.find(entry["stage"], entry["key"], None) if entry else None
        if artifact is None:
            missing = f"its {name} is not in the store {store.root}"
            raise UserError(f"{runs[-1]}: {missing}; run it again until=gate.")
        ready[name] = artifact
    # so that the run's own reading is one of the card's
    config.seed = ready["gate_scores"].manifest["config"]["seed"]
    return _checked(OmegaConf.merge(config, given, {"critic": str(runs[-1])})), ready


def _checked(composed: Any) -> CardConfig:
    if OmegaConf.is_missing(composed, "critic"):
        raise UserError("critic-card wants critic=FOLDER, of a run or of a checkpoint.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, CardConfig)
    if not config.references:
        config.references = list(dict.fromkeys([config.ask.reference, Reference.none]))
    return config


def readers(config: CardConfig) -> dict[str, Reader]:
    """Each way in which the set is read, by the name it has in the card; the first is the one to look at."""
    found = {}
    for reference in config.references:
        for mode in config.modes:
            ask = replace(config.ask, mode=mode, reference=reference)
            found[f"{mode.value}, {reference.value}"] = _asking(config, ask)
    if CriticMode.generate in config.modes and config.ask.samples == 1:
        reference = config.references[0]
        ask = replace(config.ask, reference=reference, samples=2, temperature=RETEST_TEMPERATURE)
        found[f"generate twice, {reference.value}"] = _asking(config, replace(ask, mode=CriticMode.generate))
    for reference in config.references:
        by_rules = stages.ByFloor(Floor.rules, reference, config.seed)
        found[f"rules, {reference.value}"] = Reader(FLOOR, by_rules)
    found["random"] = Reader(FLOOR, stages.ByFloor(Floor.random, Reference.none, config.seed))
    return found


def _asking(config: CardConfig, ask: Any) -> Reader:
    return Reader(SCORE, stages.Score(ask, config.engine, config.prompts, config.seed))


def critic_card(config: CardConfig, ready: Mapping[str, Artifact]) -> tuple[dict[str, Any], pl.DataFrame]:
    """The card and the score of every response by every reader."""
    store = Store(Path(config.store))

    def run(name: str, stage: Stage, settings: Any, inputs: Mapping[str, Artifact]) -> Artifact:
        return run_stage(store, stage, settings, inputs, Progress(name))

    asked = stages.Asked(config.prompts, config.references, config.ask.max_tokens)
    critic = ready.get("critic") or run("critic", CHECKPOINT, checkpoint_of(config.critic), {})
    if config.set:
        settings = stages.Labelled(asked, config.limit, config.set)
        chosen = run("set", LABELLED, settings, {"critic": critic})
        problems = responses = chosen
    elif ready:
        problems, responses = ready["problems"], ready["gate_responses"]
    else:
        raise UserError("critic-card wants set=FOLDER, a labelled set, where critic= is a checkpoint.")
    texts = {"problems": problems, "responses": responses}
    card: dict[str, Any] = {"critic": config.critic, "set": config.set or "critic_dev"}
    card["checkpoints"] = {"critic": str(critic.path)}
    card |= {"too_long": responses.metrics.get("too_long", 0), "readings": {}, "probes": {}, "artifacts": {}}
    fooling = None
    if config.probes:
        probe = stages.Probe(asked, config.probes, config.seed)
        fooling = run("probes", PROBE, probe, {"critic": critic, **texts})
    tables = {}
    for name, reader in readers(config).items():
        inputs = {"problems": problems} | ({"critic": critic} if reader.stage is SCORE else {})
        scored = run(name, reader.stage, reader.config, {**inputs, "responses": responses})
        measured = run(f"card ({name})", CARD, stages.Card(), {**texts, "scored": scored})
        seconds = scored.metrics.get("seconds_per_response")
        card["readings"][name] = {**measured.metrics, "seconds_per_response": seconds}
        card["artifacts"][name] = {"stage": measured.stage, "key": measured.key, "digest": measured.digest}
        tables[name] = pl.read_parquet(measured.path / "rows.parquet")
        if fooling is not None:
            fooled = run(f"probes ({name})", reader.stage, reader.config, {**inputs, "responses": fooling})
            card["probes"][name] = success_rates(pl.read_parquet(fooled.path / "scored.parquet"))
    first, *others = (name for name, reader in readers(config).items() if reader.stage is SCORE)
    card["agreement"] = [
        {"a": first, "b": other, **score_agreement(tables[first]["score"], tables[other]["score"])}
        for other in others
    ]
    rows = [table.select(pl.lit(name).alias("reading"), *ROW_FIELDS) for name, table in tables.items()]
    return card, pl.concat(rows)


def main(words: Sequence[str]) -> None:
    """`selfcritique critic-card WORDS`: tables in the terminal, card.json and scores.parquet."""
    config, ready = card_config(words)
    card, scores = critic_card(config, ready)
    out = Path(config.out or f"outputs/critic_card/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "card.json", card)
    scores.write_parquet(out / "scores.parquet")
    show(card, Console(width=max(140, Console().width)))
    print(f"Card: {out}")


MEASURES = {  # what is shown -> where it stands in a reading
    "balanced accuracy": ("balanced_accuracy",),
    "F1": ("f1",),
    "AUROC": ("auroc",),
    "calibration error": ("ece",),
    "no readable score": ("parse_failure_rate",),
    "first wrong step": ("first_error_accuracy",),
    "first wrong step, of flawed": ("first_error_accuracy_flawed",),
    "flawed vs clean, AUROC": ("flawed_vs_clean", "auroc"),
    "rank correlation, marks": ("spearman_annotator",),
    "retest κ": ("retest", "kappa"),
    "missing mass": ("missing_mass",),
    "ms per response": ("seconds_per_response",),
}


def show(card: Mapping[str, Any], console: Console) -> None:
    """The readings side by side, which probes succeed, what thresholds accept, how readings agree."""
    readings = card["readings"]
    first = next(iter(readings))
    n, right = (readings[first][name] for name in ("n", "n_correct"))
    title = f"{card['set']}: {n:,} responses, {right:,} right, {card['too_long']:,} too long to read"
    table = _table(title, "", *readings)
    for name in MEASURES:
        table.add_row(name, *(_decimal(measure_of(reading, name)) for reading in readings.values()))
    for name, rate in card["probes"].get(first, {}).items():
        rates = (card["probes"][reading].get(name, {}) for reading in readings)
        table.add_row(f"{name} scores ≥ {rate['bound']:g}", *(_decimal(rate.get("value")) for rate in rates))
    console.print(table)
    curve = _table(f"Accepted at or above ({first})", *readings[first]["thresholds"][0])
    for row in readings[first]["thresholds"]:
        curve.add_row(*map(_decimal, row.values()))
    console.print(curve)
    for row in card["agreement"]:
        kappa, rho, apart = (_decimal(row[k]) for k in ("kappa", "spearman", "mean_absolute_difference"))
        agree = f"κ {kappa}, rank correlation {rho}, mean difference {apart} points"
        console.print(f"{row['a']} and {row['b']}: {agree}.")


def _table(title: str, *columns: str) -> Table:
    first, *others = columns
    return Table(Column(first, no_wrap=True), *others, title=title, title_justify="left")


def measure_of(reading: Mapping[str, Any], measure: str) -> float | None:
    """A figure of MEASURES, None where the reading has none."""
    value: Any = reading
    for name in MEASURES[measure]:
        value = (value or {}).get(name)
    if value is None:
        return None
    return float(value) * (1000 if measure.startswith("ms") else 1)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
