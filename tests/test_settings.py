"""The table of docs/settings.md against our configuration and the installed TRL."""

import re
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from selfcritique.config import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
ROWS = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]


def ours() -> list[str]:
    return [name for row in ROWS for name in re.findall(r"`([^`]+)`", row[0])]


def peers(column: int) -> set[str]:
    quoted = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[column])}
    return {re.split(r"[= ]", name)[0] for name in quoted}


def test_the_table_is_read() -> None:
    assert len(ROWS) == 28 and {len(row) for row in ROWS} == {4}
    assert {"dpo.loss.beta", "dpo.loss.kind=ipo", "trainer.max_length"} <= set(ours())


@pytest.mark.parametrize("setting", ours())
def test_ours_exists(setting: str) -> None:
    path, _, value = setting.partition("=")
    kind: Any = RunConfig
    for part in path.split("."):
        assert is_dataclass(kind) and part in {f.name for f in fields(kind)}, setting
        kind = get_type_hints(kind)[part]
        kind = next((k for k in get_args(kind) if k is not type(None)), kind)
    if value:
        assert issubclass(kind, StrEnum) and value in list(kind), setting


def test_every_loss_setting_is_in_the_table() -> None:
    from selfcritique.config import DpoLossConfig

    named = {setting.partition("=")[0] for setting in ours()}
    wanted = {f"dpo.loss.{f.name}" for f in fields(DpoLossConfig)} - {"dpo.loss.gradients_every"}
    assert wanted <= named


def test_names_of_trl_exist() -> None:
    from trl import DPOConfig, SFTConfig

    known = {f.name for config in (DPOConfig, SFTConfig) for f in fields(config)}
    assert peers(1) - {"peft_config"} <= known  # an argument of the trainers themselves
    assert "loss_weights" in peers(1)


def test_losses_named_for_trl_are_known_to_it() -> None:
    """Its trainer would refuse others only when it computes a loss."""
    from trl import DPOConfig

    known = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {word for row in ROWS for part in re.findall(r"loss_type=(\[.*?\])", row[1])
             for word in re.findall(r'"(\w+)"', part)}  # fmt: skip
    assert named == {"sigmoid", "sft", "hinge", "ipo"}
    assert all(f"'{name}'" in known for name in named)
