"""Each signature on a summary that shows it and on one just short of it; a healthy run shows none."""

from typing import Any

import pytest

from selfcritique.diagnose import diagnose


def _band(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 2000}


def _row(a: str, b: str, metric: str, delta: float) -> dict[str, Any]:
    return {
        "a": a, "b": b, "metric": metric, "delta": delta, "low": delta - 0.02, "high": delta + 0.02,
        "mde": 0.03,
    }  # fmt: skip


def _healthy() -> dict[str, Any]:
    def model(accuracy: float, score: float) -> dict[str, Any]:
        return {
            "accuracy": _band(accuracy),
            "by_register": {"plain": _band(accuracy + 0.02), "chatty": _band(accuracy - 0.02)},
            "by_source": {"gsm8k": _band(accuracy), "mathusereval": _band(accuracy - 0.1)},
            "critic_score": _band(score),
        }

    return {
        "models": {"base": model(0.42, 5.0), "rft": model(0.52, 6.0), "dpo": model(0.54, 6.2)},
        "comparisons": [
            _row("rft", "base", "accuracy", 0.10),
            _row("dpo", "base", "accuracy", 0.12),
            _row("dpo", "rft", "accuracy", 0.02),
            _row("dpo", "base", "pass@8", 0.01),
        ],
        "critic": {"balanced_accuracy": 0.85},
        "selection": {"accept_rate": 0.4, "coverage": 0.6, "diversity": 0.3},
        "training": {"dpo": {"chosen_logps_drift": 0.5, "chosen_length": 20.0, "rewards_margin": 0.8}},
    }


