"""Every setting of a run, as Hydra's schema and as the dataclasses that stages receive.

`conf/` composes onto these classes; `to_run_config` turns the result into checked objects at the door.
A stage gets its own part and nothing else, and its artifact key covers exactly that part, so a field
stands in the part of the one stage it changes. Each class checks itself in `__post_init__` and names
every fault at once.
"""

import hashlib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfcritique.errors import UserError
from selfcritique.records import Split


def pending(owner: Any) -> bool:
    """True while required fields have no value: Hydra builds defaults before it composes."""
    return any(getattr(owner, f.name) == MISSING for f in fields(owner))


def check(owner: object, **faults: bool | str) -> None:
    """Raise one UserError that names each field at fault, its value and what it must be (the fault)."""
    named = [f"{name}={getattr(owner, name)!r} must be {fault}" for name, fault in faults.items() if fault]
    if named:
        raise UserError(f"{type(owner).__name__}: " + "; ".join(named))


def _how(default: Any) -> Any:
    """A field that changes where things lie or how fast a result is reached: no part of any key."""
    return field(default=default, metadata={"key": False})


def _content(default: str) -> Any:
    """A file or folder whose content, not its name, enters the key."""
    return field(default=default, metadata={"content": True})


OPTIONAL = {"optional": True}  # a part that most runs do not have: absent from the key while it is empty


class Source(StrEnum):
    word_problems = "word_problems"  # generated (data/word_problems.py)
    gsm8k = "gsm8k"  # path: folder with train.jsonl and test.jsonl, or empty for the hub
    math = "math"  # as gsm8k; rows have problem, solution, type and level
    jsonl = "jsonl"  # path: file with question, reference, optional answer and subject


class Reference(StrEnum):
    """What the critic is shown beside the response."""

    solution = "solution"
    answer = "answer"
    none = "none"


class CriticMode(StrEnum):
    generate = "generate"  # analysis, then the score
    logit = "logit"  # expected score over the ten score continuations


class Annotator(StrEnum):
    rules = "rules"
    file = "file"
    openai = "openai"


class OnFail(StrEnum):
    stop = "stop"
    warn = "warn"


class Pool(StrEnum):
    fresh = "fresh"  # pairs from questions RFT has not seen
    same = "same"


class Policy(StrEnum):
    """A model of a round."""

    rft = "rft"
    base = "base"  # what RFT starts from: the base, or with rounds.restart=last the round's first model


class Restart(StrEnum):
    base = "base"
    last = "last"


class Logger(StrEnum):
    none = "none"
    csv = "csv"
    wandb = "wandb"


class EngineKind(StrEnum):
    hf = "hf"
    openai = "openai"  # a server with OpenAI's interface
    vllm = "vllm"  # optional packages: make setup-vllm


@dataclass
class SourceConfig:
    """One source of problems in `data.mix`."""

    source: Source = Source.word_problems
    weight: float = 1.0  # share of every split, relative to the other sources
    path: str = _content("")  # file, folder or empty (hub)
    families: list[str] = field(default_factory=list)  # word_problems only; empty: all
    test_families: list[str] = field(default_factory=list)  # families of test; empty: as `families`
    registers: list[str] = field(default_factory=lambda: ["plain", "chatty"])
    test_registers: list[str] = field(default_factory=list, metadata=OPTIONAL)  # of test; empty: `registers`
    steps: list[int] = field(default_factory=lambda: [2, 3, 4, 5])
    limit: int = 20  # largest number in a problem and its solution

    def __post_init__(self) -> None:
        check(
            self,
            weight=self.weight <= 0 and "above 0",
            limit=self.limit < 8 and "at least 8",
            path=self.source == Source.jsonl and not self.path and "a JSONL file or its folder",
        )


