"""The whole pipeline as a graph of stages, read top to bottom, and how a run goes through it.

`build` says which stages there are and what flows between them. Keys follow from configs and input keys
alone, so the graph can be planned without running anything; `execute` then takes each stage from the
store or runs it.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from selfcritique import stages
from selfcritique.artifacts import Artifact, Store, artifact_key
from selfcritique.checkpoints import find_checkpoint
from selfcritique.config import (
    Annotator,
    Arm,
    EngineConfig,
    OnFail,
    Policy,
    Pool,
    Restart,
    RunConfig,
    SamplingConfig,
    SplitsConfig,
    TinyConfig,
    TrainConfig,
    key_part,
)
from selfcritique.data.sources import files
from selfcritique.errors import UserError
from selfcritique.progress import Progress, duration
from selfcritique.records import Split


@dataclass(frozen=True)
class Stage:
    """A function of `stages.py`; its version goes up whenever what it computes changes."""

    run: Callable[[Any, Mapping[str, Artifact], Path, Progress], dict[str, Any]]
    version: int

    @property
    def name(self) -> str:
        return self.run.__name__


PROBLEMS = Stage(stages.problems, 1)
SOLUTIONS = Stage(stages.reference_solutions, 1)
TINY_BASE = Stage(stages.tiny_base, 4)
CHECKPOINT = Stage(stages.checkpoint, 1)
SFT = Stage(stages.sft, 3)
SAMPLE = Stage(stages.sample, 1)
CRITIC_DATA = Stage(stages.critic_data, 2)
SCORE = Stage(stages.score, 2)
CORRUPT = Stage(stages.corrupt, 1)
CARD = Stage(stages.card, 3)
LABELLED = Stage(stages.labelled, 2)
FLOOR = Stage(stages.floor, 1)
PROBE = Stage(stages.probe, 1)
SELECT = Stage(stages.select, 3)
RFT_DATA = Stage(stages.rft_data, 1)
MATCHED_DATA = Stage(stages.matched_data, 1)
PAIRS = Stage(stages.pairs, 4)
REFERENCE = Stage(stages.reference_logps, 3)
DPO = Stage(stages.dpo, 3)
EVALUATE = Stage(stages.evaluate, 1)


@dataclass(frozen=True)
class Node:
    """One stage of this run. Equal nodes of any two runs have the same key, whatever they are called."""

    name: str
    stage: Stage
    config: Any
    inputs: Mapping[str, "Node"]
    key: str
    varies: bool  # with the run's seed


class Graph:
    """The run's nodes in the order in which they run."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.nodes: dict[str, Node] = {}
        self.gates: list[str] = []  # critic cards that must pass before the run goes on
        self.guards: dict[str, str] = {}  # stage -> the gate without which it must not run
        self.models: dict[str, Node] = {}  # what is evaluated, in the order of training

    def add(self, name: str, stage: Stage, config: Any, **inputs: Node) -> Node:
        """A node whose `seed`, if its config has one, derives from the run's seed and its name."""
        first = self.run.seed_from
        varies = not first or name == first or any(node.varies for node in inputs.values())
        if is_dataclass(config) and any(f.name == "seed" for f in fields(config)):
            config = replace(config, seed=stage_seed(self.run.seed if varies else 0, name))  # type: ignore[type-var]
        keys = {role: node.key for role, node in inputs.items()}
        key = artifact_key(stage.name, stage.version, key_part(config), keys)
        assert name not in self.nodes
        self.nodes[name] = Node(name, stage, config, inputs, key, varies)
        if stage in (SELECT, PAIRS):  # what is trained on is chosen by a critic that passed
            self.guards[name] = self.gates[-1]
        return self.nodes[name]

    def sample(
        self, name: str, model: Node, split: Split, sampling: SamplingConfig, limit: int | None = None
    ) -> Node:
        """Answers of a model to the questions of a split."""
        config = stages.Sample(split, limit, sampling, self.run.engine, self.run.model.prompts, 0)
        return self.add(name, SAMPLE, config, problems=self.nodes["problems"], model=model)

    def score(self, name: str, responses: Node) -> Node:
        """The critic's word on them."""
        config = stages.Score(self.run.critic.ask, self.run.engine, self.run.model.prompts, 0)
        inputs = {"problems": self.nodes["problems"], "responses": responses, "critic": self.nodes["critic"]}
        return self.add(name, SCORE, config, **inputs)

    def believe(self, name: str, responses: Node) -> Node:
        """The scores that decide: the critic's, a share of them corrupted where `critic.noise` says so."""
        scored, noise = self.score(name, responses), self.run.critic.noise
        if not noise:
            return scored
        return self.add(
            f"{name}_noisy", CORRUPT, stages.Corrupt(noise, 0), responses=responses, scored=scored
        )

    def gate(self, name: str, policy: Node) -> None:
        """Guards what is selected from now on: the critic on a policy's answers to unseen questions."""
        responses = self.sample(f"{name}_responses", policy, Split.critic_dev, self.run.critic.dev_sampling)
        scored = self.believe(f"{name}_scores", responses)
        self.gates.append(name)
        problems = self.nodes["problems"]
        self.add(name, CARD, stages.Card(), problems=problems, responses=responses, scored=scored)

    def needed(self, until: str) -> list[Node]:
        """The nodes that `until` (a stage, or several with commas) needs, with the gates on the way; all of
        them for ''."""
        last = until.split(",") if until else []
        for name in filter(None, (*last, self.run.seed_from)):
            if name not in self.nodes:
                raise UserError(f"There is no stage {name!r} in this run; there are {', '.join(self.nodes)}.")
        if not until:
            return list(self.nodes.values())
        wanted, found = set[str](), last
        while found:
            name = found.pop()
            if name not in wanted:
                wanted.add(name)
                found += [node.name for node in self.nodes[name].inputs.values()]
                found += [self.guards[name]] if name in self.guards else []
        return [node for node in self.nodes.values() if node.name in wanted]


