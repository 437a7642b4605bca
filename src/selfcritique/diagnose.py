"""Failure signatures: what a run's metrics say is wrong, with the setting to change. Pure.

`diagnose` reads these entries of `summary.json`; a check whose entries are absent finds nothing:

    comparisons[]                     rows of `evaluate.comparison_table`: a, b, metric, delta, low, high, mde
    models.NAME.by_register.R         {value, low, high, n} accuracy; by_source.S likewise
    models.NAME.critic_score          {value, low, high} of `evaluate.critic_score_summary`
    data.registers                    registers trained on
    selection                         accept_rate = accepted share of scored responses; coverage = share of
                                      questions with an accepted response; diversity = distinct equation
                                      lists per response at or above the threshold, before de-duplication
    critic                            balanced_accuracy; gate = {min}
    dpo.start, pairs.policy           the model that DPO starts from, and whose answers its pairs are
    training.dpo                      means over the last steps: chosen_logps_drift in nats per response,
                                      log π(y_w) − log π_ref(y_w); chosen_length in tokens; rewards_margin

NAME is `base`, `rft` or `dpo`, with the round's number after the first (`rft_2`); other models are arms of
an ablation and only looked at for reward hacking. The final model is the last DPO model, or the last RFT
model where there is none.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]

GATE = 0.7  # balanced accuracy, where the summary does not name its gate
MIN_YIELD = 0.05  # share of responses accepted
MIN_COVERAGE = 0.10  # share of questions with an accepted response
MIN_DIVERSITY = 0.10  # eight samples that all agree have 0.125
COLLAPSE = -0.1  # nats per token: a response of 30 tokens became 20 times less likely
NO_MARGIN = -0.05  # reward margin: nearer to 0 a policy has hardly moved
DIVERGENCE = -1.0  # nats per token: what was fluent is now improbable
REGISTER_GAP = 0.10  # accuracy
SCORE_RISE = 0.5  # of ten: a smaller rise of the critic score may be real but too little to see in accuracy
REAL_WORLD = ("mathusereval",)  # sources of users' own questions; the others are academic


@dataclass(frozen=True)
class Finding:
    """One recognised failure: what was seen, which setting to change, and how."""

    signature: str
    evidence: str
    setting: str
    advice: str


def _get(summary: Summary, path: str) -> Any:
    """The entry at a dotted path, or None."""
    entry: Any = summary
    for name in path.split("."):
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry


def _is(name: str, stage: str) -> bool:
    """Whether a model is that of a stage, in any round."""
    return re.fullmatch(rf"{stage}(_\d+)?", name) is not None


def _comparisons(summary: Summary, a: str, b: str, metric: str = "accuracy") -> Iterator[Summary]:
    """Comparisons of a model of stage `a` with one of stage `b` whose metric begins with `metric`."""
    for row in summary.get("comparisons") or []:
        if _is(row["a"], a) and _is(row["b"], b) and row["metric"].startswith(metric):
            yield row


def _final(summary: Summary) -> str | None:
    names = list(summary.get("models") or {})
    trained = [n for n in names if _is(n, "dpo")] or [n for n in names if _is(n, "rft")]
    return trained[-1] if trained else None


def _points(row: Summary) -> str:
    return (
        f"{row['a']} − {row['b']}, {row['metric']}: {100 * row['delta']:+.1f} points "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    )


def rft_gain_undetectable(summary: Summary) -> Finding | None:
    for row in _comparisons(summary, "rft", "base"):
        if row.get("mde") is not None and row["delta"] < row["mde"]:
            return Finding(
                "rft_gain_undetectable",
                f"{_points(row)}, below the minimum detectable effect of {100 * row['mde']:.1f}",
                "rft.select.threshold",
                "See the precision of what was selected: where it is low, raise the threshold or train a "
                "better critic; where it is high, lower it, enlarge the pool or test on more problems.",
            )
    return None


def yield_collapse(summary: Summary) -> Finding | None:
    share, coverage = _get(summary, "selection.accept_rate"), _get(summary, "selection.coverage")
    if (share is None or share >= MIN_YIELD) and (coverage is None or coverage >= MIN_COVERAGE):
        return None
    seen = {"responses accepted": share, "questions with an accepted response": coverage}
    return Finding(
        "yield_collapse",
        ", ".join(f"{name}: {100 * x:.1f} %" for name, x in seen.items() if x is not None),
        "rft.select.threshold",
        "Lower the threshold (see the threshold curve of the critic card), or sample more responses.",
    )


def diversity_collapse(summary: Summary) -> Finding | None:
    diversity = _get(summary, "selection.diversity")
    lost = [row for row in _comparisons(summary, "(rft|dpo)", "base", "pass@") if row["high"] < 0]
    if not lost and (diversity is None or diversity >= MIN_DIVERSITY):
        return None
    evidence = _points(lost[-1]) if lost else f"{diversity:.3f} distinct equation lists per accepted response"
    return Finding(
        "diversity_collapse",
        evidence,
        "rft.sampling.temperature",
        "Sample hotter, cap accepted responses per question lower, and keep more of the original data in "
        "the RFT mix.",
    )


def critic_below_gate(summary: Summary) -> Finding | None:
    value, gate = _get(summary, "critic.balanced_accuracy"), _get(summary, "critic.gate.min") or GATE
    if value is None or value >= gate:
        return None
    return Finding(
        "critic_below_gate",
        f"balanced accuracy {value:.3f} on unseen responses, gate {gate:.2f}",
        "critic.train.epochs",
        "Selection by this critic is close to chance. Train it on more, better balanced responses, or show "
        "it more of the reference; lower the gate only to study what a weak critic does.",
    )


def _drift_per_token(summary: Summary) -> float | None:
    """Mean change of a chosen response's log-probability since the reference, in nats per token."""
    drift = _get(summary, "training.dpo.chosen_logps_drift")
    length = _get(summary, "training.dpo.chosen_length")
    return float(drift / length) if drift is not None and length else None


