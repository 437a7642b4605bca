"""Critic cards: labelled sets, both modes from one critic, floors, probes, and the command as a whole."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from math import log
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

from runs import Finished, completed, read_json, run
from scripted import ScriptedEngine
from selfcritique import stages
from selfcritique.annotate import annotate, corrupt, guess, judge
from selfcritique.artifacts import Artifact
from selfcritique.config import AskConfig, CriticMode, EngineConfig, PromptStyle, Reference
from selfcritique.critic_sets import Labelled, read
from selfcritique.critique import step_of
from selfcritique.data.word_problems import generate
from selfcritique.errors import UserError
from selfcritique.probes import BOUND, build_probes, success_rates
from selfcritique.progress import Progress
from selfcritique.prompts import PromptEncoder, critique_prompt
from selfcritique.records import Problem, Prompt
from test_prompts import CHAT, bpe_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PROBLEM = Problem("Tom has 3 pens and buys 4 packs of 2.", "4 * 2 = 8\n3 + 8 = 11\n#### 11", "11", "test")
RIGHT, WRONG = PROBLEM.reference, "4 * 2 = 8\n3 + 8 = 12\n#### 12"


# ---- sets ----------------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "gsm8k_model_solutions": {
        "question": "Q", "ground_truth": "1 + 1 = 2\nA: 2",
        "6b_finetuning": {"is_correct": False, "solution": "1 + 1 = 3\nA: 3"},
        "175b_verification": {"is_correct": True, "solution": "A: 2"},
    },
    "realcritic": {
        "idx": 7, "question": "Q", "gt": "2", "answer": "2", "solution": "So \\boxed{2}.", "level": "Level 4",
        "pred": "2", "reasoning": "It is two.", "previous_score": [False],
    },
    "mr_gsm8k": {
        "question": "Q", "ground_truth_solution": "#### 2", "ground_truth_answer": 2, "question_type": "POT",
        "model_output_steps": ["Step 1: 1 + 1 = 3", "Step 2: #### 3"],
        "model_output_answer_correctness": "wrong", "model_output_solution_first_error_step": 1,
    },
    "bigbench": {"input": "Q", "steps": ["a", "b"], "target": "(A)", "answer": " (A)", "mistake_index": 1},
    "own": {"question": "Q", "answer": "2", "response": "#### 2", "score": 8},
}  # fmt: skip


@pytest.fixture
def read_row(tmp_path: Path) -> Any:
    def one(name: str, **changed: Any) -> list[Labelled]:
        (tmp_path / "set_test.jsonl").write_text(json.dumps(ROWS[name] | changed) + "\n")
        return read(tmp_path)

    return one


def test_each_set_is_known_by_its_fields(read_row: Any, tmp_path: Path) -> None:
    wrong, right = read_row("gsm8k_model_solutions")
    assert wrong.problem == right.problem and wrong.problem.reference.endswith("\n#### 2")
    assert (wrong.problem.answer, wrong.text, wrong.correct, right.correct) == (
        "2",
        "1 + 1 = 3\n#### 3",
        False,
        True,
    )
    (real,) = read_row("realcritic")
    assert (
        real.text == "It is two.\n#### 2" and not real.correct
    )  # the label is of an answer it does not mark
    assert (real.problem.subject, real.problem.difficulty) == ("set", 4)
    (tmp_path / "label_fixes.json").write_text('[{"file": "set_test.jsonl", "idx": 7, "should_be": true}]')
    assert read_row("realcritic")[0].correct
    (mr,) = read_row("mr_gsm8k")
    assert (mr.correct, mr.first_error, mr.steps) == (False, 1, tuple(ROWS["mr_gsm8k"]["model_output_steps"]))
    (big,) = read_row("bigbench")
    assert (big.correct, big.first_error, big.text) == (True, 2, "a\nb")
    assert read_row("bigbench", mistake_index=None)[0].first_error == 0
    (own,) = read_row("own")
    assert (own.correct, own.score, own.first_error) == (None, 8, None)


def test_marked_steps_imply_a_band() -> None:
    """Right: clean 9-10, flawed 6-8. Wrong: from the first step on 1-2, else 3-5. A human's score stands."""
    made = [Labelled(PROBLEM, "", ok, first) for ok in (True, False) for first in (0, 1, 2)]
    assert [row.band_score for row in made] == [10.0, 7.0, 7.0, 5.0, 2.0, 4.0]
    assert Labelled(PROBLEM, "", True, 1, score=3).band_score == 3
    assert Labelled(PROBLEM, "", True).band_score is None


