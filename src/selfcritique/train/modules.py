"""The LightningModules: one training step is one global batch, in micro-batches, by the pure losses."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from selfcritique.config import DpoLossConfig, LamOn, Schedule, SftNorm, TrainConfig
from selfcritique.errors import UserError
from selfcritique.train.batch import Step, TokenBatch
from selfcritique.train.loss import Denominators, merged_loss, preference_loss, sequence_logps, sft_loss
from selfcritique.train.meter import Row
from selfcritique.train.model import token_logps

Each = dict[str, list[float]]  # figure -> its value for every example of a step
Report = Callable[[Row, Step, Each], None]


def schedule_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, then the schedule down to nothing."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(steps - warmup, 1)
    if config.schedule is Schedule.linear:
        return left
    return (1 - math.cos(math.pi * left)) / 2 if config.schedule is Schedule.cosine else 1.0


class _Module(pl.LightningModule):
    """What SFT and DPO share: the optimiser, one step over micro-batches, and its report.

    report: called after each step with its row and what it knows of each example of this process.
    """

    DROPOUT: ClassVar[bool]  # whether the model's own dropout is active in training

    def __init__(self, model: Any, config: TrainConfig, steps: int, start: int, report: Report) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.steps, self.report = model, config, steps, report
        self.score: Callable[[TokenBatch], Tensor] = partial(token_logps, model)
        self.done = start

    def configure_model(self) -> None:
        """Under FSDP2, cut the model into shards, layer by layer."""
        if self.device_mesh is None or isinstance(next(self.model.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        # The head runs outside the model's own forward, which is where shards would be gathered.
        self.model.token_logps = MethodType(token_logps, self.model)
        register_fsdp_forward_method(self.model, "token_logps")
        self.score = self.model.token_logps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        c = self.config
        plain = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=True)

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        def move(micro: Any) -> Any:
            return micro.to(device) if hasattr(micro, "to") else tuple(part.to(device) for part in micro)

        return batch._replace(micros=[move(micro) for micro in batch.micros])

    def micro_loss(self, micro: Any, whole: Denominators) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This micro-batch's share of the global batch's `loss` and of other figures, which add up; and
        figures of each of its examples."""
        raise NotImplementedError

    def sft_gradients(self, batch: Step) -> list[Tensor]:
        """Gradients of the weighted cross-entropy alone, at steps where they are wanted."""
        return []

    def backward_all(self, batch: Step, name: str) -> tuple[Row, Each]:
        """Gradients of one figure of the global batch; the values of all figures, also of each example."""
        total: dict[str, Tensor] = {}
        parts: list[dict[str, Tensor]] = []
        processes = self.trainer.world_size
        for number, micro in enumerate(batch.micros):
            counts = number < len(batch.micros) - batch.idle
            figures, each = self.micro_loss(micro, batch.whole)
            self.manual_backward(figures[name] * (processes * counts))  # strategies average over processes
            for figure, value in figures.items():
                total[figure] = total.get(figure, torch.zeros(())) + value.detach() * counts
            parts += [each] * counts
        if processes > 1:
            sums = torch.stack(list(total.values()))
            torch.distributed.all_reduce(sums)
            total = dict(zip(total, sums, strict=True))
        row = {figure: value.item() for figure, value in total.items()}
        names = parts[0] if parts else ()
        return row, {name: torch.cat([part[name] for part in parts]).tolist() for name in names}

    def training_step(self, batch: Step, _: int) -> None:
        optimizer: Any = self.optimizers()
        lr = self.config.lr * schedule_factor(self.config, self.done, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sft_gradients = self.sft_gradients(batch)
        row, each = self.backward_all(batch, "loss")
        if sft_gradients:
            row |= _compare_terms(sft_gradients, [p.grad for p in self.model.parameters()])
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        row |= {"grad_norm": _value(norm), "lr": lr}
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(row[name])]
        if bad:  # before the optimiser moves: the weights are still those of the last good step
            raise NotFinite(self.done + 1, bad[0])
        optimizer.step()
        self.done += 1
        self.report(row, batch, each)