def dpo_diverged(summary: Summary) -> Finding | None:
    drift, margin = _drift_per_token(summary), _get(summary, "training.dpo.rewards_margin")
    if margin is None or drift is None:
        return None
    if math.isfinite(margin) and drift > (DIVERGENCE if margin > NO_MARGIN else COLLAPSE):
        return None
    return Finding(
        "dpo_diverged",
        f"reward margin {margin:.3g}, chosen log-probabilities {drift:+.2f} nats per token from their start",
        "dpo.train.lr",
        "Lower the learning rate by a factor of three to ten, or raise β.",
    )


def preference_not_learned(summary: Summary) -> Finding | None:
    """The rejected are preferred to the chosen by a policy that is still near its start."""
    drift, margin = _drift_per_token(summary), _get(summary, "training.dpo.rewards_margin")
    if drift is None or margin is None or not (-math.inf < margin <= NO_MARGIN and drift > COLLAPSE):
        return None
    return Finding(
        "preference_not_learned",
        f"reward margin {margin:.3g}, chosen log-probabilities {drift:+.2f} nats per token from their start",
        "pairs.build.margin",
        "What tells chosen from rejected is not in the pairs, or was not learned: see that the critic can be "
        "trusted and that the answers are those of the model that DPO starts from (pairs.policy, dpo.start); "
        "then raise the margin, sample more answers or train for longer.",
    )


def chosen_collapse(summary: Summary) -> Finding | None:
    drift, margin = _drift_per_token(summary), _get(summary, "training.dpo.rewards_margin")
    if drift is None or margin is None or margin <= NO_MARGIN or not DIVERGENCE < drift < COLLAPSE:
        return None
    return Finding(
        "chosen_collapse",
        f"chosen log-probabilities {drift:+.2f} nats per token from their start while the reward margin "
        f"grew to {margin:.3g}",
        "dpo.loss.lam",
        "Give the SFT term more weight (smaller λ with lam_on=dpo, larger with lam_on=sft), raise β or lower "
        "the learning rate.",
    )


