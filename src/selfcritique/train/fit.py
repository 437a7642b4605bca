"""Fit a model and leave a checkpoint; an interrupted fit goes on from its last saved step.

OUT/                   model.safetensors, config, tokenizer: the result; under LoRA adapter_model.safetensors
OUT/metrics.jsonl      one row per step; no times, so that an equal run leaves equal bytes
OUT/trained.parquet    what each example gave at each step that trained on it
OUT/timing.jsonl       seconds, tokens/s, memory and share of the matmul peak of each step
OUT/scratch/state.safetensors      trained weights, optimiser and generator state, the step
OUT/scratch/steps[.RANK].jsonl     the rows of all three files, as they come
"""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset

from selfcritique.artifacts import TIMING, full_disk_is_user_error
from selfcritique.config import (
    DpoLossConfig,
    Layout,
    LoraConfig,
    Precision,
    Strategy,
    TrainConfig,
    TrainerConfig,
)
from selfcritique.errors import UserError
from selfcritique.train.batch import (
    Schedule,
    Step,
    TokenBatch,
    TokenExample,
    TokenPair,
    collate,
    micro_batches,
    micro_batches_of,
)
from selfcritique.train.launch import in_processes
from selfcritique.train.loss import Denominators
from selfcritique.train.meter import Meter, Row
from selfcritique.train.model import add_adapter, checkpoint_layers, load_model, save_model, token_logps
from selfcritique.train.modules import DpoModule, Each, NotFinite, SftModule, _Module, last_means

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float] | None], None]
_STATE = "state.safetensors"
_LIGHTNING = {Precision.fp32: "32-true", Precision.bf16: "bf16-mixed", Precision.fp64: "64-true"}
# How far log-probs of one model may differ between two batch shapes: relative, and nats per response.
_SAME = {Precision.fp32: (1e-4, 1e-3), Precision.bf16: (1e-2, 0.5), Precision.fp64: (1e-9, 1e-9)}
DPO_FIGURES = ("dpo_loss", "sft_loss", "rewards_margin", "rewards_accuracy", "chosen_logps_drift",
               "rejected_logps_drift", "chosen_length", "rejected_length")  # fmt: skip


class _Steps(Dataset[Any]):
    """One item per optimiser step, from `start` on."""

    def __init__(self, schedule: Schedule, start: int, make: Callable[[list[int]], Step]) -> None:
        self.schedule, self.start, self.make = schedule, start, make

    def __len__(self) -> int:
        return len(self.schedule) - self.start

    def __getitem__(self, item: int) -> Step:
        if item >= len(self):
            raise IndexError(item)
        return self.make(self.schedule[self.start + item])


