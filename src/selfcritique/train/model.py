"""Checkpoints, and the log-probabilities of response tokens under a model."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from selfcritique.errors import UserError
from selfcritique.train.batch import TokenBatch

CHUNK_LOGITS = 2**26  # floats of logits held at once: 256 MB
_ROWS = 32  # of logits that stay in a cache between two passes over them


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from a checkpoint folder: safetensors, no code of its own."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
    )
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{path}: the model changes its logits ({name}), which training does not know.")
    return model


def save_model(model: Any, source: Path, out: Path) -> None:
    """`model` as a plain checkpoint in `out`, with the tokenizer files of `source`."""
    model.save_pretrained(out)
    for file in source.iterdir():
        if (
            file.is_file()
            and file.name != "manifest.json"  # of the source as an artifact
            and not (out / file.name).exists()
            and file.suffix in (".json", ".jinja", ".txt", ".model")
            and "index" not in file.name
        ):
            shutil.copyfile(file, out / file.name)


def checkpoint_layers(model: Any) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass.

    Layers do so in train mode only; what they consist of keeps its mode, which decides on dropout.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def token_logps(model: Any, batch: TokenBatch) -> Tensor:
    """Log-probability of each response token, (tokens,), fp32 (fp64 where the model is).

    The head runs at response positions only, in chunks that are computed again in the backward pass where
    all logits at once would be too many: batch x length x vocabulary never exists.
    """
    hidden = model.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask(),
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1)[batch.at]  # (tokens, width)
    head = model.get_output_embeddings()
    chunks = head_chunks(head.weight, len(hidden))
    if chunks == 1:
        return _head_logps(head, hidden, batch.labels)
    parts = [
        checkpoint(_head_logps, head, h, y, use_reentrant=False)
        for h, y in zip(hidden.tensor_split(chunks), batch.labels.tensor_split(chunks), strict=True)
    ]
    return torch.cat(parts)


def head_chunks(head: Tensor, tokens: int) -> int:
    """Into how many parts the logits of `tokens` positions are cut; head: (vocabulary, width)."""
    return max(1, -(-tokens * head.shape[0] // CHUNK_LOGITS))


def _head_logps(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return _LabelLogps.apply(logits, labels)  # type: ignore[no-untyped-call]


class _LabelLogps(torch.autograd.Function):
    """Log softmax of logits (tokens, vocabulary) at the labels (tokens,).

    The logits become their log softmax in place; the gradient is the only other thing of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        for rows in logits.split(_ROWS):
            rows.copy_(rows.log_softmax(-1))
        ctx.save_for_backward(logits, labels)
        return logits.gather(-1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """d log p(y) / d z_j = 1[j = y] - p_j"""
        logps, labels = ctx.saved_tensors
        gradient, of_labels = torch.empty_like(logps), gradients[0][:, None]
        for out, rows, g in zip(*(x.split(_ROWS) for x in (gradient, logps, of_labels)), strict=True):
            torch.exp(rows, out=out).mul_(-g)
        return gradient.scatter_add_(-1, labels[:, None], of_labels), None