def stage_seed(seed: int, name: str) -> int:
    """31 bits that differ between stages and seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def build(run: RunConfig) -> Graph:
    """The graph of DESIGN section 1."""
    g = Graph(run)
    style = run.model.prompts

    for source in run.data.mix:
        files(source)  # a missing one is told of before anything runs
    problems = g.add("problems", PROBLEMS, stages.Problems(run.data))
    solutions = None
    if run.model.sft is not None:
        solutions = g.add("solutions", SOLUTIONS, stages.ReferenceSolutions(style), problems=problems)
    base = _base(g, problems, solutions)

    _critic(g, base)
    g.gate("gate", base)

    g.models["base"] = policy = base
    accepted: dict[str, Node] = {}
    for number in range(1, run.rounds.n + 1):
        mark = "" if number == 1 else f"_{number}"
        responses = g.sample(f"pool_rft{mark}", policy, Split.pool_rft, run.rft.sampling)
        scored = g.believe(f"scores_rft{mark}", responses)
        selected = g.add(
            f"select{mark}", SELECT, stages.Select(run.rft.select, 0), problems=problems, scored=scored
        )
        accepted |= {f"responses{mark}": responses, f"selected{mark}": selected}
        original = {"original": solutions} if solutions is not None else {}
        mixed = stages.RftData(run.rft.mix, style, 0)
        examples = g.add(f"rft_data{mark}", RFT_DATA, mixed, problems=problems, **original, **accepted)
        start = base if run.rounds.restart is Restart.base else policy
        training = stages.Sft(run.rft.train, run.trainer, 0)
        rft = g.add(f"rft{mark}", SFT, training, model=start, examples=examples)
        if number == 1:
            _arms(g, base, solutions, examples)
        g.gate(f"regate{mark}", rft)

        split = Split.pool_dpo if run.pairs.pool is Pool.fresh else Split.pool_rft
        policies = {Policy.rft: rft, Policy.base: start}
        responses = g.sample(f"pool_dpo{mark}", policies[run.pairs.policy], split, run.pairs.sampling)
        scored = g.believe(f"scores_dpo{mark}", responses)
        paired = g.add(
            f"pairs{mark}", PAIRS, stages.Pairs(run.pairs.build, 0), problems=problems, scored=scored
        )
        texts = {
            "model": policies[run.dpo.start],
            "problems": problems,
            "responses": responses,
            "pairs": paired,
        }
        before = stages.ReferenceLogps(run.trainer, style, run.dpo.train.lora.quantize)
        frozen = g.add(f"reference{mark}", REFERENCE, before, **texts)
        merged = stages.Dpo(run.dpo.loss, run.dpo.train, run.trainer, style, 0)
        policy = g.add(f"dpo{mark}", DPO, merged, reference=frozen, **texts)
        g.models |= {f"rft{mark}": rft, f"dpo{mark}": policy}

    for name, model in g.models.items():
        _evaluation(g, name, model)
    return g


def _arms(g: Graph, base: Node, solutions: Node | None, examples: Node) -> None:
    """Controls of RFT: the base trained on reference solutions, on as many tokens as RFT's `examples`."""
    run, taught = g.run, {Arm.sft: solutions}
    if Arm.pool_sft in run.arms:
        ceiling = stages.ReferenceSolutions(run.model.prompts, Split.pool_rft)
        taught[Arm.pool_sft] = g.add("pool_solutions", SOLUTIONS, ceiling, problems=g.nodes["problems"])
    for arm, original in taught.items():
        if arm in run.arms and original is not None:
            same = stages.MatchedData(0)
            like = g.add(f"{arm}_data", MATCHED_DATA, same, original=original, like=examples, model=base)
            training = stages.Sft(run.rft.train, run.trainer, 0)
            g.models[arm] = g.add(arm, SFT, training, model=base, examples=like)


