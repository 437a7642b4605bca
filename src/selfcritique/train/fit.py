"""Fit a model and leave a plain checkpoint; an interrupted fit goes on from its last saved step.

OUT/                   model.safetensors, config, tokenizer: the result
OUT/metrics.jsonl      one row per step
OUT/scratch/state.safetensors      weights, optimiser and generator state, the step: written aside
"""

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfcritique.artifacts import full_disk_is_user_error
from selfcritique.config import DpoLossConfig, Precision, TrainConfig, TrainerConfig
from selfcritique.errors import UserError
from selfcritique.train.batch import (
    Schedule,
    TokenBatch,
    TokenExample,
    TokenPair,
    collate,
    micro_batches,
)
from selfcritique.train.loss import Denominators
from selfcritique.train.model import load_model, save_model, token_logps
from selfcritique.train.modules import DpoModule, NotFinite, Row, SftModule, _Module, last_means

Progress = Callable[[int, int, Mapping[str, float] | None], None]
_STATE = "state.safetensors"
_ROWS = "metrics.jsonl"
DPO_FIGURES = ("dpo_loss", "sft_loss", "rewards_margin", "rewards_accuracy", "chosen_logps_drift",
               "rejected_logps_drift", "chosen_length", "rejected_length")  # fmt: skip


class _Steps(Dataset[Any]):
    """One item per optimiser step: its micro-batches and the global batch's denominators."""

    def __init__(self, schedule: Schedule, start: int, make: Callable[[list[int]], Any]) -> None:
        self.schedule, self.start, self.make = schedule, start, make

    def __len__(self) -> int:
        return len(self.schedule) - self.start

    def __getitem__(self, item: int) -> Any:
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
    kept = _fitting(examples, trainer.max_length)
    lengths = [e.length for e in kept]

    def make(indices: list[int]) -> tuple[list[TokenBatch], Denominators]:
        groups = micro_batches(indices, lengths, trainer.micro_tokens)
        micros = [collate([(kept[i].prompt_ids, kept[i].response_ids) for i in g], 0) for g in groups]
        return micros, Denominators(len(indices), sum(len(kept[i].response_ids) for i in indices))

    schedule = Schedule(lengths, train.batch_size, train.epochs, seed)
    rows = _fit(SftModule, {}, train, trainer, model_dir, schedule, make, out, seed, progress)
    return _report(rows, sum(lengths), train, len(examples) - len(kept)) | last_means(rows, ("loss",))


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
    if len(reference.sums[0]) != len(pairs):
        raise UserError(
            f"The reference log-probs are for {len(reference.sums[0])} pairs, but there are {len(pairs)}: "
            "they belong to other data; compute them again."
        )
    kept = [i for i, pair in enumerate(pairs) if pair.length <= trainer.max_length]
    if not kept:
        raise UserError(
            f"All {len(pairs)} pairs are longer than trainer.max_length={trainer.max_length} tokens."
        )
    lengths = [pairs[i].length for i in kept]

    def make(indices: list[int]) -> tuple[list[tuple[TokenBatch, Tensor]], Denominators]:
        groups = micro_batches(indices, lengths, trainer.micro_tokens, rows=2)
        micros = []
        for group in groups:
            chosen = [kept[i] for i in group]
            micros.append((_pair_batch([pairs[i] for i in chosen]), reference.sums[:, chosen]))
        return micros, Denominators(len(indices), sum(len(pairs[kept[i]].chosen_ids) for i in indices))

    schedule = Schedule(lengths, train.batch_size, train.epochs, seed)
    _check_reference(trainer, model_dir, [kept[i] for i in schedule[0]], pairs, reference)
    rows = _fit(DpoModule, {"loss": loss}, train, trainer, model_dir, schedule, make, out, seed, progress)
    figures = last_means(rows, ("loss", *DPO_FIGURES))
    return _report(rows, 2 * sum(lengths), train, len(pairs) - len(kept)) | figures


def _pair_batch(pairs: Sequence[TokenPair]) -> TokenBatch:
    chosen = [(p.prompt_ids, p.chosen_ids) for p in pairs]
    return collate(chosen + [(p.prompt_ids, p.rejected_ids) for p in pairs], 0)


def _fitting(examples: Sequence[TokenExample], limit: int) -> list[TokenExample]:
    kept = [e for e in examples if e.length <= limit]
    if not kept:
        raise UserError(f"None of {len(examples)} examples has at most trainer.max_length={limit} tokens.")
    return kept


