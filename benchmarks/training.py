"""Our DPO and SFT against TRL's: one model, one set of data, one global batch, AdamW, fp32, full fine-tuning.

Each side trains in a process of its own, two threads each, and they take turns of one epoch, so both go over
the same real tokens in a turn. Losses and gradients are compared before anything is timed.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from run import Measured, speed_ratio

from selfcritique.errors import UserError

MEDIANS, SIGMA, LONGEST = (110, 180, 200), 0.4, 500  # tokens of prompt, chosen, rejected: log-normal
EOS, FIRST = 2, 3
THREADS = 2
LR, LAM, BETA = 1e-5, 1.0, 0.1
OURS = {  # of an SFT micro-batch one example, as at TRL's best: more tokens take more memory, not less time
    "dpo": {"micro_tokens": 1536, "max_length": 1024},
    "sft": {"micro_tokens": 512, "max_length": 1024},
}


@dataclass(frozen=True)
class Size:
    pairs: int  # of an epoch
    batch: int  # pairs or examples per optimiser step
    rounds: int


SIZES = {"smollm2": Size(4, 4, 3), "tiny": Size(64, 8, 7)}
# What was fastest of what TRL offers; see README.md.
TRL: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {"default": {}, "best": {"precompute_ref_log_probs": True, "micro": 1, "grouped": True}},
    "sft": {"default": {}, "best": {"micro": 1, "grouped": True}},
}


def make_model(size: str, out: Path) -> int:
    """A checkpoint of random weights in `out`; returns its vocabulary's size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from selfcritique.config import TinyConfig
    from selfcritique.train.tiny import build_tokenizer, save_tiny

    if size == "tiny":
        tokenizer = build_tokenizer([], [], largest_number=100)
        save_tiny(TinyConfig(), tokenizer, 0, out)
        return len(tokenizer)
    torch.manual_seed(0)
    smollm2_135m = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(smollm2_135m).save_pretrained(out)
    return 49152


def make_pairs(n: int, vocabulary: int, seed: int = 0) -> list[Any]:
    """Pairs of random tokens; every response ends with EOS."""
    from selfcritique.train.batch import TokenPair

    rng = Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(FIRST, vocabulary) for _ in range(count)]

    def one() -> TokenPair:
        prompt, chosen, rejected = (
            max(2, min(round(median * math.exp(rng.gauss(0, SIGMA))), LONGEST)) for median in MEDIANS
        )
        return TokenPair(ids(prompt), [*ids(chosen - 1), EOS], [*ids(rejected - 1), EOS])

    return [one() for _ in range(n)]


# ---- the two sides -------------------------------------------------------------------------------------


def fit_ours(
    task: str, model: Path, pairs: list[Any], batch: int, epochs: int, out: Path, step: Callable[[], None]
) -> None:
    """Train with `step` called after each optimiser step."""
    from selfcritique.config import DpoLossConfig, TrainConfig, TrainerConfig
    from selfcritique.train.batch import TokenExample
    from selfcritique.train.fit import fit_dpo, fit_sft, reference_logps

    def progress(*_: Any) -> None:
        step()

    trainer = TrainerConfig(checkpoint_every_s=math.inf, **OURS[task])
    train = TrainConfig(lr=LR, epochs=epochs, batch_size=batch)
    if task == "sft":
        examples = [TokenExample(p.prompt_ids, p.chosen_ids) for p in pairs]
        fit_sft(train, trainer, model, examples, out, 0, progress)
        return
    reference = reference_logps(trainer, model, pairs)
    loss = DpoLossConfig(lam=LAM, beta=BETA)
    fit_dpo(train, loss, trainer, model, pairs, reference, out, 0, progress)