def _base(g: Graph, problems: Node, solutions: Node | None) -> Node:
    run = g.run
    if run.model.path:
        start = g.add(
            "checkpoint", CHECKPOINT, checkpoint_of(run.model.path, run.model.trust_remote_code, not run.plan)
        )
        if run.model.sft is None or solutions is None:
            return start
        return g.add("base", SFT, stages.Sft(run.model.sft, run.trainer, 0), model=start, examples=solutions)
    return _tiny(g, "base", run.model.tiny)


def _tiny(g: Graph, name: str, shape: TinyConfig) -> Node:
    """A tiny model from scratch, trained on the reference solutions."""
    run = g.run
    assert run.model.sft is not None
    numbers = max(source.limit for source in run.data.mix)
    config = stages.TinyBase(shape, numbers, run.model.sft, run.trainer, 0)
    return g.add(name, TINY_BASE, config, examples=g.nodes["solutions"])


def _critic(g: Graph, base: Node) -> None:
    """Math-Critique, from the base or a checkpoint of its own, taught on marked answers of the base."""
    run, problems = g.run, g.nodes["problems"]
    pool = g.sample("critic_pool", base, Split.critic_train, run.critic.data.sampling)
    if run.annotator.kind is Annotator.file and not Path(run.annotator.path).is_file():
        raise UserError(f"annotator.path: there is no file {run.annotator.path}; give another one.")
    reference = run.critic.ask.reference
    taught = stages.CriticData(run.critic.data, run.annotator, reference, run.model.prompts, 0)
    examples = g.add("critic_data", CRITIC_DATA, taught, problems=problems, responses=pool)
    start = base
    if run.critic.model:
        other = checkpoint_of(run.critic.model, run.model.trust_remote_code, not run.plan)
        start = g.add("critic_start", CHECKPOINT, other)
    elif run.critic.tiny is not None:
        start = _tiny(g, "critic_start", run.critic.tiny)
    training = stages.Sft(run.critic.train, run.trainer, 0)
    g.add("critic", SFT, training, model=start, examples=examples)


def checkpoint_of(name: str, remote_code: bool = False, download: bool = True) -> stages.Checkpoint:
    """A checkpoint as the config of its stage."""
    path, digest = find_checkpoint(name, download)
    return stages.Checkpoint(digest, remote_code, path)


def _evaluation(g: Graph, name: str, model: Node) -> None:
    """Greedy answers to the whole split; samples, scored by the critic, for its first questions."""
    e = g.run.eval
    greedy = replace(e.sampling, n=1, temperature=0.0, top_p=1.0, top_k=0)
    inputs = {"problems": g.nodes["problems"], "greedy": g.sample(f"test_{name}", model, e.split, greedy)}
    if e.sampled_questions:
        sampled = g.sample(f"test_{name}_sampled", model, e.split, e.sampling, e.sampled_questions)
        inputs["sampled"] = g.score(f"test_{name}_scores", sampled)
    g.add(f"eval_{name}", EVALUATE, stages.Evaluate(g.run.rft.select.threshold), **inputs)


# ---- going through it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRow:
    """What a run would do with one stage."""

    name: str
    stage: str
    key: str
    hit: bool
    work: str  # how much there is to do, where the config says so
    bytes: int
    seconds: float | None  # of a hit: what it took; of a miss: the median of this stage in the store


def plan(graph: Graph, store: Store, until: str = "") -> list[PlanRow]:
    """Each needed stage with its key, hit or miss, disk and time; runs nothing."""
    found: dict[str, Artifact | None] = {}
    past = _past_seconds(store, (node.stage.name for node in graph.nodes.values()))
    rows = []
    for node in graph.needed(until):
        inputs = {role: found[n.name] for role, n in node.inputs.items()}
        known = {role: artifact for role, artifact in inputs.items() if artifact is not None}
        hit = store.find(node.stage.name, node.key, known) if len(known) == len(inputs) else None
        found[node.name] = hit
        size = sum(f.stat().st_size for f in hit.path.rglob("*") if f.is_file()) if hit else 0
        seconds = hit.wall_s if hit else past.get(node.stage.name)
        work = _work(node, graph.run.data.splits)
        rows.append(PlanRow(node.name, node.stage.name, node.key, hit is not None, work, size, seconds))
    return rows