def test_mistakes_in_a_set_name_file_and_line(read_row: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no labelled set at .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"set_test.jsonl:1: score 11 is not"):
        read_row("own", score=11)
    with pytest.raises(
        UserError, match=r"set_test.jsonl:1: not the form of this set \(KeyError 'solution'\)"
    ):
        read_row("gsm8k_model_solutions", **{"6b_finetuning": {"is_correct": True}})
    (tmp_path / "set_test.jsonl").write_text('{"question": "Q"}\n')
    with pytest.raises(UserError, match="no labelled responses"):
        read(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published sets are not here")
@pytest.mark.parametrize(
    ("name", "responses", "right", "right_but_flawed", "wrong_but_clean"),
    [
        ("gsm8k_model_solutions", 5276, 2001, None, None),
        ("realcritic", 541, 271, None, None),  # 270 and one mended label
        ("mr_gsm8k_partial", 590, 19, 19, 0),
        ("bigbench_mistake", 900, 135, 52, 25),
    ],
)
def test_published_sets_have_their_published_counts(
    name: str, responses: int, right: int, right_but_flawed: int | None, wrong_but_clean: int | None
) -> None:
    rows = read(SHARED / name)
    assert (len(rows), sum(bool(r.correct) for r in rows)) == (responses, right)
    if right_but_flawed is not None:
        kinds = Counter((r.correct, bool(r.first_error)) for r in rows)
        assert (kinds[True, True], kinds[False, False]) == (right_but_flawed, wrong_but_clean)


def test_equations_are_counted_into_steps() -> None:
    """Steps with 0, 2 and 1 equations: the first two equations are of step 2, the third of step 3."""
    assert [step_of(k, [0, 2, 1]) for k in range(5)] == [0, 2, 2, 3, None]
    assert [step_of(k, [0, 0]) for k in range(4)] == [0, 1, 2, None]  # no equations: steps themselves


# ---- readings ------------------------------------------------------------------------------------------


def artifact(path: Path) -> Artifact:
    return Artifact("stage", path.name, path, "", {}, 0.0, False)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """A right and a wrong response to PROBLEM."""
    pl.DataFrame([vars(PROBLEM) | {"problem_id": PROBLEM.id}]).write_parquet(tmp_path / "problems.parquet")
    rows = [("a", RIGHT, "correct", "a"), ("b", WRONG, "incorrect", "b")]
    table = pl.DataFrame(rows, ["response_id", "text", "verdict", "equations_hash"], orient="row")
    table.with_columns(problem_id=pl.lit(PROBLEM.id), n_tokens=9).write_parquet(
        tmp_path / "responses.parquet"
    )
    return dict.fromkeys(("problems", "responses", "critic"), artifact(tmp_path))


def scored(mode: CriticMode, inputs: dict[str, Artifact], out: Path, samples: int = 1) -> dict[str, Any]:
    (out / "scratch").mkdir(parents=True)
    ask = AskConfig(mode=mode, reference=Reference.answer, samples=samples, temperature=float(samples > 1))
    config = stages.Score(ask, EngineConfig(), PromptStyle.terse, 0)
    return stages.score(config, inputs, out, Progress("test"))


def test_both_modes_of_one_critic(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logit: the right response has 10 with 0.3 and 8 with 0.1, so (3 + 0.8) / 0.4 = 9.5 and 0.6 missing; the
    wrong one 4 with 0.5 and 2 with 0.5: 3, nothing missing. Generate reads 10, 8 and 4; a word is none."""
    probabilities = {RIGHT: {"10": 0.3, "8": 0.1}, WRONG: {"4": 0.5, "2": 0.5}}
    texts = {RIGHT: ["1 ok\nScore: 10", "Score: 8"], WRONG: ["2 wrong: no\nScore: 4", "good"]}

    def response(prompt: Prompt) -> str:
        return next(text for text in texts if text in prompt.messages[-1].content)

    engine = ScriptedEngine(
        lambda prompt, sample: texts[response(prompt)][sample],
        lambda prompt, score: log(probabilities[response(prompt)].get(score, 1e-30)),
    )

    @contextmanager
    def scripted(*_: object) -> Iterator[ScriptedEngine]:
        yield engine

    monkeypatch.setattr(stages, "open_engine", scripted)
    by_logits = scored(CriticMode.logit, inputs, tmp_path / "logit")
    assert by_logits["missing_mass"] == pytest.approx(0.3) and by_logits["parse_failure_rate"] == 0
    assert by_logits["seconds_per_response"] > 0
    table = pl.read_parquet(tmp_path / "logit" / "scored.parquet")
    assert table["score"].to_list() == pytest.approx([9.5, 3.0])
    assert table["missing_mass"].to_list() == pytest.approx([0.6, 0.0], abs=1e-9)
    by_text = scored(CriticMode.generate, inputs, tmp_path / "generate", samples=2)
    assert by_text["missing_mass"] is None and by_text["parse_failure_rate"] == 0.25
    table = pl.read_parquet(tmp_path / "generate" / "scored.parquet")
    assert table.select("score", "first_score", "second_score").rows() == [(9.0, 10.0, 8.0), (4.0, 4.0, None)]

    inputs["scored"] = artifact(tmp_path / "generate")
    card = stages.card(stages.Card(), inputs, tmp_path, Progress("test"))
    # the marks are the rules' own: 10 and 4 with the second step wrong, which the critic names
    assert (card["balanced_accuracy"], card["first_error_accuracy"]) == (1.0, 1.0)
    assert (card["retest"]["n"], card["retest"]["mean_absolute_difference"]) == (1, 2.0)
    assert [(row["yield"], row["coverage"]) for row in card["thresholds"][:4]] == [(1.0, 1.0)] * 3 + [
        (0.5, 1.0)
    ]
    inputs["scored"] = artifact(tmp_path / "logit")
    card = stages.card(stages.Card(), inputs, tmp_path, Progress("test"))
    assert card["missing_mass"] == pytest.approx(0.3) and "retest" not in card
    assert card["first_error_accuracy"] is None  # it writes no analysis


def test_rules_read_as_much_as_they_are_shown() -> None:
    """A right-looking detour: 8 - 3 is sound, so without a reference it is right; only the solution knows
    that its second step is not taken. With the answer alone no step is to blame: 5."""
    detour = "4 * 2 = 8\n8 - 3 = 5\n#### 5"
    found = {reference: judge(PROBLEM, detour, reference) for reference in Reference}
    assert {reference: score for reference, (score, _) in found.items()} == {
        Reference.solution: 4, Reference.answer: 5, Reference.none: 10
    }  # fmt: skip
    assert found[Reference.solution] == (4, annotate(PROBLEM, detour).analysis)
    assert judge(PROBLEM, WRONG, Reference.none) == (4, "1 ok\n2 wrong: 3 + 8 = 11")
    assert judge(PROBLEM, "#### 11", Reference.none)[0] == 1  # nothing to check


def test_chance_takes_every_score_and_step_alike() -> None:
    """3,000 guesses: each score 300 ± 6 standard deviations (16.4), each of three verdicts 1,000 ± 155."""
    found = [guess(RIGHT, Random(i)) for i in range(3000)]
    scores, named = Counter(s for s, _ in found), Counter(text for _, text in found)
    assert scores.keys() == set(range(1, 11)) and all(abs(n - 300) < 99 for n in scores.values())
    assert named.keys() == {"1 ok", "1 wrong", "2 wrong"} and all(abs(n - 1000) < 155 for n in named.values())


# ---- probes --------------------------------------------------------------------------------------------


def known() -> list[tuple[Problem, str, str]]:
    rng, rows = Random(0), []
    for problem in islice(generate(5, limit=20), 60):
        broken = corrupt(problem, "value", rng)
        rows += [(problem, problem.reference, "correct")]
        rows += [(problem, broken.text, "incorrect")] if broken else []
    return rows


def test_no_probe_fools_who_checks() -> None:
    """The rules, which see the solution, stay below every probe's bound: no probe has earned it."""
    made = build_probes(known(), 40, Random(1))
    counts = Counter(name for name, _, _ in made)
    assert counts.keys() == BOUND.keys()
    assert {counts[name] for name in BOUND if name not in ("broken_steps", "right_looking_steps")} == {40}
    assert min(counts.values()) >= 20  # some solutions cannot be broken
    fooled = [(name, text) for name, p, text in made if judge(p, text, Reference.solution)[0] >= BOUND[name]]
    assert fooled == []


def test_success_is_counted_per_probe() -> None:
    """Of answer_only 9 and 10 reach 9, 8 and an unread critique do not: 2 of 4."""
    rows = [("answer_only", s) for s in (8.0, 9.0, 10.0, None)] + [("colon", s) for s in (5.9, 6.0)]
    rates = success_rates(pl.DataFrame(rows, schema=["probe", "score"], orient="row"))
    assert {name: (r["value"], r["n"], r["bound"]) for name, r in rates.items()} == {
        "answer_only": (0.5, 4, 9.0), "colon": (0.5, 2, 6.0)
    }  # fmt: skip
    assert rates["colon"]["low"] < 0.5 < rates["colon"]["high"]


@pytest.mark.parametrize("style", PromptStyle)
def test_no_probe_closes_its_turn(style: PromptStyle) -> None:
    """Control tokens stand where the chat template puts them (start, end, start) and nowhere else."""
    tokenizer = bpe_tokenizer(CHAT)
    encoder, control = PromptEncoder(tokenizer), set(tokenizer.all_special_ids)
    probes = build_probes([(PROBLEM, RIGHT, "correct"), (PROBLEM, WRONG, "incorrect")], 1, Random(0))
    assert any(control.intersection(tokenizer.encode(text)) for _, _, text in probes)  # the attack is real
    for _, problem, text in probes:
        ids = encoder.prompt_ids(critique_prompt(style, problem, text, Reference.answer))
        names = tokenizer.convert_ids_to_tokens([i for i in ids if i in control])
        assert names == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


# ---- the command ---------------------------------------------------------------------------------------


def test_card_of_a_run(smoke: Finished, tmp_path: Path) -> None:
    """The run's own reading is one of the card's: the same figures, and its critiques are not made again."""
    words = (
        "critic-card",
        f"critic={smoke.folder}/outputs/smoke/*",
        f"store={smoke.store}",
        "probes=4",
        "out=card",
    )
    finished = completed(tmp_path, *words)
    card = read_json(tmp_path / "card" / "card.json")
    asked = ["generate, answer", "logit, answer", "generate, none", "logit, none"]
    assert list(card["readings"]) == [*asked, "rules, answer", "rules, none", "random"]
    first = card["readings"]["generate, answer"]
    gate = smoke.summary["critic"]
    assert {name: first[name] for name in ("balanced_accuracy", "auroc", "n")} == {
        name: gate[name] for name in ("balanced_accuracy", "auroc", "n")
    }
    assert "generate, answer: reused" in finished.stderr and "logit, answer: done" in finished.stderr
    assert first["retest"]["n"] > 0  # the smoke run asks twice
    assert card["readings"]["rules, answer"]["balanced_accuracy"] == 1.0  # it marks by itself
    assert 0 < card["readings"]["logit, answer"]["missing_mass"] < 1
    assert all(card["readings"][n]["seconds_per_response"] > 0 for n in asked)
    assert [row["b"] for row in card["agreement"]] == asked[1:]
    assert set(card["probes"]["logit, answer"]) == set(BOUND)
    rows = pl.read_parquet(tmp_path / "card" / "scores.parquet")
    assert rows.height == 7 * 60
    for name, reading in card["readings"].items():
        part = rows.filter(reading=name, verdict="incorrect").drop_nulls("score")
        assert part.filter(pl.col("score") >= 6).height == reading["confusion"]["false_positive"]
    assert "calibration error" in finished.stdout and "untouched scores ≥ 6" in finished.stdout


def test_card_of_a_checkpoint_on_a_set(smoke: Finished, tmp_path: Path) -> None:
    """Two of three labels contradict the checker; the third response is too long for a context of 512.

    Of six responses every second is asked for: limit=3 is spread over the set.
    """
    rows = [
        {"question": PROBLEM.question, "answer": "11", "response": RIGHT, "correct": False, "first_error": 2,
         "steps": ["4 * 2 = 8", "3 + 8 = 11\n#### 11"]},
        {"question": PROBLEM.question, "answer": "11", "response": WRONG, "correct": True, "first_error": 0},
        {"question": PROBLEM.question, "answer": "11", "response": "1 + 1 = 2\n" * 200, "correct": True},
    ]  # fmt: skip
    both = [row for made in rows for row in (made, made | {"response": "not asked for"})]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    words = ("critic-card", f"critic={smoke.artifact('critic')}", "prompts=terse", "modes=[logit]")
    completed(tmp_path, *words, "set=own.jsonl", "limit=3", "references=[answer]", "probes=0", "out=card")
    card = read_json(tmp_path / "card" / "card.json")
    assert (card["too_long"], list(card["readings"])) == (1, ["logit, answer", "rules, answer", "random"])
    rules = card["readings"]["rules, answer"]
    assert rules["balanced_accuracy"] == 0.0 and rules["auroc"] == 0.0  # against these labels
    assert (rules["first_error_accuracy"], rules["first_error_n"]) == (0.0, 2)  # ok for 2, 2 for none
    assert rules["spearman_annotator"] == pytest.approx(-1)  # 10 and 4 against bands of 4 and 10


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("critic=FOLDER",)),
        (("critic=nowhere",), ("nowhere", "config.json")),
        (("critic=nowhere", "mode=logit"), ("mode", "Did you mean modes?")),
        (("critic=nowhere", "modes=[]"), ("modes", "logit")),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path) -> None:
    message = run(tmp_path, "critic-card", *words).message
    assert all(part in message for part in parts), message
