"""The embedded default as a checkpoint: whole, deterministic, and able to spell anything."""

from pathlib import Path

import pytest
import torch

from selfcritique.config import TinyConfig
from selfcritique.train.model import load_model
from selfcritique.train.tiny import build_tokenizer, save_tiny

TEXTS = ["Ann has 12 pens.\n12 + 3 = 15"]


def test_tokens_are_whole_words_and_numbers_and_every_text_survives() -> None:
    tokenizer = build_tokenizer(TEXTS, ["wrong"], largest_number=20)
    assert tokenizer.tokenize("Ann has 12 wrong 19") == ["Ann", "▁has", "▁12", "▁", "wrong", "▁19"]
    for text in (*TEXTS, "naïve 21 = 3 × 7", "两 {x}\n\n", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between model and tokenizer nothing stands under its name; the next attempt is complete."""
    tokenizer, out, config = build_tokenizer(TEXTS, [], 20), tmp_path / "init", TinyConfig(32, 48, 1)

    def die(_: Path) -> None:
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(tokenizer, "save_pretrained", die)
        save_tiny(config, tokenizer, 0, out)
    assert not out.exists()
    parameters = save_tiny(config, tokenizer, 0, out)
    assert (out / "tokenizer.json").exists()
    model = load_model(out)
    assert sum(p.numel() for p in model.parameters()) == parameters
    save_tiny(config, tokenizer, 0, tmp_path / "again")
    for name, value in load_model(tmp_path / "again").named_parameters():
        assert torch.equal(value, model.get_parameter(name))