@dataclass
class SplitsConfig:
    """Problems per split; the splits are disjoint by normalised question text."""

    base_train: int = MISSING
    critic_train: int = MISSING
    critic_dev: int = MISSING
    pool_rft: int = MISSING
    pool_dpo: int = MISSING
    dev: int = MISSING
    test: int = MISSING

    def __post_init__(self) -> None:
        if not pending(self):
            check(self, **{f.name: getattr(self, f.name) < 1 and "at least 1" for f in fields(self)})


@dataclass
class DataConfig:
    seed: int = 0
    mix: list[SourceConfig] = field(default_factory=list)
    splits: SplitsConfig = field(default_factory=SplitsConfig)


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class LoraConfig:
    """Low-rank updates (arXiv 2106.09685), trained in place of the weights."""

    rank: int | None = None  # 0: all weights are trained; null: all settings are those of model.lora
    alpha: int = 32  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)  # names of layers; empty: all linear ones but the head
    quantize: bool = False  # QLoRA: frozen weights in 4 bits; CUDA with bitsandbytes, not run yet

    def __post_init__(self) -> None:
        check(
            self,
            rank=(self.rank or 0) < 0 and "at least 0 (0: all weights are trained)",
            alpha=self.alpha < 1 and "at least 1",
            dropout=not 0 <= self.dropout < 1 and "at least 0 and below 1",
            quantize=self.quantize and not self.rank and "false without a rank",
        )


@dataclass
class TrainConfig:
    """One optimisation: AdamW, a schedule, and the shape of its batches."""

    lr: float = MISSING
    epochs: float = MISSING
    batch_size: int = 32  # examples (SFT) or pairs (DPO) per optimiser step
    schedule: Schedule = Schedule.linear
    warmup_ratio: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if pending(self):
            return
        check(
            self,
            lr=self.lr <= 0 and "above 0",
            epochs=self.epochs <= 0 and "above 0",
            batch_size=self.batch_size < 1 and "at least 1",
            warmup_ratio=not 0 <= self.warmup_ratio < 1 and "at least 0 and below 1",
            grad_clip=self.grad_clip < 0 and "at least 0",
        )


class Accelerator(StrEnum):
    cpu = "cpu"
    gpu = "gpu"
    auto = "auto"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"  # autocast; weights, optimiser and losses stay fp32
    fp64 = "fp64"  # to tell a fault from rounding


class Strategy(StrEnum):
    single = "single"
    ddp = "ddp"  # a replica per process
    fsdp = "fsdp"  # weights, gradients and optimiser state in shards (FSDP2)


class Layout(StrEnum):
    """How the sequences of a micro-batch lie in memory; the loss is the same."""

    shared = "shared"  # a row per prompt, before all its responses (DPO: two)
    padded = "padded"  # a row per sequence
    packed = "packed"  # all sequences end to end in one row, without padding


@dataclass
class TrainerConfig:
    """The machine's side of training: `trainer=cpu|gpu|ddp|fsdp`."""

    accelerator: Accelerator = _how(Accelerator.cpu)
    strategy: Strategy = _how(Strategy.single)
    processes: int = _how(1)  # of ddp and fsdp
    precision: Precision = Precision.fp32
    layout: Layout = _how(Layout.shared)
    micro_tokens: int = _how(4096)  # padded tokens per forward; larger batches are accumulated
    gradient_checkpointing: bool = _how(False)
    checkpoint_every_s: float = _how(60.0)
    loader_workers: int = _how(0)  # processes that prepare batches
    max_length: int = 512  # tokens of prompt and response; longer examples are dropped and counted

    def __post_init__(self) -> None:
        check(
            self,
            micro_tokens=self.micro_tokens < 1 and "at least 1",
            loader_workers=self.loader_workers < 0 and "at least 0",
            processes=(self.processes < 1 and "at least 1")
            or (self.strategy is Strategy.single and self.processes > 1 and "1 with strategy=single"),
            max_length=self.max_length < 2 and "at least 2",
        )


