"""Fits in two processes, started as a run starts them, against one process."""

import json
from collections.abc import Callable
from pathlib import Path

import polars
import pytest
import torch
from safetensors.torch import load_file

from selfcritique.config import DpoLossConfig, SftNorm, Strategy, TrainConfig, TrainerConfig
from selfcritique.errors import UserError
from selfcritique.train.batch import Schedule, TokenPair, micro_batches_of
from selfcritique.train.fit import fit_dpo, reference_logps

LENGTHS = [30, 5, 5, 6, 7, 20, 9]
TRAIN = TrainConfig(lr=3e-3, epochs=4, batch_size=9)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5, 6], [3]])
def test_shares_of_the_processes_make_up_the_batch(indices: list[int]) -> None:
    """Each example counts in one process; all run as many micro-batches: all gather shards."""
    shares = [micro_batches_of(rank, 2, indices, LENGTHS, budget=20) for rank in range(2)]
    assert len({len(groups) for groups, _ in shares}) == 1
    counted = [i for groups, idle in shares for group in groups[: len(groups) - idle] for i in group]
    assert sorted(counted) == indices


@pytest.mark.parametrize(
    ("strategy", "norm"),
    [(Strategy.ddp, SftNorm.token), (Strategy.fsdp, SftNorm.sum), (Strategy.ddp, SftNorm.sequence)],
)
def test_two_processes_train_as_one(
    strategy: Strategy, norm: SftNorm, make_llama: Callable[..., Path],
    make_pairs: Callable[..., list[TokenPair]], tmp_path: Path,
) -> None:  # fmt: skip
    """Every figure of 20 steps, also of each example, and the weights; head and embedding are one matrix.
    What differs is rounding: it has no direction."""
    model, pairs, loss = (
        make_llama(tie_word_embeddings=True),
        make_pairs(44),
        DpoLossConfig(1.5, 0.5, sft_norm=norm, gradients_every=2),
    )
    trainer = TrainerConfig(micro_tokens=70)
    reference = reference_logps(trainer, model, pairs)
    one = fit_dpo(TRAIN, loss, trainer, model, pairs, reference, tmp_path / "one", 7)
    trainer = TrainerConfig(micro_tokens=70, strategy=strategy, processes=2)
    seen: list[int] = []
    two = fit_dpo(
        TRAIN, loss, trainer, model, pairs, reference, tmp_path / "two", 7, lambda step, *_: seen.append(step)
    )
    assert two.keys() == one.keys() and (two["steps"], two["tokens"]) == (20, one["tokens"]) and seen
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, other in zip(*rows, strict=True):
        if mine["step"] == 1:  # margins are 0, up to rounding
            other["rewards_accuracy"] = mine["rewards_accuracy"]
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-4)
    residuals = [other["loss"] - mine["loss"] for mine, other in zip(*rows, strict=True)]
    assert abs(sum(residuals) / 20) <= 1e-5
    tables = [polars.read_parquet(tmp_path / name / "trained.parquet") for name in ("one", "two")]
    assert tables[0]["step", "example"].equals(tables[1]["step", "example"])
    for name in ("chosen_logps", "rejected_logps"):
        assert tables[1][name].to_list() == pytest.approx(tables[0][name].to_list(), rel=1e-4, abs=1e-4)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_fault_of_the_processes_reaches_the_run(
    llama_dir: Path, make_pairs: Callable[..., list[TokenPair]], tmp_path: Path
) -> None:
    """A broken reference in the third batch: the message of one process, and the weights of step 2."""
    pairs = make_pairs(44)
    reference = reference_logps(TrainerConfig(), llama_dir, pairs)
    reference.sums[0, Schedule([p.length for p in pairs], 9, 1, 7)[2][4]] = torch.nan
    trainer = TrainerConfig(strategy=Strategy.ddp, processes=2)
    with pytest.raises(UserError, match=r"loss is not finite at step 3 of 20.*last_good"):
        fit_dpo(TRAIN, DpoLossConfig(1, 1), trainer, llama_dir, pairs, reference, tmp_path, 7)
    kept = load_file(tmp_path / "scratch/last_good/model.safetensors")["model.norm.weight"]
    assert 0.0045 < (kept - 1).abs().max() < 0.0075  # norms start at 1 and move by up to lr a step
