"""Every file under conf/ composes, and every value that does not do is named with where it stands."""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from selfcritique import config
from selfcritique.__main__ import CONF
from selfcritique.config import (
    AskConfig,
    CriticConfig,
    CriticDataConfig,
    DpoLossConfig,
    EngineConfig,
    EngineKind,
    EvalConfig,
    GateConfig,
    PairConfig,
    RftConfig,
    RoundsConfig,
    SamplingConfig,
    SelectConfig,
    ServerConfig,
    SourceConfig,
    SplitsConfig,
    TinyConfig,
    TrainConfig,
    TrainerConfig,
    key_part,
    register,
    to_run_config,
)
from selfcritique.errors import UserError

EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(p for p in CONF.glob("*/*.yaml") if p.parent.name not in ("experiment", "hydra"))
REQUIRED = {  # options that want a value from the user
    "annotator=file": "annotator.path",
    "annotator=openai": "annotator.server.model",
    "data=jsonl": "data.mix.0.path",
    "model=local": "model.path",
}

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def composed() -> Iterator[Compose]:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_composes_and_says_its_command(path: Path, composed: Compose) -> None:
    run = to_run_config(composed(f"experiment={path.stem}"))
    assert run.name == path.stem  # outputs/<name>/ is where its results are looked for
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.search(rf"selfcritique .*experiment={path.stem}\b", line) for line in comments)
    assert comments[0] == "# @package _global_"


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_group_option_composes(path: Path, composed: Compose) -> None:
    option = f"{path.parent.name}={path.stem}"
    if option in REQUIRED:
        setting = REQUIRED[option]
        with pytest.raises(UserError, match=re.escape(setting.split(".")[0])) as error:
            to_run_config(composed(option))
        assert setting.split(".")[-1] in str(error.value)
        to_run_config(composed(option, f"{setting}=somewhere"))
    else:
        to_run_config(composed(option))