def fit_sft(
    train: TrainConfig,
    trainer: TrainerConfig,
    model_dir: Path,
    examples: Sequence[TokenExample],
    out: Path,
    seed: int,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Train on `examples`; returns steps, tokens, speed, final loss and what was dropped."""
    if _needs_processes(trainer):
        return _apart("fit_sft", (train, trainer, model_dir, examples, out, seed), trainer, out, progress)
    kept = [i for i, example in enumerate(examples) if example.length <= trainer.max_length]
    if not kept:
        raise UserError(
            f"None of {len(examples)} examples has at most trainer.max_length={trainer.max_length} tokens."
        )
    lengths = [examples[i].length for i in kept]
    layout = Layout.packed if trainer.layout is Layout.packed else Layout.padded

    def make(indices: list[int]) -> Step:
        micros = []
        groups, idle = micro_batches_of(*_rank(trainer), indices, lengths, trainer.micro_tokens)
        for group in groups:
            members = [kept[i] for i in group]
            rows = [(examples[i].prompt_ids, examples[i].response_ids) for i in members]
            micros.append(collate(rows, 0, layout, members))
        whole = Denominators(len(indices), sum(len(examples[kept[i]].response_ids) for i in indices))
        return Step(micros, whole, sum(lengths[i] for i in indices), idle)

    schedule = Schedule(lengths, train.batch_size, train.epochs, seed)
    report = _fit(SftModule, {}, train, trainer, model_dir, schedule, make, out, seed, progress)
    return report | {"dropped": len(examples) - len(kept)}


def fit_dpo(
    train: TrainConfig,
    loss: DpoLossConfig,
    trainer: TrainerConfig,
    model_dir: Path,
    pairs: Sequence[TokenPair],
    reference: "ReferenceLogps",
    out: Path,
    seed: int,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Train on `pairs` with the merged loss against precomputed reference log-probs."""
    if _needs_processes(trainer):
        arguments = (train, loss, trainer, model_dir, pairs, reference, out, seed)
        return _apart("fit_dpo", arguments, trainer, out, progress)
    kept = [i for i, pair in enumerate(pairs) if pair.length <= trainer.max_length]
    if not kept:
        raise UserError(
            f"All {len(pairs)} pairs are longer than trainer.max_length={trainer.max_length} tokens."
        )
    schedule = Schedule([pairs[i].length for i in kept], train.batch_size, train.epochs, seed)
    first = [kept[i] for i in schedule[0]]
    layout = _check_reference(train, trainer, model_dir, first, pairs, reference)
    lengths, rows = _row_lengths([pairs[i] for i in kept], layout)

    def make(indices: list[int]) -> Step:
        micros = []
        groups, idle = micro_batches_of(*_rank(trainer), indices, lengths, trainer.micro_tokens, rows)
        for group in groups:
            members = [kept[i] for i in group]
            batch = _pair_batch([pairs[i] for i in members], layout, members)
            micros.append((batch, reference.sums[:, members]))
        members = [kept[i] for i in indices]
        whole = Denominators(len(members), sum(len(pairs[i].chosen_ids) for i in members))
        return Step(micros, whole, sum(pairs[i].tokens for i in members), idle)

    extra = {"loss": loss}
    report = _fit(DpoModule, extra, train, trainer, model_dir, schedule, make, out, seed, progress)
    return report | {"dropped": len(pairs) - len(kept)}


def _needs_processes(trainer: TrainerConfig) -> bool:
    return trainer.processes > 1 and not is_torchelastic_launched()


def _apart(
    function: str, arguments: tuple[Any, ...], trainer: TrainerConfig, out: Path, progress: Progress
) -> dict[str, Any]:
    """A fit in processes of its own, each of which calls the function again."""
    report = in_processes(function, arguments, trainer.processes, out / "scratch", progress)
    _write_rows(out)
    return report


def _pair_batch(pairs: Sequence[TokenPair], layout: Layout, examples: Sequence[int] = ()) -> TokenBatch:
    return collate([(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs], 0, layout, examples)


def _row_lengths(pairs: Sequence[TokenPair], layout: Layout) -> tuple[list[int], int]:
    """The longest row of each pair, and how many such rows it takes."""
    if layout is Layout.shared:
        return [pair.shared for pair in pairs], 1
    return [pair.length for pair in pairs], 2


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probabilities of every pair's two responses under the frozen reference, fp32."""

    sums: Tensor  # (2, pairs): chosen, rejected; EOS included
    lengths: Tensor  # (2, pairs) response tokens
    tokens: Tensor  # (all response tokens,) per-token values: every chosen response, then every rejected

    def save(self, path: Path) -> None:
        with full_disk_is_user_error(path):
            save_file({name: getattr(self, name) for name in self.__dataclass_fields__}, path)

    @classmethod
    def load(cls, path: Path) -> "ReferenceLogps":
        with safe_open(path, "pt") as file:
            return cls(*(file.get_tensor(name) for name in cls.__dataclass_fields__))


def reference_logps(
    trainer: TrainerConfig,
    model_dir: Path,
    pairs: Sequence[TokenPair],
    progress: Progress = lambda *_: None,
    quantize: bool = False,
) -> ReferenceLogps:
    """One pass of the frozen model over all pairs, in evaluation mode.

    Under LoRA this is the policy with its adapter off, quantised where that is. Pairs over
    trainer.max_length, which training drops, are left out: no tokens, and NaN for a sum.
    """
    model = load_model(model_dir, _dtype(trainer), quantize).to(_device(trainer)).eval()
    return _reference_logps(trainer, model, _layout(trainer, model, pairs), pairs, progress)


def _reference_logps(
    trainer: TrainerConfig, model: Any, layout: Layout, pairs: Sequence[TokenPair], progress: Progress
) -> ReferenceLogps:
    lengths, rows = _row_lengths(pairs, layout)
    fitting = [i for i, pair in enumerate(pairs) if pair.length <= trainer.max_length]
    values: dict[tuple[int, int], Tensor] = {}
    for group in micro_batches(fitting, lengths, trainer.micro_tokens, rows):
        parts = _frozen_logps(trainer, model, layout, [pairs[i] for i in group])
        values |= zip([(side, i) for side in (0, 1) for i in group], parts, strict=True)
        progress(len(values) // 2, len(fitting), None)
    left_out = torch.empty(0)
    ordered = [values.get((side, i), left_out) for side in (0, 1) for i in range(len(pairs))]
    sums = torch.stack([v.sum() if v is not left_out else torch.tensor(math.nan) for v in ordered])
    counts = torch.tensor([len(v) for v in ordered])
    return ReferenceLogps(sums.view(2, -1), counts.view(2, -1), torch.cat(ordered))


def _layout(trainer: TrainerConfig, model: Any, pairs: Sequence[TokenPair]) -> Layout:
    """trainer.layout; or padded where the model gives other values to responses that share their prompt."""
    fitting = [pair for pair in pairs if pair.length <= trainer.max_length]
    if trainer.layout is not Layout.shared or not fitting:
        return trainer.layout
    longest = [max(fitting, key=lambda pair: pair.length)]
    rtol, atol = _SAME[trainer.precision]
    apart = torch.cat(list(_frozen_logps(trainer, model, Layout.padded, longest)))
    reason = ""
    try:
        shared = torch.cat(list(_frozen_logps(trainer, model, Layout.shared, longest)))
        if torch.allclose(shared, apart, rtol=rtol, atol=atol):
            return Layout.shared
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f" ({error})"
    log.warning("this model cannot score two responses after one prompt%s: layout=padded is used", reason)
    return Layout.padded


@torch.no_grad()
def _frozen_logps(
    trainer: TrainerConfig, model: Any, layout: Layout, pairs: Sequence[TokenPair]
) -> Sequence[Tensor]:
    """Per-token values of each chosen response, then of each rejected one."""
    device = _device(trainer)
    batch = _pair_batch(pairs, layout).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=trainer.precision is Precision.bf16):
        return token_logps(model, batch).cpu().split(batch.lengths.tolist())


def _check_reference(
    train: TrainConfig,
    trainer: TrainerConfig,
    model_dir: Path,
    first: list[int],
    pairs: Sequence[TokenPair],
    reference: ReferenceLogps,
) -> Layout:
    """The policy starts as the reference: on the first batch it must give the stored values.

    Returns how this model can take the pairs.
    """
    lengths = [
        [len(p.chosen_ids), len(p.rejected_ids)] if p.length <= trainer.max_length else [0, 0] for p in pairs
    ]
    if reference.lengths.T.tolist() != lengths:
        raise UserError(
            f"The reference log-probs ({len(reference.sums[0])} pairs) are not those of these {len(pairs)} "
            "pairs: numbers or lengths of responses differ. They belong to other data; compute them again."
        )
    model = _load(train.lora, trainer, model_dir).to(_device(trainer)).eval()
    layout = _layout(trainer, model, pairs)
    now = _reference_logps(trainer, model, layout, [pairs[i] for i in first], lambda *_: None).sums
    stored = reference.sums[:, first]
    rtol, atol = _SAME[trainer.precision]
    if not torch.allclose(now, stored, rtol=rtol, atol=atol):
        worst = (now - stored).abs().max().item()
        raise UserError(
            f"The policy does not start as the reference: their log-probs of the first batch differ by up to "
            f"{worst:.3g} nats. The reference file belongs to another model, tokenizer or data; delete it."
        )
    return layout


def _rank(trainer: TrainerConfig) -> tuple[int, int]:
    """This process among those of one fit, and their number."""
    return int(os.environ["RANK"]) if trainer.processes > 1 else 0, trainer.processes


def _device(trainer: TrainerConfig) -> torch.device:
    gpu = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def _dtype(trainer: TrainerConfig) -> torch.dtype:
    """Of the weights; bf16 is autocast."""
    return torch.float64 if trainer.precision is Precision.fp64 else torch.float32


def _load(lora: LoraConfig, trainer: TrainerConfig, model_dir: Path) -> Any:
    """What is trained, at its start."""
    model = load_model(model_dir, _dtype(trainer), lora.quantize)
    if lora.rank:
        add_adapter(model, lora)
    return model


def _fit(
    module_class: type[_Module],
    extra: Mapping[str, Any],
    train: TrainConfig,
    trainer: TrainerConfig,
    model_dir: Path,
    schedule: Schedule,
    make: Callable[[list[int]], Step],
    out: Path,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    pl.seed_everything(seed, verbose=False)
    model = _load(train.lora, trainer, model_dir).train(module_class.DROPOUT)
    if trainer.gradient_checkpointing:
        checkpoint_layers(model)
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with closing(_State(scratch, _rank(trainer)[0], trainer.checkpoint_every_s)) as state:
        state.restore_weights(model)

        def report(row: Row, step: Step, each: Each) -> None:
            batches = [micro if isinstance(micro, TokenBatch) else micro[0] for micro in step.micros]
            timing = meter.step(batches, step.tokens, 2 if "grad_cosine" in row else 1)
            state.keep(row, each, timing, step.tokens, module)
            progress(state.done, len(schedule), {"loss": row["loss"]})

        module = module_class(model, train, len(schedule), state.done, report, **extra)
        # A loader draws a seed when it starts, on a resumed fit once more: not from the generator of dropout.
        steps = DataLoader(
            _Steps(schedule, state.done, make),
            batch_size=None,
            num_workers=trainer.loader_workers,
            generator=torch.Generator(),
        )
        precision = torch.bfloat16 if trainer.precision is Precision.bf16 else model.dtype
        meter = Meter(model, _device(trainer), precision, trainer.gradient_checkpointing)
        try:
            if state.done < len(schedule):
                _lightning(trainer, state).fit(module, steps)
        except NotFinite as error:
            last_good = scratch / "last_good"
            _save(model, state, train.lora, trainer, model_dir, last_good)
            raise UserError(
                f"Training stopped: {error} of {len(schedule)}. The weights before it are in {last_good}. "
                "Lower lr or grad_clip of this stage, or look at its data."
            ) from None
    _save(model, state, train.lora, trainer, model_dir, out)
    if trainer.processes == 1:
        _write_rows(out)
    rows = [step["row"] for step in state.steps]
    return {"steps": state.done, **_cost(state)} | last_means(rows, ("loss", *DPO_FIGURES))


def _cost(state: "_State") -> Row:
    """Of all steps: tokens and their rate, the most memory, the share of the matmul peak."""
    timing = [step["timing"] for step in state.steps]
    seconds = max(sum(row["seconds"] for row in timing), 1e-9)
    return {
        "tokens": state.tokens,
        "tokens_per_s": state.tokens / seconds,
        "peak_bytes": max(row["peak_bytes"] for row in timing),
        "matmul_fraction": sum(row["matmul_fraction"] * row["seconds"] for row in timing) / seconds,
    }


def _write_rows(out: Path) -> None:
    """The files of rows, from what each process noted of its steps."""
    scratch = out / "scratch"
    steps = [[json.loads(line) for line in file.open()] for file in sorted(scratch.glob("steps*.jsonl"))]
    noted = [step for process in steps for step in process if step["examples"]]
    each = [polars.DataFrame({"step": step["row"]["step"], **step["examples"]}) for step in noted]
    with full_disk_is_user_error(out):
        for name, part in (("metrics.jsonl", "row"), (TIMING, "timing")):
            (out / name).write_text("".join(json.dumps(step[part]) + "\n" for step in steps[0]))
        polars.concat(each).sort("step", "example").write_parquet(out / "trained.parquet")


def _save(
    model: Any, state: "_State", lora: LoraConfig, trainer: TrainerConfig, model_dir: Path, out: Path
) -> None:
    """The checkpoint; of several processes the first takes it from the state."""
    rank, processes = _rank(trainer)
    if rank > 0:
        return
    if processes > 1:
        model = _load(lora, trainer, model_dir)
        state.restore_weights(model)
    with full_disk_is_user_error(out):
        save_model(model, model_dir, out)


def _lightning(trainer: TrainerConfig, state: "_State") -> pl.Trainer:
    """A Trainer that only trains: progress, figures and checkpoints are ours."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    strategy: Any = "ddp" if trainer.strategy is Strategy.ddp else "auto"
    if trainer.strategy is Strategy.fsdp:
        strategy = ModelParallelStrategy(data_parallel_size=trainer.processes, tensor_parallel_size=1)
    return pl.Trainer(
        accelerator=trainer.accelerator.value,
        devices=trainer.processes,
        strategy=strategy,
        precision=_LIGHTNING[trainer.precision],  # type: ignore[arg-type]
        max_epochs=1,
        callbacks=[state],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


class _State(pl.Callback):
    """Rows of the steps done, and now and then everything needed to go on from one of them."""

    def __init__(self, scratch: Path, rank: int, every_s: float) -> None:
        self.path, self.rank, self.every_s = scratch / _STATE, rank, every_s
        steps_path = scratch / (f"steps.{rank}.jsonl" if rank else "steps.jsonl")
        self.done, self.tokens = 0, 0
        self.steps: list[dict[str, Any]] = []
        if self.path.exists():
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["about"])
            self.done, self.tokens = about["done"], about["tokens"]
            self.steps = [json.loads(line) for line in steps_path.read_text().splitlines()[: self.done]]
        aside = steps_path.with_suffix(".aside")  # what an interrupted fit wrote after its state goes
        aside.write_text("".join(json.dumps(step) + "\n" for step in self.steps))
        os.replace(aside, steps_path)
        self.file = steps_path.open("a", buffering=1)
        self.saved_at = time.monotonic()

    def restore_weights(self, model: Any) -> None:
        """The weights of the saved state, if there is one."""
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(file.get_tensor(f"model.{name}"))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Optimiser and random numbers as in the saved state, if there is one."""
        self.saved_at = time.monotonic()
        if not self.path.exists():
            return
        assert isinstance(module, _Module)
        optimizer = trainer.optimizers[0]
        with safe_open(self.path, "pt") as file:
            saved = set(file.keys())
            torch.set_rng_state(file.get_tensor("rng"))
            for name, parameter in _trained(module.model):
                if f"step.{name}" in saved:
                    optimizer.state[parameter] = {
                        field: _like(parameter, file.get_tensor(f"{field}.{name}"))
                        for field in ("step", "exp_avg", "exp_avg_sq")
                    }

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Of several processes, the first takes the result from here."""
        if trainer.world_size > 1:
            self._save(module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, error: BaseException) -> None:
        if isinstance(error, NotFinite) and trainer.world_size > 1:
            self._save(module)

    def keep(self, row: Row, each: Each, timing: Row, tokens: int, module: _Module) -> None:
        """Note a finished step; every `every_s` seconds save the state."""
        self.tokens += tokens
        self.done += 1
        number = {"step": self.done}
        step = {"row": number | row, "timing": number | timing, "examples": each}
        self.file.write(json.dumps(step) + "\n")
        self.steps.append(step | {"examples": None})
        waited = self.rank == 0 and time.monotonic() - self.saved_at >= self.every_s
        due = torch.tensor(float(waited), device=module.device)
        if module.trainer.world_size > 1:  # the first decides, when all have noted this step
            torch.distributed.all_reduce(due)
        if due:
            self._save(module)

    def _save(self, module: Any) -> None:
        """Everything of this step in one file, whole or not at all."""
        optimizer: Any = module.optimizers()
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in _trained(module.model):
            tensors[f"model.{name}"] = _whole(parameter.detach())
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{field}.{name}"] = _whole(value)
        self.saved_at = time.monotonic()
        if self.rank > 0:
            return
        about = {"done": self.done, "tokens": self.tokens}
        with full_disk_is_user_error(self.path):
            os.fsync(self.file.fileno())
            aside = self.path.with_suffix(".aside")
            save_file(tensors, aside, metadata={"about": json.dumps(about)})
            os.replace(aside, self.path)

    def close(self) -> None:
        self.file.close()


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` where, and in the shards in which, `parameter` is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
