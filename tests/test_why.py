"""`why`: a response's way through a real run, down to the steps that trained on it."""

from typing import Any

import polars as pl
import pytest

from runs import Finished, run
from selfcritique import stages
from selfcritique.config import PromptStyle
from selfcritique.errors import UserError
from selfcritique.results import Run, load_run
from selfcritique.train.batch import Schedule
from selfcritique.why import explain


@pytest.fixture(scope="module")
def finished(smoke: Finished) -> Run:
    return load_run(smoke.out, smoke.store)


def rows(smoke: Finished, stage: str, file: str) -> list[dict[str, Any]]:
    return pl.read_parquet(smoke.artifact(stage) / f"{file}.parquet").to_dicts()


def test_the_steps_are_those_that_trained_on_the_pair(smoke: Finished, finished: Run) -> None:
    """Which pairs a step takes is a function of the seed and the step: told apart from what was recorded."""
    inputs = {role: finished.artifacts[name] for role, name in finished.inputs("dpo").items()}
    lengths = [pair.length for pair in stages.token_pairs(PromptStyle.terse, inputs)]
    config = finished.artifacts["dpo"].manifest["config"]
    train = config["train"]
    schedule = Schedule(lengths, train["batch_size"], train["epochs"], config["seed"])
    assert len(schedule) == 2
    for row, pair in enumerate(rows(smoke, "pairs", "pairs")):
        (step,) = [n for n in (1, 2) if row in schedule[n - 1]]
        assert list(explain(finished, pair["rejected_id"]))[-1].endswith(f"dpo, steps {step} of 2")


def test_a_chosen_response(smoke: Finished, finished: Run) -> None:
    pair = rows(smoke, "pairs", "pairs")[0]
    text = "\n".join(explain(finished, pair["chosen_id"]))
    (problem,) = [r for r in rows(smoke, "problems", "problems") if r["problem_id"] == pair["problem_id"]]
    (response,) = [r for r in rows(smoke, "pool_dpo", "responses") if r["response_id"] == pair["chosen_id"]]
    critiques = [r for r in rows(smoke, "scores_dpo", "critiques") if r["response_id"] == pair["chosen_id"]]
    parts = [problem["question"], problem["reference"], response["text"], *(c["text"] for c in critiques)]
    parts += ["pairs: chosen (score ", f"paired with {pair['rejected_id']}", "Trained on: dpo, steps "]
    assert len(critiques) == 2 and not [part for part in parts if part not in text]
    assert [text.index(part) for part in parts[:3]] == sorted(text.index(part) for part in parts[:3])


def test_a_selected_and_a_rejected_response(smoke: Finished, finished: Run) -> None:
    selected = rows(smoke, "select", "selected")
    taken, left = (next(r for r in selected if r["selected"] is kept) for kept in (True, False))
    text = "\n".join(explain(finished, taken["response_id"]))
    assert f"select: selected (score {taken['score']:.3g}, threshold 4)" in text
    assert "Trained on: rft, steps " in text and text.endswith("of 8")
    text = "\n".join(explain(finished, left["response_id"]))
    assert f"select: {left['reason']} (" in text and text.endswith("Trained on: by no stage of this run")


def test_an_id_that_is_not_one(smoke: Finished, finished: Run) -> None:
    with pytest.raises(UserError, match=r"begins with 'xyz'.*report\.html.*responses\.parquet"):
        list(explain(finished, "xyz"))
    with pytest.raises(UserError, match=r"responses begin with '0'.*Give more digits"):
        list(explain(finished, "0"))


def test_the_commands(smoke: Finished) -> None:
    """From the folder where the run ran, the newest run needs no name; a beginning of the id is enough."""
    chosen = rows(smoke, "pairs", "pairs")[0]["chosen_id"]
    said = run(smoke.folder, "why", chosen[:12])
    assert said.code == 0 and f"Response {chosen} of outputs/smoke/" in said.stdout, said.stderr
    report = smoke.out / "report.html"
    before = report.read_bytes()
    report.unlink()
    said = run(smoke.folder, "report", f"run={smoke.out}")
    assert said.code == 0 and said.stdout.strip() == str(report) and report.read_bytes() == before
    assert "takes [run=], [runs=], [store=], [export=]" in run(smoke.folder, "report", "rum=x").message
    assert "why wants one response id" in run(smoke.folder, "why").message


def test_models_of_a_run_go_by_name(finished: Run) -> None:
    assert finished.trained("rft") == finished.artifacts["rft"]
    assert finished.trained("critic") == finished.artifacts["critic"]
    with pytest.raises(UserError, match="no model 'pairs'; there are base, critic, rft"):
        finished.trained("pairs")