class NotFinite(UserError):
    """Loss or gradient is NaN or infinite at `step` (from 1, as in metrics.jsonl)."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} is not finite at step {step}")


class SftModule(_Module):
    """Cross-entropy on responses, per token of the global batch."""

    DROPOUT = True

    def micro_loss(
        self, micro: TokenBatch, whole: Denominators
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logps = sequence_logps(self.score(micro), micro.sequence, len(micro.lengths))
        each = {"example": micro.examples, "logps": logps.detach(), "length": micro.lengths}
        return {"loss": sft_loss(logps, micro.lengths, whole, SftNorm.token)}, each


class DpoModule(_Module):
    """The merged loss on pairs. A micro-batch holds all chosen, then all rejected sequences, and the
    reference's log-probs (2, pairs). The reference sampled the responses, so the mean fall of their
    log-probs estimates KL(reference || policy), with the bias of their selection. No dropout: its noise
    would count as drift."""

    DROPOUT = False

    def __init__(self, *arguments: Any, loss: DpoLossConfig) -> None:
        super().__init__(*arguments)
        self.loss = loss

    def sft_gradients(self, batch: Step) -> list[Tensor]:
        if not self.loss.gradients_every or self.done % self.loss.gradients_every:
            return []
        self.backward_all(batch, "sft_loss")
        weight = self.loss.lam if self.loss.lam_on is LamOn.sft else 1.0
        gradients = [weight * p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return gradients

    def micro_loss(
        self, micro: tuple[TokenBatch, Tensor], whole: Denominators
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch, reference = micro
        logps = sequence_logps(self.score(batch), batch.sequence, len(batch.lengths))
        chosen, rejected = logps.chunk(2)
        chosen_length, rejected_length = batch.lengths.chunk(2)
        c = self.loss
        losses = preference_loss(
            chosen, rejected, reference[0], reference[1], c.beta, c.kind, c.label_smoothing
        )
        dpo = losses.sum() / whole.sequences
        sft = sft_loss(chosen, chosen_length, whole, c.sft_norm)
        chosen_drift, rejected_drift = chosen.detach() - reference[0], rejected.detach() - reference[1]
        margins = c.beta * (chosen_drift - rejected_drift)
        each = {
            "rewards_chosen": c.beta * chosen_drift,
            "rewards_rejected": c.beta * rejected_drift,
            "rewards_margin": margins,
            "rewards_accuracy": (margins > 0).to(logps.dtype),
            "chosen_logps": chosen.detach(),
            "rejected_logps": rejected.detach(),
            "chosen_logps_drift": chosen_drift,
            "rejected_logps_drift": rejected_drift,
            "kl_estimate": -(chosen_drift + rejected_drift) / 2,
            "chosen_length": chosen_length.to(logps.dtype),
            "rejected_length": rejected_length.to(logps.dtype),
        }
        figures = {"loss": merged_loss(dpo, sft, c), "dpo_loss": dpo, "sft_loss": sft}
        figures |= {name: value.sum() / whole.sequences for name, value in each.items()}
        return figures, {"example": batch.examples, "dpo_loss": losses.detach(), **each}


def _compare_terms(sft: Sequence[Tensor], merged: Sequence[Tensor | None]) -> Row:
    """Norms of the two terms' gradients, as the loss weighs them, and the cosine between them."""
    whole = [g for g in merged if g is not None]
    dpo = [g - s for g, s in zip(whole, sft, strict=True)]

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(_value((x * y).sum()) for x, y in zip(a, b, strict=True))

    norms = math.sqrt(dot(dpo, dpo)), math.sqrt(dot(sft, sft))
    cosine = dot(dpo, sft) / max(norms[0] * norms[1], 1e-30)
    return {"dpo_grad_norm": norms[0], "sft_grad_norm": norms[1], "grad_cosine": cosine}


def _value(scalar: Any) -> float:
    return float((scalar.full_tensor() if isinstance(scalar, DTensor) else scalar).item())


def last_means(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Means over the last tenth of the steps."""
    tail = rows[-max(1, len(rows) // 10) :]
    return {name: sum(row[name] for row in tail) / len(tail) for name in names if name in tail[0]}
