"""The losses, as pure functions of log-probabilities. All logs are natural, all inputs fp32 or better.

Whatever is averaged is averaged over the *global* batch: callers pass its denominators, so that the sum
over micro-batches (or processes) is the loss of the whole batch, however it was cut.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from selfcritique.config import DpoLossConfig, LamOn, PreferenceLoss, SftNorm


def sequence_logps(token_logps: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """Summed log-probability of each response, EOS included.

    token_logps: (tokens,); sequence: (tokens,) index of the sequence of each token. Returns (n_sequences,);
    a sequence without response tokens has 0.
    """
    return torch.zeros(n_sequences, dtype=token_logps.dtype, device=token_logps.device).index_add(
        0, sequence, token_logps
    )


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    kind: PreferenceLoss = PreferenceLoss.sigmoid,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair, (pairs,); all inputs are (pairs,) summed log-probabilities.

    sigmoid: DPO, arXiv 2305.18290 eq. 7; with label smoothing e, conservative DPO: e is the probability
    that a label is flipped. ipo: arXiv 2310.12036 eq. 17, on summed log-probabilities. hinge: SLiC-style
    margin loss, arXiv 2309.06657 eq. 9, on the same logits.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    h = chosen_logratios - rejected_logratios
    if kind is PreferenceLoss.ipo:
        return (h - 1 / (2 * beta)) ** 2
    if kind is PreferenceLoss.hinge:
        return torch.relu(1 - beta * h)
    e = label_smoothing
    return -(1 - e) * logsigmoid(beta * h) - e * logsigmoid(-beta * h)


class Denominators(NamedTuple):
    """Of one global batch: what its means divide by."""

    sequences: int  # responses trained on (SFT) or pairs (DPO)
    tokens: int  # response tokens of those (SFT) or of the chosen responses (DPO), EOS included


def sft_loss(logps: Tensor, lengths: Tensor, whole: Denominators, norm: SftNorm) -> Tensor:
    """Cross-entropy of responses, a scalar: this part's share of the global batch's.

    logps: (sequences,) summed; lengths: (sequences,) tokens. token: over all tokens of the global batch;
    sequence: mean over sequences of their per-token means; sum: mean over sequences of their sums.
    """
    if norm is SftNorm.token:
        return -logps.sum() / max(whole.tokens, 1)
    if norm is SftNorm.sequence:
        return -(logps / lengths.clamp(min=1)).sum() / max(whole.sequences, 1)
    return -logps.sum() / max(whole.sequences, 1)


def merged_loss(dpo: Tensor, sft: Tensor, config: DpoLossConfig) -> Tensor:
    """lam * L_DPO + L_SFT (arXiv 2404.02893, section 3.3), or L_DPO + lam * L_SFT with lam_on=sft."""
    return config.lam * dpo + sft if config.lam_on is LamOn.dpo else dpo + config.lam * sft