def dpo_below_rft(summary: Summary) -> Finding | None:
    lower = "Lower the learning rate by a factor of three to ten and choose it on the dev split."
    of_rft = "Let DPO start from the RFT model, on pairs of its own answers."
    others = [name for name in ("dpo.start", "pairs.policy") if _get(summary, name) not in (None, "rft")]
    setting, advice = (others[0], of_rft) if others else ("dpo.train.lr", lower)
    for row in _comparisons(summary, "dpo", "rft"):
        if row["high"] < 0:
            return Finding("dpo_below_rft", _points(row), setting, advice)
    return None


def real_world_flat(summary: Summary) -> Finding | None:
    """Intervals of the base and the final model that do not overlap are a change; others are none."""
    name = _final(summary)
    before = _get(summary, "models.base.by_source") or {}
    after = _get(summary, f"models.{name}.by_source") or {}
    shared = [source for source in before if source in after]
    risen = [s for s in shared if after[s]["low"] > before[s]["high"]]
    academic = [s for s in risen if s not in REAL_WORLD]
    flat = [s for s in shared if s in REAL_WORLD and s not in risen]
    if not academic or not flat:
        return None
    moves = [f"{s} {before[s]['value']:.3f} to {after[s]['value']:.3f}" for s in academic + flat]
    return Finding(
        "real_world_flat",
        f"base to {name}: {', '.join(moves)}",
        "data.mix",
        "Add users' own questions to the pools: the training questions are all of the academic kind.",
    )


def reward_hacking(summary: Summary) -> Finding | None:
    models = summary.get("models") or {}
    for row in _comparisons(summary, ".*", ".*"):
        after, before = (_get(models, f"{row[side]}.critic_score") for side in ("a", "b"))
        if not after or not before or after["low"] is None or before["high"] is None:
            continue
        risen = after["low"] > before["high"] and after["value"] - before["value"] >= SCORE_RISE
        if risen and row["low"] <= 0:
            return Finding(
                "reward_hacking",
                f"critic score {before['value']:.2f} to {after['value']:.2f}, but {_points(row)}",
                "critic.gate.min",
                "The policy learned to please the critic. Raise the gate, which is measured again on the new "
                "policy's responses, train the critic on them too, or stop at fewer rounds.",
            )
    return None


def one_register(summary: Summary) -> Finding | None:
    """A register far behind the best, unless the summary says that it was trained on (then it is harder)."""
    name = _final(summary)
    registers = _get(summary, f"models.{name}.by_register") or {}
    if len(registers) < 2:
        return None
    best = max(registers, key=lambda r: registers[r]["value"])
    worst = min(registers, key=lambda r: registers[r]["value"])
    high, low = registers[best], registers[worst]
    trained = _get(summary, "data.registers")
    if high["low"] <= low["high"] or high["value"] - low["value"] < REGISTER_GAP or worst in (trained or ()):
        return None
    return Finding(
        "one_register",
        f"{name}: {best} {100 * high['value']:.1f} %, {worst} {100 * low['value']:.1f} %"
        + (f", trained on {', '.join(trained)}" if trained else ""),
        "data.mix",
        f"Train on problems worded in the register {worst} too.",
    )


CHECKS: tuple[Callable[[Summary], Finding | None], ...] = (
    critic_below_gate,
    yield_collapse,
    diversity_collapse,
    rft_gain_undetectable,
    dpo_diverged,
    preference_not_learned,
    chosen_collapse,
    dpo_below_rft,
    real_world_flat,
    reward_hacking,
    one_register,
)


def diagnose(summary: Summary) -> list[Finding]:
    """Every failure signature that the metrics show, in the order of the pipeline."""
    return [finding for check in CHECKS if (finding := check(summary)) is not None]