def trl_trainer(
    task: str,
    options: Mapping[str, Any],
    model_dir: Path,
    pairs: list[Any],
    batch: int,
    epochs: int,
    out: Path,
) -> Any:
    """TRL's trainer with our optimiser's settings. In DPO's texts, word n is token n."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from selfcritique.config import TrainConfig
    from selfcritique.train.model import load_model

    options = dict(options)
    micro = options.pop("micro", batch)
    if options.pop("grouped", False):
        options |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    ours = TrainConfig(lr=LR, epochs=epochs, batch_size=batch)
    options |= {
        "output_dir": str(out),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "num_train_epochs": epochs,
        "learning_rate": LR,
        "weight_decay": ours.weight_decay,
        "adam_beta1": ours.beta1,
        "adam_beta2": ours.beta2,
        "max_grad_norm": ours.grad_clip,
        "warmup_steps": ours.warmup_ratio,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    model = load_model(model_dir)
    words = Tokenizer(
        models.WordLevel({f"w{i:05}": i for i in range(model.config.vocab_size)}, unk_token="w00000")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w00000", eos_token=f"w{EOS:05}")
    if task == "sft":
        rows = [
            {
                "input_ids": p.prompt_ids + p.chosen_ids,
                "labels": [-100] * len(p.prompt_ids) + p.chosen_ids,
                "length": len(p.prompt_ids) + len(p.chosen_ids),
            }
            for p in pairs
        ]
        return SFTTrainer(
            model, SFTConfig(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )

    def text(ids: list[int]) -> str:
        return "".join(f" w{i:05}" for i in ids)

    rows = [
        {
            "prompt": text(p.prompt_ids),
            "chosen": text(p.chosen_ids[:-1]) + " ",  # TRL adds EOS itself
            "rejected": text(p.rejected_ids[:-1]) + " ",
            "length": p.length,
        }
        for p in pairs
    ]
    loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [LAM, 1.0], "beta": BETA}
    config = DPOConfig(**(loss | options))
    return DPOTrainer(
        model,
        None if config.precompute_ref_log_probs else load_model(model_dir),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def check_parity(
    task: str, options: Mapping[str, Any], model_dir: Path, pairs: list[Any], out: Path, rtol: float = 1e-4
) -> None:
    """Both sides' loss and gradients of one batch, in fp32; raises where they differ."""
    import torch

    from selfcritique.config import DpoLossConfig, TrainConfig, TrainerConfig
    from selfcritique.train.batch import collate
    from selfcritique.train.fit import reference_logps
    from selfcritique.train.loss import Denominators
    from selfcritique.train.model import load_model
    from selfcritique.train.modules import DpoModule, SftModule

    trainer = trl_trainer(task, dict(options) | {"micro": len(pairs)}, model_dir, pairs, len(pairs), 1, out)
    batch = trainer.data_collator(list(trainer.train_dataset))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    model = load_model(model_dir)
    whole = Denominators(len(pairs), sum(len(p.chosen_ids) for p in pairs))
    arguments = (model, TrainConfig(lr=LR, epochs=1), 1, 0, lambda *_: None)
    if task == "sft":
        micro = collate([(p.prompt_ids, p.chosen_ids) for p in pairs], 0)
        ours = SftModule(*arguments).micro_loss(micro, whole)[0]["loss"]
    else:
        micro = collate([(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs], 0)
        reference = reference_logps(TrainerConfig(**OURS[task]), model_dir, pairs).sums
        module = DpoModule(*arguments, loss=DpoLossConfig(lam=LAM, beta=BETA))
        ours = module.micro_loss((micro, reference), whole)[0]["loss"]
    ours.backward()

    if abs(ours.item() - theirs.item()) > rtol * abs(theirs.item()):
        raise UserError(f"the losses differ: ours {ours.item()}, TRL's {theirs.item()}")
    for (name, parameter), peer in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert parameter.grad is not None and peer.grad is not None
        apart = torch.linalg.vector_norm(parameter.grad - peer.grad) / torch.linalg.vector_norm(peer.grad)
        if not apart.item() <= rtol:
            raise UserError(f"the gradients of {name} differ by {apart.item():.2g} of their norm")


# ---- a worker process ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker does: side is ours, or TRL at one of its settings; `count` adds FLOPs and a profile."""

    side: str  # ours | default | best | parity
    task: str
    pairs: int
    batch: int
    rounds: int
    model: str
    vocabulary: int
    out: str
    count: bool = False


def resident(field: str) -> int:
    """Bytes resident now (VmRSS) or at most since the last reset (VmHWM). Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


class Turns:
    """Holds training after each epoch until the parent asks for another one, and answers with its figures."""

    def __init__(self, job: Job, channel: Any) -> None:
        self.job, self.channel = job, channel
        self.per_turn, self.done = -(-job.pairs // job.batch), 0
        weights = Path(job.model, "model.safetensors").stat().st_size
        self.loaded = resident("VmRSS") + weights  # the model is loaded next
        self.counter: Any = None
        self.profile: Any = None

    def wait(self, **figures: Any) -> None:
        print(json.dumps(figures), file=self.channel, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        if self.job.count:
            self.start_counting()
        self.start = time.perf_counter()

    def step(self) -> None:
        self.done += 1
        if self.done % self.per_turn:
            return
        figures: dict[str, Any] = {"seconds": time.perf_counter() - self.start}
        if self.done > self.per_turn:
            figures["peak"] = resident("VmHWM") - self.loaded
        else:  # loading is over, the optimiser's state is there
            Path("/proc/self/clear_refs").write_text("5")
        if self.job.count:
            figures |= self.stop_counting()
        self.wait(**figures)

    def start_counting(self) -> None:
        """The machine's peak before each turn; FLOPs in one turn (not the first, which also makes the
        reference), a profile in another."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from selfcritique.train.meter import matmul_peak

        turn = self.done // self.per_turn
        matmul_peak(torch.device("cpu"), torch.float32)  # the fit's own, before anything is counted
        self.peak = matmul_peak.__wrapped__(torch.device("cpu"), torch.float32)
        if turn == COUNTED:
            self.counter = FlopCounterMode(display=False).__enter__()
        if turn == PROFILED:
            self.profile = torch.profiler.profile().__enter__()

    def stop_counting(self) -> dict[str, Any]:
        found: dict[str, Any] = {"peak_flops": self.peak}
        if self.counter:
            self.counter.__exit__(None, None, None)
            found["flops"], self.counter = self.counter.get_total_flops(), None
        if self.profile:
            self.profile.__exit__(None, None, None)
            found["profile"], self.profile = shares(self.profile.key_averages()), None
        return found