class PromptStyle(StrEnum):
    """How much the prompts explain (`prompts.py`)."""

    terse = "terse"  # bare texts, for a model that learns the task from them alone
    instruct = "instruct"  # with instructions, for chat models


@dataclass
class TinyConfig:
    """Shape of the embedded default, a Llama trained from scratch. Heads have dimension 32 (vLLM)."""

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 3
    drills: float = 0.1  # texts of eight numbers to copy and compare, per reference solution

    def __post_init__(self) -> None:
        heads = self.hidden_size % 32 == 0 and self.hidden_size > 0
        check(
            self,
            hidden_size=not heads and "a multiple of 32",
            layers=self.layers < 1 and "at least 1",
            drills=self.drills < 0 and "at least 0",
        )


@dataclass
class ShapeConfig:
    """Sizes of a decoder, for the cost estimate of a plan; where the checkpoint is here, its own count."""

    layers: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    vocabulary: int = MISSING
    head_dim: int = 0  # 0: hidden_size / heads


@dataclass
class ModelConfig:
    """Where the base comes from: a checkpoint, or (path empty) a tiny model from scratch."""

    path: str = ""  # folder, OWNER/NAME[@REVISION] of the hub, or GGUF file (checkpoints.py)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    sft: TrainConfig | None = None  # SFT on the reference solutions of base_train; null: as it is
    lora: LoraConfig = field(default_factory=LoraConfig)  # of every training whose own rank is null
    prompts: PromptStyle = PromptStyle.instruct
    shape: ShapeConfig | None = None  # for plans, where the checkpoint is not here
    trust_remote_code: bool = False  # whether the checkpoint's own code may run


@dataclass
class ServerConfig:
    """A server with OpenAI's interface, asked by `engine/openai.py`."""

    url: str = _how("https://api.openai.com/v1")
    model: str = ""  # as the server calls it; empty (engines): the folder of the checkpoint in the store
    body: dict[str, Any] = field(default_factory=dict)  # more fields of every request; null leaves one out
    key_env: str = _how("OPENAI_API_KEY")  # the environment variable that holds the key, if it wants one
    concurrency: int = _how(16)  # requests under way at once
    timeout_s: float = _how(300.0)
    retries: int = _how(8)  # of a request; waits double from half a second to a minute
    requests_per_minute: int = _how(0)  # 0: no limit
    tokens_per_minute: int = _how(0)
    price_prompt: float = _how(0.0)  # per million tokens, for the cost in the stage's metrics
    price_completion: float = _how(0.0)
    cache: str = _how("store/requests.sqlite")  # replies by request; empty: none are kept

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):  # not shown: it may be the key
            raise UserError("ServerConfig: key_env must be the name of an environment variable.")
        counts = ("retries", "requests_per_minute", "tokens_per_minute", "price_prompt", "price_completion")
        check(
            self,
            url=not self.url.startswith(("http://", "https://")) and "an address, http:// or https://",
            concurrency=self.concurrency < 1 and "at least 1",
            timeout_s=self.timeout_s <= 0 and "above 0",
            **{name: getattr(self, name) < 0 and "at least 0" for name in counts},
        )


@dataclass
class RayConfig:
    """Replicas of an engine (hf or vllm) on the cluster that RAY_ADDRESS names, or on this machine."""

    replicas: int = 2
    cpus: int = 1  # of each replica, and its threads
    gpus: float = 0.0  # of each replica; 0.5: two share one

    def __post_init__(self) -> None:
        check(
            self,
            replicas=self.replicas < 1 and "at least 1",
            cpus=self.cpus < 1 and "at least 1",
            gpus=self.gpus < 0 and "at least 0",
        )