def _changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The healthy summary with entries at dotted paths replaced; a number on the path is a list index."""
    summary = _healthy()
    for path, value in changes.items():
        *parents, last = path.split(".")
        entry: Any = summary
        for name in parents:
            entry = entry[int(name)] if isinstance(entry, list) else entry.setdefault(name, {})
        if isinstance(entry, list):
            entry[int(last)] = value
        else:
            entry[last] = value
    return summary


CASES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    # signature: (setting, what shows it, what is just short of it)
    "critic_below_gate": (
        "critic.train.epochs",
        [{"critic.balanced_accuracy": 0.69}, {"critic.gate": {"min": 0.9}}],
        [{"critic.balanced_accuracy": 0.70}, {"critic.gate": {"min": 0.8}}],
    ),
    "yield_collapse": (
        "rft.select.threshold",
        [{"selection.accept_rate": 0.01}, {"selection.coverage": 0.05}, {"selection": {"accept_rate": 0.0}}],
        [{"selection.accept_rate": 0.06, "selection.coverage": 0.11}],
    ),
    "diversity_collapse": (
        "rft.sampling.temperature",
        [{"selection.diversity": 0.02}, {"comparisons.3": _row("dpo", "base", "pass@8", -0.03)}],
        [{"selection.diversity": 0.12}, {"comparisons.3": _row("dpo", "base", "pass@8", -0.01)}],
    ),
    "rft_gain_undetectable": (
        "rft.select.threshold",
        [{"comparisons.0": _row("rft", "base", "accuracy", 0.025)}],
        [
            {"comparisons.0": _row("rft", "base", "accuracy", 0.04)},
            {"comparisons.3": _row("rft_random", "base", "accuracy", 0.0)},  # an arm that should not gain
        ],
    ),
    "dpo_diverged": (
        "dpo.train.lr",
        [
            {"training.dpo.rewards_margin": -0.1, "training.dpo.chosen_logps_drift": -4.0},
            {"training.dpo.rewards_margin": float("nan")},
            {"training.dpo.rewards_margin": float("-inf")},
            {"training.dpo.rewards_margin": -0.1, "training.dpo.chosen_logps_drift": float("nan")},
            {"training.dpo.chosen_logps_drift": -25.0},
        ],
        [{"training.dpo.rewards_margin": 0.01}, {"training.dpo.rewards_margin": -0.005}],
    ),
    "preference_not_learned": (
        "pairs.build.margin",
        [{"training.dpo.rewards_margin": -0.1}],
        [{"training.dpo.rewards_margin": -0.04}],
    ),
    "chosen_collapse": (
        "dpo.loss.lam",
        [{"training.dpo.chosen_logps_drift": -4.0}],
        [{"training.dpo.chosen_logps_drift": -1.5}],
    ),
    "dpo_below_rft": (
        "dpo.train.lr",
        [{"comparisons.2": _row("dpo", "rft", "accuracy", -0.03)}],
        [{"comparisons.2": _row("dpo", "rft", "accuracy", -0.01)}],
    ),
    "real_world_flat": (
        "data.mix",
        [{"models.dpo.by_source.mathusereval": _band(0.33)}],
        [
            {"models.dpo.by_source.mathusereval": _band(0.37)},
            {"models.dpo.by_source": {"gsm8k": _band(0.44), "mathusereval": _band(0.33)}},
        ],
    ),
    "reward_hacking": (
        "critic.gate.min",
        [
            {"comparisons.1": _row("dpo", "base", "accuracy", 0.01)},
            {
                "models.dpo_2": {"critic_score": _band(7.0)},
                "comparisons.3": _row("dpo_2", "dpo", "accuracy", 0.0),
            },
        ],
        [{"comparisons.1": _row("dpo", "base", "accuracy", 0.01), "models.dpo.critic_score": _band(5.4)}],
    ),
    "one_register": (
        "data.mix",
        [
            {
                "models.dpo.by_register": {"plain": _band(0.6), "chatty": _band(0.3)},
                "data.registers": ["plain"],
            }
        ],
        [
            {"models.dpo.by_register": {"plain": _band(0.6), "chatty": _band(0.52)}},
            {
                "models.dpo.by_register": {"plain": _band(0.6), "chatty": _band(0.3)},
                "data.registers": ["plain", "chatty"],
            },
        ],
    ),
}


def test_a_healthy_run_and_an_empty_one_show_nothing() -> None:
    assert diagnose(_healthy()) == []
    assert diagnose({}) == []
    assert diagnose({"models": {"base": {"accuracy": _band(0.4)}}, "comparisons": []}) == []


@pytest.mark.parametrize("signature", CASES)
def test_signature_and_its_negative(signature: str) -> None:
    setting, shown, short = CASES[signature]
    for changes in shown:
        (found,) = diagnose(_changed(changes))
        assert (found.signature, found.setting) == (signature, setting), changes
        assert found.evidence and found.advice
    for changes in short:
        assert diagnose(_changed(changes)) == [], changes


def test_evidence_carries_the_numbers() -> None:
    (found,) = diagnose(_changed({"comparisons.2": _row("dpo", "rft", "accuracy", -0.03)}))
    assert found.evidence == "dpo − rft, accuracy: -3.0 points [-5.0, -1.0]"
    (found,) = diagnose(_changed({"training.dpo.chosen_logps_drift": -4.0}))
    assert "-0.20 nats per token" in found.evidence


@pytest.mark.parametrize("setting", ["dpo.start", "pairs.policy"])
def test_dpo_below_rft_where_it_does_not_build_on_it(setting: str) -> None:
    changes = {"comparisons.2": _row("dpo", "rft", "accuracy", -0.1)}
    (found,) = diagnose(_changed({**changes, setting: "base"}))
    assert found.setting == setting
    (found,) = diagnose(_changed({**changes, setting: "rft"}))
    assert found.setting == "dpo.train.lr"


def test_findings_follow_the_pipeline() -> None:
    summary = _changed(
        {"critic.balanced_accuracy": 0.5, "comparisons.2": _row("dpo", "rft", "accuracy", -0.1)}
    )
    assert [f.signature for f in diagnose(summary)] == ["critic_below_gate", "dpo_below_rft"]
