"""Checkpoints, LoRA, and the log-probabilities of response tokens under a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from selfcritique.artifacts import write_json
from selfcritique.checkpoints import ADAPTER, plain_checkpoint
from selfcritique.config import LoraConfig
from selfcritique.errors import UserError
from selfcritique.train.batch import TokenBatch

CHUNK_LOGITS = 2**26  # floats of logits held at once: 256 MB
_ROWS = 32  # of logits that stay in a cache between two passes over them


def load_model(path: Path, dtype: torch.dtype = torch.float32, quantize: bool = False) -> Any:
    """A causal language model from a checkpoint folder or LoRA artifact, merged: safetensors only.

    quantize: weights in 4 bits, as QLoRA (arXiv 2305.14314) has them; CUDA only.
    """
    options: dict[str, Any] = {}
    if quantize:
        if not torch.cuda.is_available():
            raise UserError("lora.quantize needs CUDA and bitsandbytes; set it to false to train on the CPU.")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        plain_checkpoint(path), dtype=dtype, use_safetensors=True, attn_implementation="sdpa", **options
    )
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{path}: the model changes its logits ({name}), which training does not know.")
    return model


def add_adapter(model: Any, lora: LoraConfig) -> None:
    """Freeze the weights and put trainable low-rank updates beside them, zero at first, in place."""
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)


def merge_adapter(adapter: Path, base: Path, out: Path) -> None:
    """A plain checkpoint in `out`, fp32, of the model in `base` with the updates of `adapter` added in."""
    model = peft.PeftModel.from_pretrained(load_model(base), str(adapter))
    save_model(model.merge_and_unload(), adapter, out)


def save_model(model: Any, source: Path, out: Path) -> None:
    """`model` as a plain checkpoint in `out`, or its adapter, with the tokenizer files of `source`.

    An adapter says its base as STAGE/KEY, which is where an artifact lies in its store.
    """
    model.save_pretrained(out)
    if (out / ADAPTER).exists():
        config = json.loads((out / ADAPTER).read_text())
        config["base_model_name_or_path"] = f"{source.parent.name}/{source.name}"
        config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set
        write_json(out / ADAPTER, config)
    for file in source.iterdir():
        if (
            file.is_file()
            and file.name not in ("manifest.json", ADAPTER)  # of the source as an artifact
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