@dataclass
class EngineConfig:
    kind: EngineKind = EngineKind.hf
    max_batch_tokens: int = (
        65536  # bounds the memory of keys and values; batches are seeded, so part of the key
    )
    dtype: str = "float32"
    device: str = _how("cpu")  # hf
    server: ServerConfig | None = field(default=None, metadata=OPTIONAL)  # openai
    max_model_len: int = _how(0)  # vllm: tokens of the longest prompt and answer; 0: the model's context
    kv_cache_gb: float = _how(1.0)  # vllm on a CPU: keys and values
    gpu_memory_utilization: float = _how(0.9)  # vllm on GPUs: share for weights, keys and values
    tensor_parallel_size: int = _how(1)  # vllm: GPUs that share a model
    ray: RayConfig | None = _how(None)  # hf and vllm: replicas that share the work; null: one, here

    def __post_init__(self) -> None:
        check(
            self,
            max_batch_tokens=self.max_batch_tokens < 1 and "at least 1",
            server=self.kind is EngineKind.openai and self.server is None and "given (kind=openai)",
            ray=self.kind is EngineKind.openai and self.ray is not None and "null (kind=openai)",
            max_model_len=self.max_model_len < 0 and "at least 0 (0: the model's context)",
            kv_cache_gb=self.kv_cache_gb <= 0 and "above 0",
            gpu_memory_utilization=not 0 < self.gpu_memory_utilization <= 1 and "above 0 and at most 1",
            tensor_parallel_size=self.tensor_parallel_size < 1 and "at least 1",
        )


@dataclass
class SamplingConfig:
    """How a pool of responses is drawn."""

    n: int = MISSING
    temperature: float = MISSING
    max_tokens: int = 64
    top_p: float = 1.0
    top_k: int = 0  # 0: all

    def __post_init__(self) -> None:
        if pending(self):
            return
        check(
            self,
            n=self.n < 1 and "at least 1",
            temperature=self.temperature < 0 and "at least 0",
            max_tokens=self.max_tokens < 1 and "at least 1",
            top_p=not 0 < self.top_p <= 1 and "above 0 and at most 1",
            top_k=self.top_k < 0 and "at least 0",
        )


@dataclass
class AnnotatorConfig:
    kind: Annotator = Annotator.rules
    path: str = _content("")  # kind=file: CSV with response_id and score, optional analysis
    server: ServerConfig | None = field(default=None, metadata=OPTIONAL)  # kind=openai: the teacher

    def __post_init__(self) -> None:
        teacher = self.server is not None and self.server.model
        check(
            self,
            path=self.kind == Annotator.file and not self.path and "a CSV file (kind=file)",
            kind=self.kind is Annotator.openai and not teacher and "given its teacher: server.model=NAME",
        )


@dataclass
class GateConfig:
    min: float = 0.7  # balanced accuracy on critic_dev
    on_fail: OnFail = OnFail.stop

    def __post_init__(self) -> None:
        check(self, min=not 0 <= self.min <= 1 and "from 0 to 1")


