"""Whole fits of tiny models: what may not change the result, and what stops a fit."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars
import pytest
import torch
from safetensors.torch import load_file

from selfcritique.artifacts import TIMING
from selfcritique.config import DpoLossConfig, Layout, Precision, SftNorm, TrainConfig, TrainerConfig
from selfcritique.errors import UserError
from selfcritique.train import fit as fit_module
from selfcritique.train import modules
from selfcritique.train.batch import Schedule, Step, TokenBatch, TokenExample, TokenPair, collate
from selfcritique.train.fit import ReferenceLogps, fit_dpo, fit_sft, reference_logps
from selfcritique.train.model import load_model, token_logps

MakePairs = Callable[..., list[TokenPair]]
Rows = list[dict[str, float]]

WHOLE = TrainerConfig(micro_tokens=10**6)  # a global batch is one micro-batch
EACH_STEP = TrainerConfig(micro_tokens=60, checkpoint_every_s=0)  # save the state after each step
LOSS = DpoLossConfig(lam=1.5, beta=0.5)


def training(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-2, "epochs": 1, "batch_size": 8, **changes})


def rows_of(out: Path) -> Rows:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def dpo(
    model: Path, pairs: list[TokenPair], out: Path, trainer: TrainerConfig = WHOLE,
    loss: DpoLossConfig = LOSS, train: TrainConfig | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A fit whose reference is its own start."""
    reference = reference_logps(trainer, model, pairs)
    return fit_dpo(train or training(), loss, trainer, model, pairs, reference, out, 7, **more)


def examples_of(pairs: list[TokenPair]) -> list[TokenExample]:
    return [TokenExample(p.prompt_ids, p.chosen_ids) for p in pairs]


def sft(
    model: Path, pairs: list[TokenPair], out: Path, trainer: TrainerConfig = WHOLE, **more: Any
) -> dict[str, Any]:
    return fit_sft(training(), trainer, model, examples_of(pairs), out, 7, **more)


class Stopped(Exception):
    pass


def stop_at(last: int, step: int, *_: Any) -> None:
    """A progress callback that interrupts the fit after a step."""
    if step == last:
        raise Stopped


def assert_rows_equal(rows: Rows, expected: Rows, tolerance: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance), row["step"]