def _report(rows: Sequence[Row], epoch_tokens: int, train: TrainConfig, dropped: int) -> dict[str, Any]:
    speeds = sorted(row["tokens_per_s"] for row in rows)
    return {
        "steps": len(rows),
        "tokens": round(epoch_tokens * train.epochs),
        "response_tokens_per_s": speeds[len(speeds) // 2],
        "dropped": dropped,
    }


# ---- the reference -------------------------------------------------------------------------------------


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
    trainer: TrainerConfig, model_dir: Path, pairs: Sequence[TokenPair], progress: Progress = lambda *_: None
) -> ReferenceLogps:
    """One pass of the frozen model over all pairs, in evaluation mode."""
    model = load_model(model_dir).to(_device(trainer)).eval()
    lengths = [pair.length for pair in pairs]
    values: dict[tuple[int, int], Tensor] = {}
    for group in micro_batches(range(len(pairs)), lengths, trainer.micro_tokens, rows=2):
        parts = _frozen_logps(model, [pairs[i] for i in group])
        values |= {(side, i): v for side in (0, 1) for i, v in zip(group, parts[side], strict=True)}
        progress(len(values) // 2, len(pairs), None)
    ordered = [values[side, i] for side in (0, 1) for i in range(len(pairs))]
    sums = torch.stack([v.sum() for v in ordered]).view(2, -1)
    counts = torch.tensor([len(v) for v in ordered]).view(2, -1)
    return ReferenceLogps(sums, counts, torch.cat(ordered))


@torch.no_grad()
def _frozen_logps(model: Any, pairs: Sequence[TokenPair]) -> tuple[list[Tensor], list[Tensor]]:
    """Per-token values of the chosen and of the rejected responses."""
    batch = _pair_batch(pairs).to(next(model.parameters()).device)
    parts = token_logps(model, batch).cpu().split(batch.lengths.tolist())
    return list(parts[: len(pairs)]), list(parts[len(pairs) :])


def _check_reference(
    trainer: TrainerConfig,
    model_dir: Path,
    first: list[int],
    pairs: Sequence[TokenPair],
    reference: ReferenceLogps,
) -> None:
    """The policy starts as the reference: on the first batch it must give the stored values."""
    model = load_model(model_dir).to(_device(trainer)).eval()
    sides = _frozen_logps(model, [pairs[i] for i in first])
    now = torch.stack([torch.stack([v.sum() for v in side]) for side in sides])
    stored = reference.sums[:, first]
    if not torch.allclose(now, stored, rtol=1e-4, atol=1e-3):
        worst = (now - stored).abs().max().item()
        raise UserError(
            f"The policy does not start as the reference: their log-probs of the first batch differ by up to "
            f"{worst:.3g} nats. The reference file belongs to another model, tokenizer or data; delete it."
        )


# ---- the loop ------------------------------------------------------------------------------------------


def _device(trainer: TrainerConfig) -> torch.device:
    gpu = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def _fit(
    module_class: type[_Module],
    extra: Mapping[str, Any],
    train: TrainConfig,
    trainer: TrainerConfig,
    model_dir: Path,
    schedule: Schedule,
    make: Callable[[list[int]], Any],
    out: Path,
    seed: int,
    progress: Progress,
) -> list[Row]:
    pl.seed_everything(seed, verbose=False)
    model = load_model(model_dir).train()
    if trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    state = _State(scratch / _STATE, scratch / _ROWS, trainer.checkpoint_every_s)
    start = state.step()

    def report(step: int, row: Row) -> None:
        state.keep(step, row, module)
        progress(step, len(schedule), {"loss": row["loss"]})

    module = module_class(model, train, len(schedule), start, report, **extra)
    steps = DataLoader(_Steps(schedule, start, make), batch_size=None)
    try:
        if start < len(schedule):
            _lightning(trainer, state).fit(module, steps)
    except NotFinite as error:
        save_model(model, model_dir, scratch / "last_good")
        raise UserError(
            f"Training stopped: {error}. The weights before it are in {scratch / 'last_good'}. Lower lr or "
            "grad_clip of this stage, or look at its data."
        ) from None
    state.close()
    with full_disk_is_user_error(out):
        save_model(model, model_dir, out)
        shutil.copyfile(scratch / _ROWS, out / _ROWS)
    return state.rows


def _lightning(trainer: TrainerConfig, state: "_State") -> pl.Trainer:
    """A Trainer that only trains: progress, figures and checkpoints are ours."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision="bf16-mixed" if trainer.precision is Precision.bf16 else "32-true",
        max_epochs=1,
        callbacks=[state],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


class _State(pl.Callback):
    """Rows of the steps done, and now and then everything needed to go on from one of them."""

    def __init__(self, path: Path, rows_path: Path, every_s: float) -> None:
        self.path, self.rows_path, self.every_s = path, rows_path, every_s
        self.saved_at = time.monotonic()
        self.rows: list[Row] = []
        if path.exists():
            lines = rows_path.read_text().splitlines()[: self.step()]
            self.rows = [json.loads(line) for line in lines]
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = rows_path.open("a")

    def step(self) -> int:
        """Steps done when the state was last saved."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            return int(file.metadata()["step"])

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Go on from the saved state, if there is one."""
        assert isinstance(module, _Module)
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        torch.set_rng_state(tensors.pop("rng"))
        optimizer = trainer.optimizers[0]
        with torch.no_grad():
            for name, parameter in module.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
                if f"step.{name}" in tensors:
                    fields = ("step", "exp_avg", "exp_avg_sq")
                    optimizer.state[parameter] = {field: tensors.pop(f"{field}.{name}") for field in fields}

    def keep(self, step: int, row: Row, module: _Module) -> None:
        """Note a finished step; every `every_s` seconds save the state."""
        row = {"step": step, **row}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        if time.monotonic() - self.saved_at >= self.every_s:
            self.save(step, module)

    def save(self, step: int, module: _Module) -> None:
        """Everything of this step in one file, whole or not at all."""
        optimizer: Any = module.optimizers()
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in module.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{field}.{name}"] = value
        with full_disk_is_user_error(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            aside = self.path.with_suffix(".aside")
            save_file(tensors, aside, metadata={"step": str(step)})
            os.replace(aside, self.path)
        self.saved_at = time.monotonic()

    def close(self) -> None:
        self.file.close()