COUNTED, PROFILED = 1, 2
KINDS = {  # of operations: how their names in a profile start, after "aten::"
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot",),
    "log softmax": ("_log_softmax", "exp", "scatter_add", "gather"),
    "optimiser": ("_fused_adamw", "linalg_vector_norm", "_foreach"),
    "elementwise": ("mul", "add", "sub", "neg", "pow", "rsqrt", "mean", "sum", "silu", "div"),
    "moving memory": ("copy", "cat", "fill", "index", "embedding", "clone"),
}


def shares(events: Any) -> dict[str, float]:
    """Of a profile's CPU time: the share of each kind of operation, in percent."""
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in events:
        name = event.key.removeprefix("aten::")
        kinds = [kind for kind, starts in KINDS.items() if name.startswith(starts)]
        spent[kinds[0] if kinds else "other"] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: round(100 * time / whole, 1) for kind, time in spent.items()}


def work(job: Job) -> None:
    """The child's side: train, and stop when the parent closes its end."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model, out = Path(job.model), Path(job.out)
    pairs = make_pairs(job.pairs, job.vocabulary)
    if job.side == "parity":
        shortest = sorted(pairs, key=lambda pair: pair.length)[:2]
        for options in TRL[job.task].values():
            check_parity(job.task, options, model, shortest, out)
        print(json.dumps({}), file=channel, flush=True)
        return
    epochs = job.rounds + (3 if job.count else 1)
    if job.side == "ours":
        import selfcritique.train.fit  # noqa: F401  # resident before the model is

        turns = Turns(job, channel)
        turns.wait()
        fit_ours(job.task, model, pairs, job.batch, epochs, out, turns.step)
        return
    from transformers import TrainerCallback

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step()

    import trl.trainer.dpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

    turns = Turns(job, channel)
    trainer = trl_trainer(job.task, TRL[job.task][job.side], model, pairs, job.batch, epochs, out)
    trainer.add_callback(AfterStep())
    turns.wait()
    trainer.train()


# ---- the parent ----------------------------------------------------------------------------------------


class Worker:
    """A child that does a `Job`, turn by turn."""

    def __init__(self, job: Job) -> None:
        Path(job.out).mkdir(parents=True)
        self.log = Path(job.out, "log")
        threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
            )
        self.turns: list[dict[str, Any]] = []

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise UserError(f"a side of the benchmark failed:\n{tail}")
        return dict(json.loads(line))

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(self.answer())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(what: str, task: str, setting: str, size: str) -> Measured:
    """`what` is step (how many times faster), memory (how much of it) or peak (share of the matmul peak)."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        vocabulary = make_model(size, model)

        def worker(side: str, count: bool = False) -> Worker:
            out = str(Path(folder, side))
            return Worker(
                Job(
                    side,
                    task,
                    **asdict(SIZES[size]),
                    model=str(model),
                    vocabulary=vocabulary,
                    out=out,
                    count=count,
                )
            )

        about = describe(task, setting, size, vocabulary)
        if what == "peak":
            return _peak_fraction(worker("ours", count=True), SIZES[size].rounds, about)
        checked = worker("parity")
        checked.answer()
        checked.close()
        ours, theirs = worker("ours"), worker(setting)
        try:
            for side in (ours, theirs):
                side.answer()
            name = f"trl {version('trl')}, {setting} settings"
            rounds = 1 if what == "memory" else SIZES[size].rounds
            speed = speed_ratio(ours.turn, theirs.turn, name, rounds)
        finally:
            ours.close()
            theirs.close()
    peaks = [max(turn["peak"] for turn in side.turns[1:]) for side in (ours, theirs)]
    about |= {"peak_mb": [round(peak / 2**20) for peak in peaks]}
    if what == "memory":
        ratio = peaks[0] / peaks[1]
        return Measured(ratio, ratio, ratio, "of its peak memory", name, about)
    return replace(speed, about=about)


