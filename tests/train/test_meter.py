"""FLOPs against PyTorch's own counter, and the cost of steps."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfcritique.config import LoraConfig
from selfcritique.train import model as model_module
from selfcritique.train.batch import TokenBatch, collate
from selfcritique.train.meter import Meter, matmul_peak, step_flops
from selfcritique.train.model import add_adapter, checkpoint_layers, load_model, token_logps

BATCHES = {
    "padded": collate([([1, 7, 8, 30], [5, 9, 9, 41, 2]), ([1, 3], [2])], 0),
    "shared": collate([([1, 7, 8], [5, 9, 2], [9, 2]), ([1, 3], [2], [4, 2])], 0),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", ["llama_dir", "gpt2_dir"])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_flops_are_those_executed(
    name: str, family: str, recomputes: bool, chunked: bool, lora: LoraConfig | None,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """PyTorch counts the products of weights. It does not know the attention kernel, which is added by hand:
    4 * width * rows * length^2, half where causal, once or twice forward and 2.5 times backward."""
    if chunked:
        monkeypatch.setattr(model_module, "CHUNK_LOGITS", 3 * 50)
    batch, model = BATCHES[name], load_model(request.getfixturevalue(family))
    if lora:
        add_adapter(model, lora)
    if recomputes:
        checkpoint_layers(model)
    with FlopCounterMode(display=False) as counter:
        token_logps(model, batch).sum().backward()
    rows, length = batch.input_ids.shape
    pairs = rows * length**2 / (1 if name == "shared" else 2)
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs * (3.5 + recomputes)
    assert step_flops(model, batch, recomputes) == counter.get_total_flops() + attention


def test_steps_are_timed(llama_dir: Path) -> None:
    """Shares and rates from the seconds and FLOPs of the same step."""
    model = load_model(llama_dir)
    batch: TokenBatch = BATCHES["padded"]
    meter = Meter(model, torch.device("cpu"), torch.float32, recomputes=False)
    first, second = (meter.step([batch] * n, tokens=12, passes=n) for n in (1, 2))
    for passes, row in ((1, first), (4, second)):  # two batches, each twice
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(12)
        flops = row["matmul_fraction"] * row["seconds"] * matmul_peak(torch.device("cpu"), torch.float32)
        assert flops == pytest.approx(passes * step_flops(model, batch, False))
    assert second["peak_bytes"] >= first["peak_bytes"] > 50e6  # PyTorch alone is more


def test_peak_is_that_of_this_fit(llama_dir: Path) -> None:
    """300 MB held before it do not count; 300 MB held during it do."""
    torch.ones(75_000_000)
    model, cpu = load_model(llama_dir), torch.device("cpu")
    meter = Meter(model, cpu, torch.float32, recomputes=False)
    before = meter.step([], 1)["peak_bytes"]
    torch.ones(75_000_000)
    assert meter.step([], 1)["peak_bytes"] - before > 250e6
