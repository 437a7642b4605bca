"""Every ablation's points compose; which stages they share follows from what each varies."""

import re
import shlex
from collections import defaultdict

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from runs import compose
from selfcritique.__main__ import CONF
from selfcritique.pipeline import Graph, build

# Experiment -> stage -> how many different ones the points of one seed have; of every other stage, one.
EACH = {"test_dpo", "eval_dpo", "dpo"}
FROM_PAIRS = {*EACH, "pairs", "reference"}
FROM_RFT = {*FROM_PAIRS, "select", "rft_data", "rft", "test_rft", "eval_rft", "regate_responses",
            "regate_scores", "regate", "pool_dpo", "scores_dpo"}  # fmt: skip
FROM_CRITIC = {*FROM_RFT, "critic", "gate_scores", "gate", "scores_rft"}
NOISY = {"gate_scores_noisy", "gate", "scores_rft_noisy", "regate_scores_noisy", "scores_dpo_noisy"}
SHARED = {
    "lambda_beta": {12: EACH},
    "dpo_stability": {15: EACH},
    "no_critic": {3: FROM_RFT},
    "threshold": {12: FROM_PAIRS, 4: FROM_RFT - FROM_PAIRS | {"eval_base"}},  # which counts by the threshold
    "critic_noise": {6: FROM_RFT | {"gate"}, 5: NOISY - {"gate"}},
    "critic_data": {4: FROM_CRITIC | {"critic_data"}},
    "critic_size": {4: FROM_CRITIC | {"critic_start"}},
    "stages": {8: EACH | {"reference"}, 4: {"pool_dpo", "scores_dpo", "pairs"}},
    "mixture": {2: set()},  # nothing is shared
    "heldout_families": {},
    "rounds": {},
    "model_size": {4: set()},
}


def sweeps() -> dict[str, dict[str, str]]:
    """Experiment -> what it varies, of those that build on ablation_base."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "experiment").glob("*.yaml")}
    return {name: settings["hydra"]["sweeper"]["params"] for name, settings in found.items()
            if "ablation_base" in settings.get("defaults", [])}  # fmt: skip


def points(name: str, params: dict[str, str]) -> list[Graph]:
    """Of seed 0."""
    words = [f"{setting}={values}" for setting, values in (params | {"seed": 0}).items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    return [build(compose(f"experiment={name}", *point)) for point in batch]


def test_every_sweep_over_the_base_is_known() -> None:
    assert sweeps().keys() == SHARED.keys()


@pytest.mark.parametrize("name", SHARED)
def test_points_of_a_sweep(name: str) -> None:
    params = sweeps()[name]
    assert len(params["seed"].split(",")) >= 3
    keys = defaultdict[str, set[str]](set)
    graphs = points(name, params)
    for graph in graphs:
        for node in graph.nodes.values():
            keys[node.name].add(node.key)
    several = {node: len(found) for node, found in keys.items() if len(found) > 1}
    if name in ("mixture", "model_size"):
        (count,) = SHARED[name]
        apart = set() if name == "mixture" else {"problems", "solutions"}
        assert several == dict.fromkeys(keys.keys() - apart, count)
    else:
        assert several == {node: count for count, nodes in SHARED[name].items() for node in nodes}


def test_commands_of_all_ablations() -> None:
    """Every sweep has its command, and every command's settings and stages exist."""
    lines = (CONF.parent / "experiments" / "run.sh").read_text().splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("selfcritique ")]
    assert {c[0] for c in commands} == {"-m", "compare", "critic-card", *(f"experiment={n}" for n in SHARED)}
    for words in commands:
        if words[0] not in ("compare", "critic-card"):
            axes = [word for word in words if re.fullmatch(r"[\w.]+=[\w.-]+(,[\w.-]+)+", word)]
            settings = [w.partition(",")[0] if w in axes else w for w in words if w != "-m"]
            run = compose(*settings)
            assert build(run).needed(run.until), words


def test_the_base_is_the_same_under_all() -> None:
    """But for what changes the problems or the policy."""
    base = build(compose("experiment=ablation_base")).nodes
    for name in SHARED.keys() - {"mixture", "heldout_families", "model_size"}:
        found = build(compose(f"experiment={name}")).nodes
        assert found["base"].key == base["base"].key, name
        if not name.startswith("critic_"):
            assert found["gate"].key == base["gate"].key, name
