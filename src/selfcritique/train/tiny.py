"""The embedded default: a tiny Llama and its tokenizer, made here and saved as a plain checkpoint."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfcritique.config import TinyConfig

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CONTEXT = 512
HEAD_DIM = 32  # the smallest that every engine runs
# The user's turn as it is, then a newline: the model has no other turns.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
_PIECE = re.compile(r"\s?[A-Za-z]+|\s?\d+|\s?[^\sA-Za-z\d]+|\n")


def build_tokenizer(
    texts: Iterable[str], words: Iterable[str], largest_number: int
) -> PreTrainedTokenizerFast:
    """A word-level vocabulary that spells anything else in bytes, so that every text survives.

    One token each: every word of `texts` and `words` and each number up to `largest_number`, with and
    without the space before it.
    """
    pieces = {piece for text in (*texts, *words) for piece in _PIECE.findall(text)}
    pieces |= {str(n) for n in range(largest_number + 1)} | {f" {n}" for n in range(largest_number + 1)}
    pieces |= {chr(c) for c in range(32, 127)} | {"\n"}
    whole = [*sorted(pieces - {" "}), " "]
    vocabulary = [(token, 0.0) for token in SPECIAL]
    # Fewer pieces always win: each piece costs 10, a byte as much, and a word beats its letters.
    vocabulary += [(piece.replace(" ", "▁"), -10.0) for piece in whole]
    vocabulary += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[3],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, seed: int, out: Path) -> int:
    """Write a freshly initialised model with its tokenizer to `out`; returns its number of parameters."""
    torch.manual_seed(seed)
    heads = config.hidden_size // HEAD_DIM
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    aside = out.with_name(f"{out.name}.aside")  # `out` is whole or not there
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)
    return sum(p.numel() for p in model.parameters())