def _peak_fraction(ours: Worker, rounds: int, about: dict[str, Any]) -> Measured:
    try:
        ours.answer()
        for _ in range(3 + rounds):
            ours.turn()
    finally:
        ours.close()
    flops = ours.turns[COUNTED]["flops"]
    timed = ours.turns[3:]
    fractions = sorted(flops / turn["seconds"] / turn["peak_flops"] for turn in timed)
    about |= {"tflop": round(flops / 1e12, 3), "gflops_peak": round(timed[-1]["peak_flops"] / 1e9)}
    about["profile_percent"] = ours.turns[PROFILED]["profile"]
    middle = fractions[len(fractions) // 2]
    return Measured(middle, fractions[0], fractions[-1], "of the peak", "square fp32 matrix product", about)


def describe(task: str, setting: str, size: str, vocabulary: int) -> dict[str, Any]:
    """What a result was measured on."""
    pairs = make_pairs(SIZES[size].pairs, vocabulary)
    texts = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    return {
        "data": f"{len(pairs)} {'pairs' if task == 'dpo' else 'examples'} of random tokens",
        "lengths": [round(sum(len(t[i]) for t in texts) / len(texts)) for i in range(3)],
        "batch": SIZES[size].batch,
        "threads": THREADS,
        "trl": TRL[task].get(setting, {}),
        "ours": OURS[task],
    }


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