@dataclass
class CriticDataConfig:
    """What the critic is taught from: sampled answers and known corruptions, marked by the annotator."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    corruptions: float = 0.5  # corrupted copies of each sampled answer that is right throughout
    answers_only: float = 0.0  # responses without steps per question, half of them right: teach to compare
    balance: dict[str, float] = field(default_factory=dict)  # share of each band: low, mid, high, top
    score_only: float = 0.1  # share of examples that teach the logit mode
    max_examples: int = 0  # 0: all that the balance allows

    def __post_init__(self) -> None:
        check(
            self,
            corruptions=self.corruptions < 0 and "at least 0",
            score_only=not 0 <= self.score_only <= 1 and "from 0 to 1",
            max_examples=self.max_examples < 0 and "at least 0",
        )


@dataclass
class AskConfig:
    """How the critic is asked for a score."""

    mode: CriticMode = CriticMode.generate
    reference: Reference = Reference.solution
    samples: int = 1  # critiques per response; the score is the mean of those that parse
    temperature: float = 0.0
    max_tokens: int = 96
    max_parse_failures: float = _how(0.2)  # a run with a larger share stops

    def __post_init__(self) -> None:
        check(
            self,
            samples=self.samples < 1 and "at least 1",
            temperature=self.temperature < 0 and "at least 0",
            max_tokens=self.max_tokens < 1 and "at least 1",
            max_parse_failures=not 0 <= self.max_parse_failures <= 1 and "from 0 to 1",
        )


@dataclass
class CriticConfig:
    model: str = ""  # checkpoint folder; empty: the base
    tiny: TinyConfig | None = None  # a tiny model of its own to start from, trained as the base is
    noise: float = 0.0  # share of responses whose scores are permuted among them before they count
    data: CriticDataConfig = field(default_factory=CriticDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ask: AskConfig = field(default_factory=AskConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    dev_sampling: SamplingConfig = field(default_factory=SamplingConfig)  # critic_dev, natural proportions

    def __post_init__(self) -> None:
        check(
            self,
            model=bool(self.model and self.tiny) and "empty where it has a tiny model of its own",
            noise=not 0 <= self.noise <= 1 and "from 0 to 1",
        )


class Dedup(StrEnum):
    equations = "equations"
    text = "text"
    none = "none"


class SelectBy(StrEnum):
    """Whose word counts. All but `critic` are controls of the ablations."""

    critic = "critic"
    checker = "checker"  # oracle: the verdict
    random = "random"  # as many responses as the critic would accept, at random
    shuffled = "shuffled"  # critic scores permuted among the responses of the pool


class Selection(StrEnum):
    default = "default"
    paper = "paper"  # cluster de-duplication, mixed-outcome questions only, largest margins in pairs


@dataclass
class SelectConfig:
    threshold: float = 7.0  # accepted at or above
    dedup: Dedup = Dedup.equations
    cap_per_question: int = 4  # 0: no cap
    accept_rate_min: float = 0.0  # window on the share of a question's responses that are accepted
    accept_rate_max: float = 1.0
    even_clusters: bool = False
    fixed_yield: int | None = None  # exactly so many, drawn among those accepted
    by: SelectBy = SelectBy.critic
    selection: Selection = Selection.default

    def __post_init__(self) -> None:
        check(
            self,
            threshold=not 1 <= self.threshold <= 10 and "from 1 to 10",
            cap_per_question=self.cap_per_question < 0 and "at least 0 (0: no cap)",
            accept_rate_min=not 0 <= self.accept_rate_min <= self.accept_rate_max
            and "from 0 to accept_rate_max",
            accept_rate_max=self.accept_rate_max > 1 and "at most 1",
            fixed_yield=self.fixed_yield is not None and self.fixed_yield < 1 and "at least 1 or null",
        )


class PairStrategy(StrEnum):
    best_worst = "best_worst"
    all = "all"  # every response above with every one below
    length_matched = "length_matched"


@dataclass
class PairConfig:
    strategy: PairStrategy = PairStrategy.best_worst
    threshold: float = 7.0  # chosen at or above
    margin: float = 2.0  # smallest difference of scores
    max_per_question: int = 1
    max_length_ratio: float = 1.25  # length_matched: longer over shorter, in tokens
    by: SelectBy = SelectBy.critic
    selection: Selection = Selection.default

    def __post_init__(self) -> None:
        check(
            self,
            threshold=not 1 <= self.threshold <= 10 and "from 1 to 10",
            margin=self.margin <= 0 and "above 0",
            max_per_question=self.max_per_question < 1 and "at least 1",
            max_length_ratio=self.max_length_ratio < 1 and "at least 1",
        )


class LamOn(StrEnum):
    """Which term of the merged loss lambda weighs."""

    dpo = "dpo"
    sft = "sft"


class SftNorm(StrEnum):
    """What the chosen cross-entropy is divided by, over the global batch."""

    token = "token"
    sequence = "sequence"
    sum = "sum"


class PreferenceLoss(StrEnum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass
class DpoLossConfig:
    """L = lam * L_DPO + L_SFT (lam_on=dpo) or L_DPO + lam * L_SFT (lam_on=sft)."""

    lam: float = MISSING
    beta: float = MISSING
    lam_on: LamOn = LamOn.dpo
    sft_norm: SftNorm = SftNorm.token
    kind: PreferenceLoss = PreferenceLoss.sigmoid
    label_smoothing: float = 0.0  # cDPO: probability that a label is flipped; kind=sigmoid only
    gradients_every: int = (
        0  # steps between two looks at the terms' own gradients, which cost a step; 0: none
    )

    def __post_init__(self) -> None:
        if pending(self):
            return
        limit = 0.5 if self.kind is PreferenceLoss.sigmoid else 1e-12
        check(
            self,
            lam=self.lam < 0 and "at least 0",
            beta=self.beta <= 0 and "above 0",
            label_smoothing=not 0 <= self.label_smoothing < limit
            and ("at least 0 and below 0.5" if limit == 0.5 else "0 (only kind=sigmoid smooths labels)"),
            gradients_every=self.gradients_every < 0 and "at least 0",
        )


@dataclass
class RftConfig:
    """Rejective fine-tuning: sample, keep what the critic accepts, train the base on it."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # on pool_rft
    select: SelectConfig = field(default_factory=SelectConfig)
    mix: float = 1.0  # copies of the original SFT data mixed in; 0 where there is none
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(self, mix=self.mix < 0 and "at least 0")


