"""Tiny random checkpoints and token data, made on the spot. Training sees ids only: no tokenizer."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from selfcritique.train.batch import TokenPair

VOCABULARY, EOS = 50, 2


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(seed: int = 0, **changes: Any) -> Path:
        """Weights large enough for distributions far from uniform."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            **changes,
        )
        path = tmp_path_factory.mktemp("llama")
        LlamaForCausalLM(config).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def llama_dir(make_llama: Callable[..., Path]) -> Path:
    return make_llama()


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dropout of 0.1 everywhere; with fp64 weights all of it computes in fp64 (Llama's norms do not)."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    )
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., list[TokenPair]]:
    def make(n: int, seed: int = 0, longest: int = 0) -> list[TokenPair]:
        """Prompts of 3-9 tokens, responses of 2-9; with `longest`, one response fills up to that length."""
        rng = Random(seed)

        def ids(count: int) -> list[int]:
            return [rng.randrange(3, VOCABULARY) for _ in range(count)]

        pairs = []
        for _ in range(n):
            prompt = [1, *ids(rng.randint(2, 8))]
            sides = [ids(rng.randint(1, 8)), ids(rng.randint(1, 8))]
            if longest:
                sides[rng.randrange(2)] = ids(longest - len(prompt) - 1)
            pairs.append(TokenPair(prompt, sides[0] + [EOS], sides[1] + [EOS]))
        return pairs

    return make