@pytest.mark.parametrize("path", sorted((CONF / "hydra" / "launcher").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_launcher_preset_composes(path: Path, composed: Compose) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = compose("config", [f"hydra/launcher={path.stem}"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.gpus_per_node > 0


def test_an_experiment_wins_over_the_groups_and_the_command_line_over_it(composed: Compose) -> None:
    """pairs/default.yaml has threshold 7, the smoke experiment 4."""
    assert to_run_config(composed()).pairs.build.threshold == 7
    assert to_run_config(composed("experiment=smoke")).pairs.build.threshold == 4
    assert to_run_config(composed("experiment=smoke", "pairs.build.threshold=5")).pairs.build.threshold == 5


# ---- faults --------------------------------------------------------------------------------------------


def test_faults_are_all_named_with_their_places(composed: Compose) -> None:
    wrong = composed(
        "rft.select.threshold=77",
        "rft.select.cap_per_question=-1",
        "rft.train.lr=-1",
        "model.sft.epochs=0",
        "data.mix.0.limit=3",
    )
    with pytest.raises(UserError) as error:
        to_run_config(wrong)
    assert sorted(str(error.value).splitlines()) == [
        "data.mix.0: SourceConfig: limit=3 must be at least 8",
        "model.sft: TrainConfig: epochs=0.0 must be above 0",
        "rft.select: SelectConfig: threshold=77.0 must be from 1 to 10; "
        "cap_per_question=-1 must be at least 0 (0: no cap)",
        "rft.train: TrainConfig: lr=-1.0 must be above 0",
    ]


def test_settings_without_a_value_are_all_named(composed: Compose) -> None:
    with pytest.raises(UserError, match=r"no value: dpo\.loss\.beta, rft\.train\.lr; set them"):
        to_run_config(composed("rft.train.lr=???", "dpo.loss.beta=???"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.mix=[]", "data.mix names no source"),
        ("model.sft=null", "set model.path or model.sft"),
        ("experiment=critic_size model.path=m model.sft=null", "critic.tiny first learns"),
    ],
)
def test_settings_that_do_not_go_together(override: str, said: str, composed: Compose) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        to_run_config(composed(*override.split()))


SIZES = {f.name: 1 for f in fields(SplitsConfig)}
WRONG: list[tuple[type, dict[str, Any], dict[str, Any]]] = [  # class, what it needs, every fault it knows
    (SourceConfig, {}, {"weight": 0.0, "limit": 7}),
    (SplitsConfig, SIZES, {name: 0 for name in SIZES}),
    (
        TrainConfig,
        {"lr": 1.0, "epochs": 1.0},
        {"lr": 0.0, "epochs": 0.0, "batch_size": 0, "warmup_ratio": 1.0, "grad_clip": -1.0},
    ),
    (TrainerConfig, {}, {"micro_tokens": 0, "max_length": 1}),
    (TinyConfig, {}, {"hidden_size": 40, "layers": 0}),
    (EngineConfig, {}, {"max_batch_tokens": 0}),
    (
        ServerConfig,
        {},
        {
            "url": "localhost:8000",
            "concurrency": 0,
            "timeout_s": 0.0,
            "retries": -1,
            "requests_per_minute": -1,
            "tokens_per_minute": -1,
            "price_prompt": -1.0,
            "price_completion": -1.0,
        },
    ),
    (
        SamplingConfig,
        {"n": 1, "temperature": 0.0},
        {"n": 0, "temperature": -0.1, "max_tokens": 0, "top_p": 0.0, "top_k": -1},
    ),
    (GateConfig, {}, {"min": 1.1}),
    (CriticConfig, {"tiny": TinyConfig()}, {"model": "somewhere", "noise": 1.1}),
    (CriticDataConfig, {}, {"corruptions": -1.0, "score_only": 1.1, "max_examples": -1}),
    (AskConfig, {}, {"samples": 0, "temperature": -1.0, "max_tokens": 0, "max_parse_failures": 1.1}),
    (SelectConfig, {}, {"threshold": 0.5, "cap_per_question": -1, "accept_rate_max": 1.1, "fixed_yield": 0}),
    (SelectConfig, {}, {"accept_rate_min": -0.1}),
    (PairConfig, {}, {"threshold": 11.0, "margin": 0.0, "max_per_question": 0, "max_length_ratio": 0.9}),
    (DpoLossConfig, {"lam": 1.0, "beta": 1.0}, {"lam": -1.0, "beta": 0.0, "label_smoothing": 0.5}),
    (RftConfig, {}, {"mix": -1.0}),
    (EvalConfig, {}, {"sampled_questions": -1, "bootstrap": 0}),
    (RoundsConfig, {}, {"n": 0}),
]


@pytest.mark.parametrize(("owner", "needed", "wrong"), WRONG, ids=lambda v: getattr(v, "__name__", ""))
def test_a_class_names_all_its_faults_at_once(
    owner: type, needed: dict[str, Any], wrong: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as error:
        owner(**needed | wrong)
    named = re.findall(r"(\w+)=\S+ must be", str(error.value))
    assert sorted(named) == sorted(wrong) and str(error.value).startswith(f"{owner.__name__}: ")
    for name, value in wrong.items():  # and each alone
        with pytest.raises(UserError, match=rf"{name}={re.escape(repr(value))} must be"):
            owner(**needed | {name: value})
    owner(**needed)


# ---- keys ----------------------------------------------------------------------------------------------


def test_key_part_is_plain_data_without_what_only_changes_speed() -> None:
    sampling = SamplingConfig(n=2, temperature=0.5)
    assert key_part({"s": sampling, "e": EngineConfig(device="cuda")}) == {
        "s": {"n": 2, "temperature": 0.5, "max_tokens": 64, "top_p": 1.0, "top_k": 0},
        "e": {"kind": "hf", "max_batch_tokens": 65536, "dtype": "float32"},
    }
    served = EngineConfig(EngineKind.openai, server=ServerConfig("http://a", "m", key_env="OTHER"))
    assert key_part(served)["server"] == {"model": "m", "body": {}}
    assert key_part([config.Split.dev, None, (1, "x")]) == ["dev", None, [1, "x"]]
    with pytest.raises(TypeError, match="digest"):
        key_part({"file": Path("somewhere")})


def test_what_most_runs_do_not_have_is_no_part_of_their_keys() -> None:
    assert "test_registers" not in key_part(SourceConfig()) and "server" not in key_part(EngineConfig())
    assert key_part(SourceConfig(test_registers=["plain"]))["test_registers"] == ["plain"]


def test_a_key_in_place_of_its_variables_name_is_not_repeated() -> None:
    with pytest.raises(UserError, match="name of an environment variable") as error:
        ServerConfig(key_env="sk-abc123")
    assert "abc123" not in str(error.value)


def test_no_path_or_machine_setting_is_part_of_a_key(composed: Compose) -> None:
    """The same settings elsewhere and on another machine have the same key part in every section."""
    paths = ["data.mix.0.path={}", "annotator.path={}", "store={}"]
    machine = [
        "threads={}", "trainer.micro_tokens={}1", "trainer.checkpoint_every_s={}1", "logger=none",
        "engine.device={}", "trainer.loader_workers={}",
    ]  # fmt: skip
    one, two = (
        to_run_config(composed("data=gsm8k", *(o.format(value) for o in paths + machine)))
        for value in ("1", "2")
    )
    assert one != two
    assert key_part(one) == key_part(two)
