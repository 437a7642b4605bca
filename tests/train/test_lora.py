"""LoRA: what is trained and kept, the reference, merging, and going on after a stop."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from selfcritique.artifacts import Artifact, Store
from selfcritique.checkpoints import plain_checkpoint
from selfcritique.config import DpoLossConfig, LoraConfig, Strategy, TrainConfig, TrainerConfig
from selfcritique.errors import UserError
from selfcritique.train import fit as fit_module
from selfcritique.train.batch import TokenExample, TokenPair, collate
from selfcritique.train.fit import fit_dpo, fit_sft, reference_logps
from selfcritique.train.model import add_adapter, load_model, token_logps

MakePairs = Callable[..., list[TokenPair]]

LORA = LoraConfig(rank=4, alpha=8)
TRAIN = TrainConfig(lr=2e-2, epochs=2, batch_size=8, lora=LORA)
LOSS = DpoLossConfig(lam=1.5, beta=0.5)
EACH_STEP = TrainerConfig(micro_tokens=60, checkpoint_every_s=0)
IDS = torch.tensor([[1, 7, 8, 30, 5, 9, 41]])


def made(store: Path, stage: str, inputs: dict[str, Artifact], work: Callable[[Path], Any]) -> Artifact:
    """An artifact as a run makes them, with a key of its own."""
    return Store(store).build(stage, 1, f"{len(stage):016x}", {}, inputs, work)


def logits(folder: Path) -> Tensor:
    """As any user of Transformers gets them."""
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(
    llama_dir: Path, make_pairs: MakePairs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """base, RFT adapter on it, DPO adapter on that, in one store."""
    store, pairs = tmp_path_factory.mktemp("lora"), make_pairs(40)

    def copy(out: Path) -> dict[str, Any]:
        for file in llama_dir.iterdir():
            (out / file.name).symlink_to(file)
        return {}

    base = made(store, "base", {}, copy)
    examples = [TokenExample(p.prompt_ids, p.chosen_ids) for p in pairs]
    rft = made(
        store, "rft", {"model": base},
        lambda out: fit_sft(TRAIN, TrainerConfig(), base.path, examples, out, 7),
    )  # fmt: skip
    reference = reference_logps(TrainerConfig(), rft.path, pairs)
    dpo = made(
        store, "dpo1", {"model": rft},
        lambda out: fit_dpo(TRAIN, LOSS, TrainerConfig(), rft.path, pairs, reference, out, 7),
    )  # fmt: skip
    return {"base": base, "rft": rft, "dpo": dpo}


def test_an_adapter_holds_what_was_trained_and_names_its_base(trained: dict[str, Artifact]) -> None:
    """2 layers, 7 linear ones each: rank times (inputs + outputs) numbers; width 32, keys 16, inner 48."""
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(4 * (inputs + outputs) for inputs, outputs in sizes)
    for name, base in (("rft", "base"), ("dpo", "rft")):
        artifact = trained[name]
        weights = load_file(artifact.path / "adapter_model.safetensors")
        assert sum(w.numel() for w in weights.values()) == expected
        assert not (artifact.path / "model.safetensors").exists()
        config = json.loads((artifact.path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == f"{trained[base].stage}/{trained[base].key}"
        assert config["target_modules"] == sorted(config["target_modules"])


def test_merged_logits_are_those_of_the_adapter(trained: dict[str, Artifact]) -> None:
    """Of RFT on the base, and of DPO on the merged RFT model: within 1e-5 of the largest logit."""
    before = trained["base"].path
    for name in ("rft", "dpo"):
        adapter = trained[name].path
        base = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
        with torch.inference_mode():
            beside = PeftModel.from_pretrained(base, str(adapter)).eval()(IDS).logits
        merged = logits(plain_checkpoint(adapter))
        assert (beside - logits(before)).abs().max() > 0.1  # it did train
        assert (merged - beside).abs().max() <= 1e-5 * beside.abs().max()
        before = plain_checkpoint(adapter)


def test_dpo_on_an_rft_adapter_starts_at_the_rft_policy(
    trained: dict[str, Artifact], make_pairs: MakePairs
) -> None:
    """With its adapter off, the DPO policy is the RFT model, not the base; its first loss is ln 2."""
    pairs = make_pairs(40)
    first = rows_of(trained["dpo"].path)[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    policy = fit_module._load(LORA, TrainerConfig(), trained["rft"].path).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    batch = collate([(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs], 0)
    with torch.no_grad():
        moved = token_logps(policy, batch)
        policy.disable_adapters()
        off = token_logps(policy, batch)
    of_rft, of_base = (
        reference_logps(TrainerConfig(), trained[name].path, pairs).tokens for name in ("rft", "base")
    )
    torch.testing.assert_close(off, of_rft, rtol=1e-5, atol=1e-5)
    assert (off - of_base).abs().max() > 0.1 and (off - moved).abs().max() > 0.1


def test_a_base_as_reference_of_an_rft_adapter_is_refused(
    trained: dict[str, Artifact], make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs(40)
    reference = reference_logps(TrainerConfig(), trained["base"].path, pairs)
    with pytest.raises(UserError, match="does not start as the reference"):
        fit_dpo(TRAIN, LOSS, TrainerConfig(), trained["rft"].path, pairs, reference, tmp_path, 7)


def test_merged_weights_are_made_once_and_may_go(trained: dict[str, Artifact]) -> None:
    """`store gc` deletes them with nothing else; the adapter's digest does not know them."""
    adapter, store = trained["dpo"], Store(trained["dpo"].path.parents[1])
    folder = plain_checkpoint(adapter.path)
    weights = folder / "model.safetensors"
    made_at = weights.stat().st_mtime_ns
    assert plain_checkpoint(adapter.path) == folder and weights.stat().st_mtime_ns == made_at
    expected = load_file(weights)
    keys = {a.key for a in trained.values()}
    assert store.gc(keep=keys) > 0 and not folder.exists()
    for artifact in trained.values():
        found = store.find(artifact.stage, artifact.key, None)
        assert found is not None and found.digest == artifact.digest
    again = load_file(plain_checkpoint(adapter.path) / "model.safetensors")
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_an_adapter_without_its_base_says_so(trained: dict[str, Artifact], tmp_path: Path) -> None:
    def copy(out: Path) -> dict[str, Any]:
        for file in trained["rft"].path.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return {}

    alone = made(tmp_path, "rft", {}, copy)
    with pytest.raises(UserError, match=r"trained on base/0+4, which is not at .*run its experiment again"):
        plain_checkpoint(alone.path)