@dataclass
class PairsConfig:
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # on the pool
    policy: Policy = Policy.rft  # whose answers
    pool: Pool = Pool.fresh
    build: PairConfig = field(default_factory=PairConfig)


@dataclass
class DpoConfig:
    start: Policy = Policy.rft  # what is trained, and its reference
    loss: DpoLossConfig = field(default_factory=DpoLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class EvalConfig:
    """Greedy answers on every question of the split; samples and critic scores on the first of them."""

    split: Split = Split.test
    sampled_questions: int = 1000  # the first of the split, for pass@k, maj@k and best-of-k; 0: none
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bootstrap: int = 10_000

    def __post_init__(self) -> None:
        check(
            self,
            sampled_questions=self.sampled_questions < 0 and "at least 0",
            bootstrap=self.bootstrap < 1 and "at least 1",
        )


class EvalSet(StrEnum):
    """What `selfcritique evaluate` knows; `data/sets.py` says where each is found."""

    gsm8k = "gsm8k"  # final answers, checked
    math500 = "math500"
    cmath = "cmath"
    gsm_hard = "gsm_hard"
    mathusereval = "mathusereval"  # free answers, scored by a judge
    mt_bench = "mt_bench"
    mt_bench_zh = "mt_bench_zh"
    mmlu = "mmlu"  # choices by log-likelihood, the subjects of mathematics left out
    text = "text"  # perplexity, and KL to the base


@dataclass
class JudgeConfig:
    """Who scores free answers. Judge and critic may both be given; both are then reported."""

    model: str = ""  # checkpoint folder of a judge, asked by the protocol of the set
    server: ServerConfig | None = None  # a judge behind a server, instead of `model`
    critic: str = ""  # checkpoint folder of a critic, asked as the pipeline asks it; mathusereval only
    prompt_file: str = _content("")  # mathusereval: a prompt with {question}, {reference} and {answer}
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        missing = bool(self.prompt_file) and not Path(self.prompt_file).expanduser().is_file()
        nameless = self.server is not None and not self.server.model
        check(
            self,
            model=(nameless and "given as server.model=NAME, where there is a server")
            or (bool(self.model and self.server) and "empty where there is a server"),
            prompt_file=missing and "a file",
            max_tokens=self.max_tokens < 1 and "at least 1",
        )


@dataclass
class SuiteConfig:
    """`selfcritique evaluate`: checkpoints on evaluation sets, the first checkpoint being the base."""

    model: list[str] = field(default_factory=list)  # checkpoint folders
    sets: list[EvalSet] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)  # set -> file, or owner/name[:config[:split]] (hub)
    limit: int = 0  # questions per set, spread evenly over it; 0: all
    supplement: bool = False  # mathusereval: all 567, with the 22 questions that its table leaves out
    max_tokens: int = 512  # of an answer; answers are greedy
    window: int = 256  # tokens of a piece of text, the unit of its intervals
    prompts: PromptStyle = PromptStyle.instruct
    engine: EngineConfig = field(default_factory=EngineConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    seed: int = 0
    store: str = "store"
    out: str = "outputs/evaluate"  # a folder per call is made in it

    def __post_init__(self) -> None:
        judged = {EvalSet.mathusereval, EvalSet.mt_bench, EvalSet.mt_bench_zh} & set(self.sets)
        only_critic = judged - {EvalSet.mathusereval} or not self.judge.critic
        check(
            self,
            model=not self.model and "one or more checkpoint folders: model=FOLDER or model=[BASE,OTHER]",
            sets=not self.sets and f"some of {', '.join(EvalSet)}",
            paths=bool(self.paths.keys() - set(EvalSet)) and "by the names of sets",
            judge=bool(judged)
            and not (self.judge.model or self.judge.server)
            and only_critic
            and f"set for {', '.join(sorted(judged))}: judge.model=FOLDER or judge.server.model=NAME",
            limit=self.limit < 0 and "at least 0",
            max_tokens=self.max_tokens < 1 and "at least 1",
            window=self.window < 2 and "at least 2",
        )


@dataclass
class RoundsConfig:
    n: int = 1
    restart: Restart = Restart.base

    def __post_init__(self) -> None:
        check(self, n=self.n < 1 and "at least 1")


class Floor(StrEnum):
    """Critics without a model, so that a card's numbers can be read."""

    rules = "rules"  # annotate.judge
    random = "random"


@dataclass
class CardConfig:
    """`selfcritique critic-card`: whose, on what, read how. A run lends ask, prompts, engine and store."""

    critic: str = MISSING  # folder of a run (of several, the last), whose critic it is; or of a checkpoint
    set: str = ""  # labelled set (critic_sets.py), a folder or JSONL file; empty: critic_dev of the run
    limit: int = 0  # so many responses, spread evenly over the set; 0: all
    modes: list[CriticMode] = field(default_factory=lambda: list(CriticMode))
    references: list[Reference] = field(default_factory=list)  # empty: ask.reference, and none
    probes: int = 50  # responses that each hacking probe is built on; 0: none
    ask: AskConfig = field(default_factory=AskConfig)
    prompts: PromptStyle = PromptStyle.instruct
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0
    store: str = "store"
    out: str = ""  # empty: outputs/critic_card/TIME

    def __post_init__(self) -> None:
        check(
            self,
            limit=self.limit < 0 and "at least 0 (0: all)",
            modes=not self.modes and "one of generate, logit, or both",
            probes=self.probes < 0 and "at least 0 (0: none)",
        )


class Arm(StrEnum):
    """Control models that a run trains beside the pipeline's own."""

    sft = "sft"  # continued SFT of the base on its own data, as many tokens as RFT
    pool_sft = "pool_sft"  # SFT of the base on the reference solutions of pool_rft, as many tokens as RFT


@dataclass
class RunConfig:
    """A whole run. `experiment` files set it; see `conf/config.yaml` for the groups."""

    name: str = "run"
    seed: int = 0
    seed_from: str = ""  # a stage: only it and what follows vary with `seed`; empty: all do
    until: str = ""  # a stage, or 'several,of,them': run it and what it needs; empty: everything
    plan: bool = False  # show the stages with their keys and run nothing
    threads: int = _how(0)  # 0: cores divided by concurrent points
    store: str = _how("store")
    logger: Logger = _how(Logger.csv)
    arms: list[Arm] = field(default_factory=lambda: [Arm.sft])
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rft: RftConfig = field(default_factory=RftConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)

    def __post_init__(self) -> None:
        if not self.data.mix:
            raise UserError("data.mix names no source; choose data=word_problems, data=gsm8k or data=jsonl.")
        if not self.model.path and self.model.sft is None:
            raise UserError(
                "model.sft is null, but a model trained from scratch needs it; set model.path or model.sft."
            )
        if self.critic.tiny is not None and self.model.sft is None:
            raise UserError(
                "critic.tiny first learns what model.sft trains on, which is null; set both or none."
            )
        for train in (self.model.sft, self.critic.train, self.rft.train, self.dpo.train):
            if train is not None:
                if train is self.model.sft and not self.model.path:
                    train.lora = LoraConfig(rank=0)
                elif train.lora.rank is None:
                    train.lora = self.model.lora


def register() -> None:
    """Make the schema, and the plugins that Hydra is to use by name, known to it."""
    store = ConfigStore.instance().store
    store(name="base_config", node=RunConfig)
    plugins = "hydra_plugins.selfcritique_plugins"
    sweeper = {"_target_": f"{plugins}.SharingSweeper", "max_batch_size": None, "params": None}
    store(group="hydra/sweeper", name="sharing", node=sweeper)
    ray = {"_target_": f"{plugins}.RayLauncher", "num_cpus": 1, "num_gpus": 0}
    store(group="hydra/launcher", name="ray", node=ray)


def to_run_config(composed: DictConfig) -> RunConfig:
    """The checked dataclasses of a composed config; raises UserError for values that do not do."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(
            "These settings have no value: " + ", ".join(missing) + "; set them in an experiment file."
        )
    faults = _faults(composed, "")
    if faults:
        raise UserError("\n".join(faults))
    run = OmegaConf.to_object(composed)
    assert isinstance(run, RunConfig)
    return run


def _faults(node: Any, path: str) -> list[str]:
    """What every part of a config finds wrong with itself, each with where it stands."""
    names = range(len(node)) if OmegaConf.is_list(node) else list(node)
    inner = {str(name): node[name] for name in names if OmegaConf.is_config(node[name])}
    found = [f for name, part in inner.items() for f in _faults(part, f"{path}.{name}" if path else name)]
    if not found:
        try:
            OmegaConf.to_object(node)
        except (UserError, OmegaConfBaseException) as error:
            found.append(f"{path}: {error}" if path else str(error))
    return found


def key_part(config: Any) -> Any:
    """What of a config enters an artifact's key, as JSON data: all but what only changes speed."""
    if is_dataclass(config):
        absent = {
            f.name for f in fields(config) if f.metadata.get("optional") and not getattr(config, f.name)
        }
        kept = (f for f in fields(config) if f.metadata.get("key", True) and f.name not in absent)
        return {
            f.name: content_digest(getattr(config, f.name))
            if f.metadata.get("content")
            else key_part(getattr(config, f.name))
            for f in kept
        }
    if isinstance(config, dict):
        return {str(name): key_part(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [key_part(value) for value in config]
    if isinstance(config, StrEnum):
        return config.value
    if isinstance(config, Path):
        raise TypeError("A path is no part of a key; use a digest of its content.")
    return config


def content_digest(path: str) -> str:
    """16 hex digits of a file, or of a folder's files and their names; '' for no path or nothing there.

    An artifact's manifest, which says when it was made, is no part of what the artifact holds.
    """
    place = Path(path).expanduser()
    if not path or not place.exists():
        return ""
    digest = hashlib.sha256()
    held = place.iterdir() if place.is_dir() else [place]
    for file in sorted(f for f in held if f.is_file() and f.name != "manifest.json"):
        with file.open("rb") as data:
            name = file.name if place.is_dir() else ""
            digest.update(f"{name}:{hashlib.file_digest(data, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
