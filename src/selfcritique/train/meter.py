"""What training steps cost: time, memory, and how much of the machine's matrix-product speed they use."""

import re
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from selfcritique.train.batch import TokenBatch
from selfcritique.train.model import head_chunks

Row = dict[str, float]
# Weights that read a layer's input: the attention's, with the first of their LoRA pairs.
_FIRST = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|c_attn|query_key_value)\.(?!lora_B)")


class Meter:
    """Figures of one step after another, of this process."""

    def __init__(self, model: Any, device: torch.device, precision: torch.dtype, recomputes: bool) -> None:
        self.model, self.device, self.recomputes = model, device, recomputes
        self.peak = matmul_peak(device, precision)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # Linux: the peak of this fit, not of what ran before it
                Path("/proc/self/clear_refs").write_text("5")
        self.clock = time.perf_counter()

    def step(self, batches: Sequence[TokenBatch], tokens: int, passes: int = 1) -> Row:
        """Of the step that just ended: seconds, tokens/s, peak bytes so far, share of the matmul peak.

        tokens: without padding, of all processes. passes: how often the batch went forward and backward.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        flops = passes * sum(step_flops(self.model, batch, self.recomputes) for batch in batches)
        return {
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "peak_bytes": float(peak_bytes(self.device)),
            "matmul_fraction": flops / seconds / self.peak,
        }


def step_flops(model: Any, batch: TokenBatch, recomputes: bool) -> int:
    """Matrix-product FLOPs of one forward and backward pass as executed, padding and all.

    A weight takes 2 per number and token in the forward pass (again where it is recomputed, which a layer's
    last is not), 2 for its input's gradient and, if it is trained, 2 for its own. What reads the first
    layer's input passes no gradient on where the embedding is frozen (LoRA), unless layers are recomputed.
    Attention takes 4 per width and pair of positions, of which causal kernels skip half, and 2.5 times that
    in the backward pass.
    """
    rows, longest = batch.input_ids.shape
    forwards = 2 if recomputes else 1
    decoder = model.get_decoder()
    embeddings = [m.weight for m in decoder.modules() if isinstance(m, nn.Embedding)]
    embedded = set(map(id, embeddings))
    weights = [p for p in decoder.parameters() if p.ndim == 2 and id(p) not in embedded]
    each = sum(2 * p.numel() * (forwards + 1 + p.requires_grad) for p in weights)
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if recomputes:
        each -= sum(2 * [p.numel() for p in layer.parameters() if p.ndim == 2][-1] for layer in layers)
    elif not any(weight.requires_grad for weight in embeddings):
        first = layers[0].named_parameters()
        each -= sum(2 * p.numel() for name, p in first if p.ndim == 2 and _FIRST.search(name))
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = longest**2 if batch.branch is not None or batch.position_ids is not None else longest**2 / 2
    attention = 4 * len(layers) * width * config.num_attention_heads * rows * seen * (forwards + 2.5)
    head = model.get_output_embeddings().weight
    forwards = 2 if head_chunks(head, len(batch.labels)) > 1 else 1
    logits = 2 * head.numel() * len(batch.labels) * (forwards + 1 + head.requires_grad)
    return int(rows * longest * each + attention + logits)


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on `device`, the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def peak_bytes(device: torch.device) -> int:
    """Most memory held at once: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
