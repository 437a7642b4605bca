"""Log-probabilities against a plain float64 loop, and what the head is given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfcritique.errors import UserError
from selfcritique.train import model as model_module
from selfcritique.train.batch import collate
from selfcritique.train.model import load_model, save_model, token_logps

SEQUENCES = [([1, 7, 8, 30], [5, 9, 9, 41, 2]), ([1, 3], [2]), ([1, 11, 12, 13, 14, 15, 16], [49, 2])]


def one_by_one(path: Path) -> list[float]:
    """log softmax of the whole model's logits, one unpadded sequence at a time, in float64."""
    model = load_model(path, torch.float64).eval()
    values = []
    for prompt, response in SEQUENCES:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        for i, token in enumerate(response, len(prompt)):
            values.append(torch.log_softmax(logits[i - 1], -1)[token].item())
    return values


@pytest.mark.parametrize("family", ["llama_dir", "gpt2_dir"])
def test_token_logps_equal_a_float64_loop(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    expected = one_by_one(path)
    assert max(expected) - min(expected) > 2  # far from uniform
    logps = token_logps(load_model(path).eval(), collate(SEQUENCES, 0))
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(expected, abs=1e-5)
    exact = token_logps(load_model(path, torch.float64).eval(), collate(SEQUENCES, 0))
    assert exact.tolist() == pytest.approx(expected, abs=1e-6 if family == "llama_dir" else 1e-12)


def values_and_gradients(path: Path) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """In float64; also the number of positions of each call of the head."""
    model = load_model(path, torch.float64).eval()
    calls: list[int] = []

    def note(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(inputs[0].numel() // inputs[0].shape[-1])

    model.get_output_embeddings().register_forward_hook(note)
    logps = token_logps(model, collate(SEQUENCES, 0))
    (logps * torch.linspace(1, 2, len(logps))).sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters()}, calls


def test_chunked_head_equals_the_whole(gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 response tokens of 21: the head sees those 8 only, in chunks of 3 (again in the backward pass)."""
    logps, gradients, calls = values_and_gradients(gpt2_dir)
    assert calls == [8]
    monkeypatch.setattr(model_module, "CHUNK_LOGITS", 3 * 50 + 49)
    chunked, chunked_gradients, calls = values_and_gradients(gpt2_dir)
    assert calls[:3] == [3, 3, 2] and sorted(calls[3:]) == [2, 3, 3]
    torch.testing.assert_close(chunked, logps, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_label_logps_equal_those_of_log_softmax() -> None:
    """Values and gradients in float64, of more rows than are taken at once, in each of two passes."""
    generator = torch.Generator().manual_seed(0)
    rows = model_module._ROWS + 3
    hidden = torch.randn(rows, 5, generator=generator).double().requires_grad_()
    head = torch.nn.Linear(5, 11, dtype=torch.float64)
    labels = torch.arange(rows) % 11
    weights = torch.linspace(-1, 2, rows)
    expected = torch.log_softmax(head(hidden), -1)[torch.arange(rows), labels]
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, *head.parameters()])
    logps = model_module._head_logps(head, hidden, labels)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-14)
    total = (logps * weights).sum()
    for last in (False, True):
        found = torch.autograd.grad(total, [hidden, *head.parameters()], retain_graph=not last)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_no_response_token_gives_zero_gradients(llama_dir: Path) -> None:
    model = load_model(llama_dir)
    logps = token_logps(model, collate([([1, 7], []), ([1], [])], 0))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_model_that_changes_its_logits_is_refused(make_llama: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="logit_scale"):
        load_model(make_llama(logit_scale=0.5))


def test_save_model_takes_the_tokenizer_along(llama_dir: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = load_model(llama_dir)
    model.save_pretrained(source)
    for name in ("tokenizer.json", "chat_template.jinja", "manifest.json"):
        (source / name).write_text("{}")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    save_model(model, source, out)
    assert {f.name for f in out.iterdir()} == {f.name for f in source.iterdir()} - {"manifest.json"}
    for name, parameter in load_model(out).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
