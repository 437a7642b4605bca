"""What general text costs a model, and how far its predictions have moved from the base's."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfcritique.errors import UserError
from selfcritique.prompts import PromptEncoder
from selfcritique.train.model import CHUNK_LOGITS, load_model

TOKENS_PER_FORWARD = 4096


def text_windows(encoder: PromptEncoder, text: str, size: int) -> list[list[int]]:
    """Consecutive pieces of `size` tokens, each after a BOS if the tokenizer has one; a rest is dropped."""
    ids = encoder.response_ids(text, eos=False)
    start = [] if encoder.bos_id is None else [encoder.bos_id]
    windows = [start + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    if not windows:
        raise UserError(
            f"text has {len(ids)} tokens, fewer than a window of {size}: give more or lower window."
        )
    return windows


def window_losses(
    folders: Sequence[Path], windows: Sequence[Sequence[int]], device: str
) -> Iterator[tuple[float, float | None]]:
    """Per window, the mean over its predicted tokens in nats: loss of the model, KL(base || model).

    folders: of the model and, for KL, of the base, which has the same tokenizer. KL is over the whole
    vocabulary at every position.
    """
    models = [load_model(folder).to(device).eval() for folder in folders]
    context = getattr(models[0].config.get_text_config(), "max_position_embeddings", len(windows[0]))
    if len(windows[0]) > context:
        raise UserError(
            f"A window of {len(windows[0])} tokens exceeds the model's context of {context}; lower window."
        )
    rows = max(1, TOKENS_PER_FORWARD // len(windows[0]))
    for start in range(0, len(windows), rows):
        with torch.inference_mode():
            losses, kl = _losses(models, torch.tensor(windows[start : start + rows], device=device))
        yield from zip(losses.tolist(), [None] * len(losses) if kl is None else kl.tolist(), strict=True)


def _losses(models: Sequence[Any], ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """(windows,) each, by chunks of positions so that few logits exist at once."""
    hidden = [m.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1] for m in models]
    size = max(1, CHUNK_LOGITS // (len(ids) * models[0].get_output_embeddings().weight.shape[0]))
    losses, kls = [], []
    for i in range(0, ids.shape[1] - 1, size):
        logps = [
            m.get_output_embeddings()(h[:, i : i + size]).float().log_softmax(-1)
            for m, h in zip(models, hidden, strict=True)
        ]
        losses.append(-logps[0].gather(-1, ids[:, i + 1 : i + 1 + size, None])[..., 0])
        if len(models) == 2:
            kls.append((logps[1].exp() * (logps[1] - logps[0])).sum(-1))
    return torch.cat(losses, 1).mean(1), torch.cat(kls, 1).mean(1) if kls else None
