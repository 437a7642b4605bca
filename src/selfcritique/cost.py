"""What a run would cost: tokens and FLOPs of its stages, from its settings alone.

Lengths that the settings do not say are assumed: the constants below. A forward pass takes 2 FLOPs per weight
and token, and 4 per layer, head, width and position attended to. Training takes 3 forward passes' worth, 2
under LoRA, whose own weights are left out, and one more where layers are recomputed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from selfcritique import stages
from selfcritique.checkpoints import find_checkpoint
from selfcritique.config import CriticMode, Reference, RunConfig, ShapeConfig, TrainConfig
from selfcritique.pipeline import Graph, Node, answers

QUESTION = 150  # tokens of a question with its instructions
INSTRUCTIONS = 150  # tokens of a critique's prompt beside question, reference and response
LENGTH = 0.5  # of an answer or critique, as a share of max_tokens
SCORES = 30  # tokens of the ten scores that logit mode reads at once
YIELD = 0.5  # share of the responses (RFT) or questions (pairs) that is trained on
PEAK = 989e12  # FLOP/s of an H100 SXM, bf16 without sparsity, by its data sheet
UTILISATION = {"read": 0.4, "sampled": 0.1, "trained": 0.35}  # of it, per kind of token


@dataclass(frozen=True)
class Cost:
    """One kind of work of one stage."""

    name: str
    kind: str  # of UTILISATION
    tokens: float  # without padding; of all epochs
    flops: float

    @property
    def gpu_hours(self) -> float:
        return self.flops / (PEAK * UTILISATION[self.kind]) / 3600


def shape_of(run: RunConfig) -> ShapeConfig | None:
    """Of the checkpoint's config.json where it is here, else as the settings say."""
    if run.model.path and not run.model.path.endswith(".gguf"):
        about = find_checkpoint(run.model.path, download=False)[0] / "config.json"
        if about.is_file():
            found = json.loads(about.read_text())
            names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
            if all(name in found for name in names):
                sizes = [int(found[name]) for name in names]
                groups = int(found.get("num_key_value_heads") or sizes[-1])
                sizes += [groups, int(found["vocab_size"]), int(found.get("head_dim") or 0)]
                return ShapeConfig(*sizes)
    return run.model.shape


def forward_flops(shape: ShapeConfig, tokens: float, context: float, logits: float) -> float:
    """Of `tokens` that attend to `context` positions on average, of which `logits` go through the head.

    Layers with a gated MLP and grouped-query attention.
    """
    width = shape.head_dim or shape.hidden_size // shape.heads
    attention = 2 * shape.hidden_size * width * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    per_token = shape.layers * (2 * layer + 4 * shape.heads * width * context)
    return tokens * per_token + logits * 2 * shape.hidden_size * shape.vocabulary


def estimate(graph: Graph, shape: ShapeConfig, until: str = "") -> list[Cost]:
    """Costs of the stages that run the model, in their order."""
    return [cost for node in graph.needed(until) for cost in _costs(graph.run, node, shape)]


def _costs(run: RunConfig, node: Node, shape: ShapeConfig) -> Iterator[Cost]:
    config = node.config

    def cost(kind: str, sequences: float, prompt: float, response: float, passes: float = 1) -> Cost:
        """Of a causal pass over `sequences`, whose responses and last prompt token need logits."""
        tokens = sequences * (prompt + response)
        logits = sequences * max(response, 1)
        flops = passes * forward_flops(shape, tokens, (prompt + response) / 2, logits)
        return Cost(node.name, kind, tokens, flops)

    def train(settings: TrainConfig, sequences: float, prompt: float, response: float) -> Cost:
        passes = (2 if settings.lora.rank else 3) + run.trainer.gradient_checkpointing
        return cost("trained", settings.epochs * sequences, prompt, response, passes)

    def sample(sequences: float, prompt: float, response: float) -> Cost:
        flops = forward_flops(shape, sequences * response, prompt + response / 2, sequences * response)
        return Cost(node.name, "sampled", sequences * response, flops)

    if isinstance(config, stages.Sample):
        n = answers(node, run.data.splits)
        yield cost("read", n / config.sampling.n, QUESTION, 0)
        yield sample(n, QUESTION, LENGTH * config.sampling.max_tokens)
    elif isinstance(config, stages.Score):
        responses = node.inputs["responses"]
        n, prompt = answers(responses, run.data.splits), _critique_prompt(run, responses)
        if config.ask.mode is CriticMode.logit:
            yield cost("read", n, prompt, SCORES)
        else:
            yield cost("read", n, prompt, 0)
            yield sample(n * config.ask.samples, prompt, LENGTH * config.ask.max_tokens)
    elif isinstance(config, stages.Sft):
        source = node.inputs["examples"]
        if "responses" in source.inputs and isinstance(source.config, stages.CriticData):
            pool, data = source.inputs["responses"], source.config.data
            marked = answers(pool, run.data.splits) * (1 + data.corruptions)
            taught = min(marked, data.max_examples or marked)
            yield train(config.train, taught, _critique_prompt(run, pool), LENGTH * run.critic.ask.max_tokens)
        else:
            pools = [pool for role, pool in source.inputs.items() if role.startswith("responses")]
            accepted = YIELD * sum(answers(pool, run.data.splits) for pool in pools)
            copies = 1.0 if not pools else run.rft.mix if "original" in source.inputs else 0.0
            examples = accepted + copies * run.data.splits.base_train
            yield train(config.train, examples, QUESTION, LENGTH * run.rft.sampling.max_tokens)
    elif isinstance(config, stages.ReferenceLogps | stages.Dpo):
        pool = node.inputs["responses"]
        questions = answers(pool, run.data.splits) / pool.config.sampling.n
        pairs = YIELD * questions * run.pairs.build.max_per_question
        both = 2 * LENGTH * pool.config.sampling.max_tokens
        if isinstance(config, stages.Dpo):
            yield train(config.train, pairs, QUESTION, both)
        else:
            yield cost("read", pairs, QUESTION, both)


def _critique_prompt(run: RunConfig, responses: Node) -> float:
    """Tokens of the question, its reference and the response, with what is said around them."""
    response = LENGTH * responses.config.sampling.max_tokens
    return INSTRUCTIONS + QUESTION + response * (2 if run.critic.ask.reference is Reference.solution else 1)


def describe(costs: list[Cost]) -> str:
    """The sums, and what they rest on."""
    parts = []
    for kind, share in UTILISATION.items():
        of_kind = [cost for cost in costs if cost.kind == kind]
        tokens, flops = sum(c.tokens for c in of_kind), sum(c.flops for c in of_kind)
        parts.append(f"{tokens / 1e6:,.1f} M tokens {kind} ({flops:.2g} FLOPs at {share:.0%} of the peak)")
    hours = sum(cost.gpu_hours for cost in costs)
    return (
        f"About {hours:,.2g} GPU-hours of an H100 (peak {PEAK / 1e12:.0f} TFLOP/s, bf16) for the whole run: "
        f"{', '.join(parts)}. Assumed: answers and critiques of {LENGTH:.0%} of max_tokens, questions of "
        f"{QUESTION} tokens, {YIELD:.0%} of the responses and questions selected."
    )