# ---- invariance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", SftNorm)
def test_trajectory_does_not_depend_on_how_a_batch_is_cut(
    norm: SftNorm, gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of 8 pairs in float64: each alone, by two, together; layers kept or computed again; a pair's
    prompt once, twice in padded rows, twice in one row without padding.

    A sequence has up to 20 tokens, so a micro-batch of n pairs has 40 n. The model's dropout of 0.1 must
    be off, or no two of these would agree.
    """
    pairs = make_pairs(160, longest=20)
    loss = DpoLossConfig(lam=0.5, beta=1, sft_norm=norm)
    layouts = {
        "one": (40, 8, Layout.padded, False),
        "two": (80, 4, Layout.padded, False),
        "all": (320, 1, Layout.padded, False),
        "again": (320, 1, Layout.padded, True),
        "packed": (320, 1, Layout.packed, False),
        "shared": (320, 1, Layout.shared, False),
        "shared again": (40, 8, Layout.shared, True),
    }
    step, sizes = modules.DpoModule.training_step, []

    def note(self: modules.DpoModule, batch: Step, number: int) -> None:
        sizes.append(len(batch.micros))
        step(self, batch, number)

    monkeypatch.setattr(modules.DpoModule, "training_step", note)
    found = {}
    for name, (budget, micros, layout, again) in layouts.items():
        trainer = TrainerConfig(
            precision=Precision.fp64, micro_tokens=budget, layout=layout, gradient_checkpointing=again
        )
        sizes.clear()
        dpo(gpt2_dir, pairs, tmp_path / name, trainer, loss)
        assert sizes == [micros] * 20
        found[name] = rows_of(tmp_path / name), weights(tmp_path / name)
        found[name][0][0].pop("rewards_accuracy")  # of margins that are 0, up to rounding
    expected_rows, expected = found.pop("all")
    start = load_model(gpt2_dir).get_parameter("transformer.h.0.mlp.c_fc.weight")
    assert (expected["transformer.h.0.mlp.c_fc.weight"] - start).abs().max() > 0.05  # it does train
    for rows, final in found.values():
        assert_rows_equal(rows, expected_rows, 1e-9)
        for name, value in final.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=name)


def test_checkpointing_computes_layers_again(
    gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 2 layers runs once in the forward pass and once in the backward pass: 4 calls a step, not 2."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    real, calls = GPT2MLP.forward, []
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: (calls.append(self.training), real(self, x))[1])
    pairs = make_pairs(8)
    reference = reference_logps(WHOLE, gpt2_dir, pairs)
    for again, expected in ((False, 2), (True, 4)):
        trainer = TrainerConfig(micro_tokens=10**6, layout=Layout.padded, gradient_checkpointing=again)
        calls.clear()
        fit_dpo(training(), LOSS, trainer, gpt2_dir, pairs, reference, tmp_path / str(again), 7)
        assert calls == [False] * (2 + expected)  # two of the check of the reference; never dropout


def test_first_step_of_dpo_is_log_2(gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """Policy and stored reference are one model: every ratio is 1, although the model has dropout."""
    dpo(gpt2_dir, make_pairs(8), tmp_path)
    row = rows_of(tmp_path)[0]
    assert row["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    drifts = row["chosen_logps_drift"], row["rejected_logps_drift"]
    assert drifts == pytest.approx((0, 0), abs=1e-5)
    assert row["loss"] == pytest.approx(1.5 * math.log(2) + row["sft_loss"], abs=1e-5)


def test_sft_keeps_the_dropout_of_the_model(gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """The first loss is not that of the model without dropout, which `reference_logps` gives."""
    pairs = make_pairs(8)
    sft(gpt2_dir, pairs, tmp_path)
    logps = reference_logps(WHOLE, gpt2_dir, pairs)
    plain = -(logps.sums[0].sum() / logps.lengths[0].sum()).item()
    assert abs(rows_of(tmp_path)[0]["loss"] - plain) > 1e-3


def test_response_without_tokens_changes_nothing(
    llama_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Alone in its micro-batch, it is masked whole: no NaN, and the loss of the other seven."""
    examples = examples_of(make_pairs(7))
    alone = TrainerConfig(micro_tokens=1)
    fit_sft(training(), alone, llama_dir, examples, tmp_path / "seven", 7)
    fit_sft(training(), alone, llama_dir, [*examples, TokenExample([1, 4], [])], tmp_path / "eight", 7)
    assert_rows_equal(rows_of(tmp_path / "eight"), rows_of(tmp_path / "seven"), 1e-6)


def test_bf16_is_close_to_fp32(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """bf16 has 8 bits: log-probs of -5 a token are right to about 1 %, and DPO still starts at log 2."""
    pairs = make_pairs(16)
    dpo(llama_dir, pairs, tmp_path / "bf16", TrainerConfig(precision=Precision.bf16))
    dpo(llama_dir, pairs, tmp_path / "fp32")
    half, full = rows_of(tmp_path / "bf16"), rows_of(tmp_path / "fp32")
    assert half[0]["dpo_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert [r["sft_loss"] for r in half] == pytest.approx([r["sft_loss"] for r in full], rel=0.02)
    assert weights(tmp_path / "bf16")["model.norm.weight"].dtype == torch.float32


# ---- what a fit leaves ---------------------------------------------------------------------------------


def test_rows_hold_the_figures_of_their_step(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """Lengths and tokens of one batch of three pairs by hand; margins from rewards; loss from its terms."""
    pairs = make_pairs(3)
    report = dpo(llama_dir, pairs, tmp_path, train=training(epochs=2))
    first, second = rows_of(tmp_path)
    assert first["chosen_length"] == pytest.approx(sum(len(p.chosen_ids) for p in pairs) / 3)
    assert first["rejected_length"] == pytest.approx(sum(len(p.rejected_ids) for p in pairs) / 3)
    for row in (first, second):
        assert row["loss"] == pytest.approx(1.5 * row["dpo_loss"] + row["sft_loss"], abs=1e-5)
        assert row["rewards_margin"] == pytest.approx(
            row["rewards_chosen"] - row["rewards_rejected"], abs=1e-5
        )
        assert row["rewards_chosen"] == pytest.approx(0.5 * row["chosen_logps_drift"], abs=1e-5)
    drift = second["chosen_logps"] - first["chosen_logps"]  # from the start, which is the reference
    assert second["chosen_logps_drift"] == pytest.approx(drift, abs=1e-4) and abs(drift) > 0.1
    falls = -second["chosen_logps_drift"], -second["rejected_logps_drift"]
    assert second["kl_estimate"] == pytest.approx(sum(falls) / 2, abs=1e-5)
    assert 0 < second["rewards_accuracy"] <= 1 and second["grad_norm"] > 0
    read = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert (report["steps"], report["tokens"], report["dropped"]) == (2, 2 * read, 0)
    assert report["loss"] == pytest.approx(second["loss"])


def test_gradients_of_the_terms(gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """Every second step measured, and the first by hand: the policy is the reference, so the derivative of
    lam * L_DPO is -lam * beta / 2 = -0.375 by each margin. Measuring changes no step."""
    pairs = make_pairs(24)
    exact = TrainerConfig(precision=Precision.fp64, micro_tokens=60)
    dpo(gpt2_dir, pairs, tmp_path / "plain", exact)
    looked = DpoLossConfig(lam=1.5, beta=0.5, gradients_every=2)
    dpo(gpt2_dir, pairs, tmp_path / "looked", exact, looked)
    names = ("dpo_grad_norm", "sft_grad_norm", "grad_cosine")
    rows = rows_of(tmp_path / "looked")
    found = [[row.pop(name, None) for name in names] for row in rows]
    assert rows == rows_of(tmp_path / "plain") and found[1] == [None] * 3 and None not in found[2]

    model = load_model(gpt2_dir, torch.float64).eval()
    first = [pairs[i] for i in Schedule([p.length for p in pairs], 8, 1, 7)[0]]
    rows = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in first]
    logps = token_logps(model, collate(rows, 0))
    n_chosen = sum(len(p.chosen_ids) for p in first)
    chosen, rejected = logps[:n_chosen].sum(), logps[n_chosen:].sum()
    terms = -0.375 * (chosen - rejected) / 8, -chosen / n_chosen
    grads = [torch.autograd.grad(term, list(model.parameters()), retain_graph=True) for term in terms]
    by_dpo, by_sft = (torch.cat([g.flatten() for g in grad]) for grad in grads)
    cosine = (by_dpo @ by_sft / (by_dpo.norm() * by_sft.norm())).item()
    assert found[0] == pytest.approx([by_dpo.norm().item(), by_sft.norm().item(), cosine], rel=1e-6)


def test_equal_fits_leave_equal_bytes(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """A rebuilt artifact must have the digest of the first: no time may stand in its files."""
    left = []
    for name in ("first", "second"):
        sft(llama_dir, make_pairs(20), tmp_path / name)
        files = (f for f in sorted((tmp_path / name).iterdir()) if f.is_file())
        left.append({f.name: f.read_bytes() for f in files if f.name != TIMING})
    assert left[0] == left[1] and {"model.safetensors", "metrics.jsonl"} <= left[0].keys()


def test_over_long_examples_are_dropped_and_counted(
    gpt2_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Two pairs are longer than the model's 64 positions: reference and training never run them."""
    long = TokenPair([1] * 40, [5] * 30 + [2], [2])
    pairs = [*make_pairs(5), long, *make_pairs(5, seed=1), long]
    limited = TrainerConfig(max_length=64)
    assert dpo(gpt2_dir, pairs, tmp_path / "dpo", limited)["dropped"] == 2
    dpo(gpt2_dir, [p for p in pairs if p is not long], tmp_path / "short", limited)
    assert (tmp_path / "dpo/model.safetensors").read_bytes() == (
        tmp_path / "short/model.safetensors"
    ).read_bytes()
    assert sft(gpt2_dir, pairs, tmp_path / "sft", limited)["dropped"] == 2
    nothing = TrainerConfig(max_length=2)
    with pytest.raises(UserError, match=r"All 12 pairs are longer than trainer\.max_length=2"):
        dpo(gpt2_dir, pairs, tmp_path / "none", nothing)
    with pytest.raises(UserError, match=r"None of 12 examples"):
        sft(gpt2_dir, pairs, tmp_path / "none", nothing)


# ---- resume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_dir", "gpt2_dir"])
@pytest.mark.parametrize("kind", [sft, dpo])
def test_stopped_fit_goes_on_where_it_was(
    kind: Callable[..., Any], family: str, make_pairs: MakePairs, tmp_path: Path,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped after step 7 of 13 with the state of step 5: steps 6 and 7 are done again, dropout included."""
    model, pairs = request.getfixturevalue(family), make_pairs(100)
    kind(model, pairs, tmp_path / "whole", EACH_STEP)
    save = fit_module._State._save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fit_module._State, "_save", lambda self, m: self.done <= 5 and save(self, m))
        kind(model, pairs, tmp_path / "cut", EACH_STEP, progress=partial(stop_at, 7))
    drawn = []
    take = Schedule.__getitem__
    monkeypatch.setattr(Schedule, "__getitem__", lambda self, step: (drawn.append(step), take(self, step))[1])
    report = kind(model, pairs, tmp_path / "cut", EACH_STEP)
    assert drawn[-8:] == [5, 6, 7, 8, 9, 10, 11, 12] and report["steps"] == 13
    assert_rows_equal(rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole"), 1e-6)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], value, rtol=0, atol=1e-6, msg=name)


def kill_at(last: int, step: int, *_: Any) -> None:
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process cannot start OpenMP threads, and their number changes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_child(arguments: tuple[Any, ...], progress: Callable[..., None]) -> None:
    dpo(*arguments, progress=progress)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_fit_goes_on_where_it_was(
    workers: int, llama_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """SIGKILL at half an epoch, with batches made in this process or by two others."""
    trainer = TrainerConfig(micro_tokens=60, checkpoint_every_s=0, loader_workers=workers)
    pairs = make_pairs(100)
    dpo(llama_dir, pairs, tmp_path / "whole", EACH_STEP)
    arguments = llama_dir, pairs, tmp_path / "cut", trainer
    child = get_context("fork").Process(target=in_child, args=(arguments, partial(kill_at, 6)))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    steps: list[int] = []

    def note(step: int, total: int, figures: Mapping[str, float] | None) -> None:
        steps.append(step)

    reference = reference_logps(trainer, llama_dir, pairs)
    fit_dpo(training(), LOSS, trainer, llama_dir, pairs, reference, tmp_path / "cut", 7, note)
    assert steps == [7, 8, 9, 10, 11, 12, 13]
    assert_rows_equal(rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole"), 1e-6)


def test_fit_stopped_after_its_last_step_keeps_its_weights(
    llama_dir: Path, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to train, but the result must come from the state, not from the start."""
    pairs = make_pairs(20)
    sft(llama_dir, pairs, tmp_path / "whole", EACH_STEP)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fit_module, "save_model", lambda *_: stop_at(0, 0))
        sft(llama_dir, pairs, tmp_path / "cut", EACH_STEP)
    report = sft(llama_dir, pairs, tmp_path / "cut", EACH_STEP)
    assert report["steps"] == 3
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- what stops a fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_fit(
    bad: float, llama_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """The third batch has a pair whose reference is broken: the weights of step 2 are kept."""
    pairs = make_pairs(40)
    reference = reference_logps(WHOLE, llama_dir, pairs)
    whole = training(), LOSS, EACH_STEP, llama_dir, pairs
    with pytest.raises(Stopped):
        fit_dpo(*whole, reference, tmp_path / "two", 7, partial(stop_at, 2))
    third = Schedule([p.length for p in pairs], 8, 1, 7)[2]
    reference.sums[0, third[4]] = -bad
    with pytest.raises(UserError, match=r"loss is not finite at step 3 of 5.*last_good.*Lower lr"):
        fit_dpo(*whole, reference, tmp_path / "bad", 7)
    state = load_file(tmp_path / "two/scratch/state.safetensors")
    for name, value in weights(tmp_path / "bad/scratch/last_good").items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert not (tmp_path / "bad/model.safetensors").exists()
    assert len((tmp_path / "bad/scratch/steps.jsonl").read_text().splitlines()) == 2


def test_reference_of_other_data_or_another_model_is_refused(
    llama_dir: Path, make_llama: Callable[..., Path], make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs(12)
    same_lengths = [
        TokenPair(p.prompt_ids, p.chosen_ids, [4] * (len(p.rejected_ids) - 1) + [2]) for p in pairs
    ]
    wrong = {
        "other data": [(llama_dir, make_pairs(12, seed=1)), (llama_dir, pairs[:-1])],
        "does not start as the reference": [(make_llama(seed=1), pairs), (llama_dir, same_lengths)],
    }
    for message, cases in wrong.items():
        for model, data in cases:
            reference = reference_logps(WHOLE, model, data)
            with pytest.raises(UserError, match=message):
                fit_dpo(training(), LOSS, WHOLE, llama_dir, pairs, reference, tmp_path, 7)


def test_reference_file_survives_its_way_to_disk(
    llama_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """Sums and lengths of the file follow from its per-token values, in the order of the pairs."""
    pairs = make_pairs(9)
    reference_logps(TrainerConfig(micro_tokens=50), llama_dir, pairs).save(tmp_path / "reference")
    loaded = ReferenceLogps.load(tmp_path / "reference")
    assert loaded.lengths.tolist() == [
        [len(p.chosen_ids) for p in pairs],
        [len(p.rejected_ids) for p in pairs],
    ]
    sums = [part.sum().item() for part in loaded.tokens.split(loaded.lengths.flatten().tolist())]
    assert loaded.sums.flatten().tolist() == pytest.approx(sums, abs=1e-5)
    assert loaded.sums.dtype == torch.float32


# ---- what each example gave ----------------------------------------------------------------------------


def test_examples_hold_every_pair_of_every_step(
    llama_dir: Path, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """20 pairs of which one is too long, 2 epochs of 3 steps: 38 rows, whose means are the step's figures."""
    long = TokenPair([1] * 40, [5] * 30 + [2], [2])
    pairs = [*make_pairs(10), long, *make_pairs(9, seed=1)]
    trainer = TrainerConfig(micro_tokens=60, max_length=64)
    dpo(llama_dir, pairs, tmp_path, trainer, train=training(epochs=2))
    found = polars.read_parquet(tmp_path / "trained.parquet")
    for epoch in (found.filter(polars.col("step") <= 3), found.filter(polars.col("step") > 3)):
        assert sorted(epoch["example"]) == [i for i in range(20) if i != 10]
    lengths = [len(pairs[i].chosen_ids) for i in found["example"]]
    assert found["chosen_length"].to_list() == lengths
    for row in rows_of(tmp_path):
        own = found.filter(step=row["step"])
        for name in ("dpo_loss", "rewards_margin", "chosen_logps_drift", "kl_estimate"):
            assert own[name].mean() == pytest.approx(row[name], abs=1e-5)


def test_examples_of_sft(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """The loss of a step is that of its examples over their tokens; one epoch names each once."""
    sft(llama_dir, make_pairs(20), tmp_path, EACH_STEP)
    found = polars.read_parquet(tmp_path / "trained.parquet")
    assert sorted(found["example"]) == list(range(20))
    for row in rows_of(tmp_path):
        own = found.filter(step=row["step"])
        assert -own["logps"].sum() / own["length"].sum() == pytest.approx(row["loss"], rel=1e-5)


def test_every_step_has_its_cost(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """Per step in timing.jsonl, over all in the report: the rate is all tokens over all seconds."""
    pairs = make_pairs(20)
    report = dpo(llama_dir, pairs, tmp_path, EACH_STEP)
    timing = [json.loads(line) for line in (tmp_path / TIMING).read_text().splitlines()]
    assert [row["step"] for row in timing] == [1, 2, 3]
    tokens = sum(row["tokens_per_s"] * row["seconds"] for row in timing)
    assert tokens == pytest.approx(report["tokens"]) and report["tokens"] == sum(p.tokens for p in pairs)
    assert report["tokens_per_s"] == pytest.approx(tokens / sum(row["seconds"] for row in timing))
    assert 0 < report["matmul_fraction"] < 1
    assert report["peak_bytes"] == max(row["peak_bytes"] for row in timing)  # the system's count may wobble


def test_a_model_that_mixes_branches_gets_them_apart(
    llama_dir: Path, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A model deaf to the mask gives the second response other values: found out, said, and trained apart."""
    pairs = make_pairs(16)
    dpo(llama_dir, pairs, tmp_path / "padded", TrainerConfig(layout=Layout.padded))
    assert "layout=padded" not in caplog.text
    monkeypatch.setattr(TokenBatch, "attention_mask", lambda self: None)
    dpo(llama_dir, pairs, tmp_path / "deaf", TrainerConfig(layout=Layout.shared))
    assert "cannot score two responses after one prompt: layout=padded is used" in caplog.text
    assert rows_of(tmp_path / "deaf") == rows_of(tmp_path / "padded")