def _work(node: Node, splits: SplitsConfig) -> str:
    if isinstance(node.config, stages.Sample):
        return f"{answers(node, splits):,} answers"
    if isinstance(node.config, stages.Score):
        return f"{answers(node.inputs['responses'], splits) * node.config.ask.samples:,} critiques"
    train = getattr(node.config, "train", None)
    return f"{train.epochs:g} epochs" if isinstance(train, TrainConfig) else ""


def answers(node: Node, splits: SplitsConfig) -> int:
    """How many a `stages.Sample` gives."""
    config: stages.Sample = node.config
    size: int = getattr(splits, config.split.value)
    return min(size, config.limit or size) * config.sampling.n


def _past_seconds(store: Store, names: Iterable[str]) -> dict[str, float]:
    past = {}
    for name in set(names):
        times = sorted(a.wall_s for a in store.completed(name))
        if times:
            past[name] = times[len(times) // 2]
    return past


def execute(
    graph: Graph, store: Store, until: str, finished: Callable[[Node, Artifact], None] = lambda *_: None
) -> dict[str, Artifact]:
    """Every needed stage from the store or run now; `finished` hears of each. Stops at a failed gate, and
    where too many critiques have no score."""
    done: dict[str, Artifact] = {}
    needed = graph.needed(until)
    _check_server(graph.run.engine, needed)
    for number, node in enumerate(needed, 1):
        progress = Progress(f"[{number}/{len(needed)}] {node.name}")
        inputs = {role: done[n.name] for role, n in node.inputs.items()}
        done[node.name] = artifact = run_stage(store, node.stage, node.config, inputs, progress)
        finished(node, artifact)
        if node.stage is SCORE:
            _check_parses(graph.run, node, artifact)
        if node.name in graph.gates:
            _check_gate(graph.run, node, artifact, progress)
    return done


def run_stage(
    store: Store, stage: Stage, config: Any, inputs: Mapping[str, Artifact], progress: Progress
) -> Artifact:
    """The stage's artifact from the store, or run now."""

    def work(out: Path) -> dict[str, Any]:
        progress.close("running")
        return stage.run(config, inputs, out, progress)

    part, keys = key_part(config), {role: artifact.key for role, artifact in inputs.items()}
    key = artifact_key(stage.name, stage.version, part, keys)
    artifact = store.build(stage.name, stage.version, key, part, inputs, work, waiting=progress.close)
    progress.close(f"{'reused' if artifact.cached else 'done'} ({duration(artifact.wall_s)})")
    return artifact


def _check_server(engine: EngineConfig, needed: Iterable[Node]) -> None:
    if engine.server is None or not engine.server.model:
        return
    asked = {n.inputs[role].name for n in needed for role in ("model", "critic")
             if role in n.inputs and n.stage in (SAMPLE, SCORE)}  # fmt: skip
    if len(asked) > 1:
        raise UserError(
            f"engine.server.model names one model, but this run asks {', '.join(sorted(asked))}: leave it "
            "empty and serve each checkpoint under its folder's name, or stop before the second (until=)."
        )


def _check_parses(run: RunConfig, node: Node, scored: Artifact) -> None:
    failures, limit = scored.metrics["parse_failure_rate"], run.critic.ask.max_parse_failures
    if failures > limit:
        raise UserError(
            f"{failures:.0%} of {scored.metrics['critiques']:,} critiques at {node.name} have no readable "
            f"score (critic.ask.max_parse_failures allows {limit:.0%}). Raise critic.ask.max_tokens, train "
            f"the critic longer (critic.train.epochs), or look at {scored.path / 'critiques.parquet'}."
        )


def _check_gate(run: RunConfig, node: Node, card: Artifact, progress: Progress) -> None:
    value = card.metrics["balanced_accuracy"]
    value = value["value"] if isinstance(value, Mapping) else value
    gate = run.critic.gate
    if value is not None and value >= gate.min:
        return
    message = (
        f"The critic's balanced accuracy at {node.name} is {value if value is None else round(value, 3)}, "
        f"under the gate of {gate.min} (critic.gate.min). Train it on more examples (critic.train.epochs, "
        f"data.splits.critic_train) or go on regardless with critic.gate.on_fail=warn. Its card: {card.path}."
    )
    if gate.on_fail is OnFail.stop:
        raise UserError(message)
    progress.close("WARNING: " + message)