# ---- fits ----------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(last: int, step: int, *_: Any) -> None:
    if step == last:
        raise Stopped


def test_stopped_fit_goes_on_where_it_was(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    """With dropout of the adapter, in the middle of the second epoch; the state has trained weights only."""
    examples = [TokenExample(p.prompt_ids, p.chosen_ids) for p in make_pairs(40)]
    train = TrainConfig(lr=1e-2, epochs=2, batch_size=8, lora=LoraConfig(rank=4, dropout=0.2))
    arguments = train, EACH_STEP, llama_dir, examples
    fit_sft(*arguments, tmp_path / "whole", 7)
    with pytest.raises(Stopped):
        fit_sft(*arguments, tmp_path / "cut", 7, progress=partial(stop_at, 7))
    state = load_file(tmp_path / "cut/scratch/state.safetensors")
    kept = [name for name in state if name.startswith("model.")]
    assert len(kept) == 2 * 2 * 7 and all("lora_" in name for name in kept)
    assert fit_sft(*arguments, tmp_path / "cut", 7)["steps"] == 10
    rows = [rows_of(tmp_path / name) for name in ("cut", "whole")]
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-6)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_equal_fits_leave_equal_bytes(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    examples = [TokenExample(p.prompt_ids, p.chosen_ids) for p in make_pairs(8)]
    for name in ("first", "second"):
        fit_sft(TRAIN, TrainerConfig(), llama_dir, examples, tmp_path / name, 7)
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.fsdp])
def test_two_processes_give_the_adapter_of_one(
    strategy: Strategy, trained: dict[str, Artifact], make_pairs: MakePairs, tmp_path: Path
) -> None:
    """DPO on an RFT adapter, which both processes find merged."""
    pairs, model = make_pairs(20), trained["rft"].path
    reference = reference_logps(TrainerConfig(), model, pairs)
    train = TrainConfig(lr=1e-3, epochs=2, batch_size=9, lora=LORA)
    one = fit_dpo(train, LOSS, TrainerConfig(), model, pairs, reference, tmp_path / "one", 7)
    shared = TrainerConfig(strategy=strategy, processes=2)
    two = fit_dpo(train, LOSS, shared, model, pairs, reference, tmp_path / "two", 7)
    assert one["steps"] == two["steps"] == 6
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_targets_are_the_named_layers(llama_dir: Path) -> None:
    model = load_model(llama_dir)
    add_adapter(model, LoraConfig(rank=2, targets=["q_proj", "v_proj"]))
    layers = {name.split(".")[4] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may work here")
def test_qlora_on_the_cpu_is_refused(llama_dir: Path, make_pairs: MakePairs, tmp_path: Path) -> None:
    train = TrainConfig(lr=1e-2, epochs=1, lora=LoraConfig(rank=4, quantize=True))
    with pytest.raises(UserError, match="quantize needs CUDA"):
        fit_sft(train, TrainerConfig(), llama_dir, [TokenExample([1], [2])], tmp_path, 7)
