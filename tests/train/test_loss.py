"""The losses against numbers derived by hand, and against TRL on a model."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfcritique.config import DpoLossConfig, LamOn, PreferenceLoss, SftNorm, TrainConfig, TrainerConfig
from selfcritique.errors import UserError
from selfcritique.train.batch import TokenPair, collate
from selfcritique.train.fit import reference_logps
from selfcritique.train.loss import Denominators, merged_loss, preference_loss, sequence_logps, sft_loss
from selfcritique.train.model import load_model
from selfcritique.train.modules import DpoModule


def of_one_pair(kind: PreferenceLoss, beta: float, smoothing: float = 0.0) -> tuple[float, float]:
    """Loss of one pair, and its derivative by the policy's chosen log-prob.

    Policy -1 and -3, reference -2 and -2.5: h = (-1 + 2) - (-3 + 2.5) = 1.5.
    """
    chosen = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    rejected, reference = torch.tensor([-3.0]).double(), torch.tensor([[-2.0], [-2.5]]).double()
    loss = preference_loss(chosen, rejected, reference[0], reference[1], beta, kind, smoothing)
    loss.sum().backward()
    assert chosen.grad is not None
    return loss.item(), chosen.grad.item()


def test_dpo() -> None:
    """beta h = 2 * 1.5 = 3; -log sigma(3) = log(1 + e^-3); its derivative is -2 (1 - sigma(3))."""
    loss, slope = of_one_pair(PreferenceLoss.sigmoid, beta=2)
    assert loss == pytest.approx(0.0485873516, abs=1e-9)
    assert slope == pytest.approx(-2 * 0.0474258732, abs=1e-9)


def test_conservative_dpo() -> None:
    """0.9 * log(1 + e^-3) + 0.1 * log(1 + e^3), where log(1 + e^3) = 3 + log(1 + e^-3):
    0.9 * 0.0485873516 + 0.1 * 3.0485873516 = 0.3485873516. Derivative: 2 (sigma(3) - 0.9)."""
    loss, slope = of_one_pair(PreferenceLoss.sigmoid, beta=2, smoothing=0.1)
    assert loss == pytest.approx(0.3485873516, abs=1e-9)
    assert slope == pytest.approx(2 * (0.9525741268 - 0.9), abs=1e-9)


def test_ipo() -> None:
    """(1.5 - 1 / (2 * 2))^2 = 1.25^2; derivative 2 * 1.25."""
    assert of_one_pair(PreferenceLoss.ipo, beta=2) == pytest.approx((1.5625, 2.5), abs=1e-12)


@pytest.mark.parametrize(("beta", "loss", "slope"), [(0.5, 0.25, -0.5), (2.0, 0.0, 0.0)])
def test_hinge(beta: float, loss: float, slope: float) -> None:
    """max(0, 1 - 0.5 * 1.5) = 0.25 with derivative -beta; with beta 2 the margin of 3 is past the hinge."""
    assert of_one_pair(PreferenceLoss.hinge, beta) == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_policy_equal_to_reference_is_log_2(beta: float) -> None:
    logps = torch.tensor([-12.5, -300.25])
    loss = preference_loss(logps, 2 * logps, logps, 2 * logps, beta)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "expected"), [(SftNorm.token, 2.5), (SftNorm.sequence, 3.0), (SftNorm.sum, 5.0)]
)
def test_sft_norms(norm: SftNorm, expected: float) -> None:
    """Log-probs -6 of 3 tokens and -4 of 1: 10 / 4 tokens; (6/3 + 4/1) / 2 sequences; 10 / 2 sequences.

    A response without tokens adds nothing, and parts of the batch add up to the whole.
    """
    logps, lengths = torch.tensor([-6.0, -4.0, 0.0]), torch.tensor([3, 1, 0])
    whole = Denominators(sequences=2, tokens=4)
    assert sft_loss(logps, lengths, whole, norm).item() == pytest.approx(expected)
    parts = [sft_loss(logps[i : i + 1], lengths[i : i + 1], whole, norm).item() for i in range(3)]
    assert sum(parts) == pytest.approx(expected)


@pytest.mark.parametrize(("lam_on", "expected"), [(LamOn.dpo, 0.5 * 0.3 + 2), (LamOn.sft, 0.3 + 0.5 * 2)])
def test_lambda_weighs_one_term(lam_on: LamOn, expected: float) -> None:
    config = DpoLossConfig(lam=0.5, beta=1, lam_on=lam_on)
    assert merged_loss(torch.tensor(0.3), torch.tensor(2.0), config).item() == pytest.approx(expected)


def test_sequence_logps_sums_each_sequence() -> None:
    tokens, sequence = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2])
    assert sequence_logps(tokens, sequence, 3).tolist() == [-1.0, 0.0, -6.0]


def test_label_smoothing_is_for_dpo_only() -> None:
    with pytest.raises(UserError, match=r"label_smoothing=0\.1"):
        DpoLossConfig(lam=1, beta=1, kind=PreferenceLoss.ipo, label_smoothing=0.1)


# ---- TRL -----------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """The policy with noise: a reference that differs from it."""
    model = load_model(llama_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(path)
    return path


def loss_of_trl(
    policy: Path, reference: Path, pairs: list[TokenPair], lam: float, beta: float, out: Path
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of TRL's DPOTrainer; word n of its texts is token n."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(50)}, unk_token="w00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w00", eos_token="w02")

    def text(ids: list[int]) -> str:
        return "".join(f" w{i:02}" for i in ids)

    rows = [
        {
            "prompt": text(p.prompt_ids),
            "chosen": text(p.chosen_ids[:-1]) + " ",
            "rejected": text(p.rejected_ids[:-1]) + " ",
        }
        for p in pairs
    ]
    config = DPOConfig(
        output_dir=str(out), loss_type=["sigmoid", "sft"], loss_weights=[lam, 1.0], beta=beta, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=load_model(policy), ref_model=load_model(reference), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    examples = list(trainer.train_dataset)
    ids = [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples]
    assert ids == [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("lam", [0.5, 1.0, 1.5])
def test_equals_trl(
    lam: float, beta: float, llama_dir: Path, reference_dir: Path, tmp_path: Path,
    make_pairs: Callable[..., list[TokenPair]],
) -> None:  # fmt: skip
    pairs = make_pairs(6, seed=1)
    theirs, their_gradients = loss_of_trl(llama_dir, reference_dir, pairs, lam, beta, tmp_path)

    model = load_model(llama_dir)
    config = DpoLossConfig(lam=lam, beta=beta)
    module = DpoModule(model, TrainConfig(lr=1, epochs=1), 1, 0, lambda *_: None, loss=config)
    rows = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs]
    reference = reference_logps(TrainerConfig(), reference_dir, pairs).sums
    whole = Denominators(len(pairs), sum(len(p.chosen_ids) for p in pairs))
    loss = module.micro_loss((collate(rows, 0), reference), whole)[0]["loss"]
    loss.backward()

    assert loss.item() == pytest.approx(theirs, abs=1e-5)
    ours = gradients(model)
    assert ours.keys() == their_gradients.keys()
    for name, gradient in ours.items():
        largest = gradient.abs().max().item()
        assert largest > 0.05  # so that 1e-5 means something; fp32 keeps 7 digits of larger ones
        difference = (gradient - their_gradients[name]).abs().max().item()
        assert difference <= 1e-5 * max(1, largest), name
