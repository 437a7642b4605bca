"""Evaluation sets: every row of the files in use, and what is left out of them or refused."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from selfcritique.config import EvalSet
from selfcritique.data.sets import MATHS_SUBJECTS, beside, exact_target, load_set, locate
from selfcritique.errors import UserError
from selfcritique.records import Problem
from selfcritique.stages import PROBLEM_FIELDS

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def load(name: str, file: str, **settings: Any) -> tuple[pl.DataFrame, dict[str, int]]:
    return load_set(EvalSet(name), str(DATA / file), "", **settings)


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "file", "rows", "families", "first", "last"),
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319, 1, "18", "14"),
        ("math500", "math500/math500.jsonl", 500, 7, r"\left( 3, \frac{\pi}{2} \right)", r"106^\circ"),
        ("cmath", "cmath/cmath_dev.jsonl", 600, 6, "9", "60"),
        ("gsm_hard", "gsm_hard/gsmhardv2.jsonl", 1319, 1, "-9867630", "2180"),
    ],
)
def test_checked_sets(name: str, file: str, rows: int, families: int, first: str, last: str) -> None:
    table, counts = load(name, file)
    assert (table.height, counts) == (rows, {"rows": rows, "left_out": 0, "repeated": 0})
    assert (table["answer"][0], table["answer"][-1]) == (first, last) and "" not in table["answer"]
    assert table["family"].n_unique() == families and table["problem_id"].n_unique() == rows
    problem = Problem(**table.select(PROBLEM_FIELDS).row(3, named=True))
    assert problem.id == table["problem_id"][3]  # as the sampling stage computes it


@pytest.mark.parametrize(
    ("target", "answer"),
    [(-9867630.0, "-9867630"), (3244047.0999999996, "32440471/10"), (5.3333333333, "16/3"),
     (14053029.666666666, "42159089/3"), (0.0016791648, "0.0016791648"),
     (9284017268534.4, "46420086342672/5")],
)  # fmt: skip
def test_a_float_stands_for_a_number(target: float, answer: str) -> None:
    assert exact_target(target) == answer


def test_mathusereval_with_and_without_its_supplement() -> None:
    file = "mathusereval/math-user-eval.jsonl"
    table, counts = load("mathusereval", file)
    assert counts == {"rows": 545, "left_out": 22, "repeated": 1}  # 308 and 319 ask the same
    assert dict(table.group_by("family").len().rows()) == {"初等数学": 342, "高等数学": 203}
    whole, counts = load("mathusereval", file, supplement=True)
    assert counts["rows"] == whole["problem_id"].n_unique() == 567
    assert whole.filter(source="alignbench").height == 112
    assert whole["references"].list.join("").str.len_chars().min() > 0


def test_mt_bench_finds_its_references() -> None:
    file = "mt_bench/question.jsonl"
    table, _ = load("mt_bench", file, references=beside(str(DATA / file)))
    assert table["turns"].list.len().to_list() == [2] * 80
    first = table.row(by_predicate=pl.col("problem_id") == "101", named=True)["references"]
    assert [text.split()[:3] for text in first] == [["If", "you", "have"]] * 2
    with_reference = table.filter(pl.col("references").list.join("") != "")["family"].unique()
    assert {"math", "reasoning", "coding"} <= set(with_reference)
    chinese, _ = load("mt_bench_zh", "mt_bench_zh/question.jsonl")
    assert chinese.filter(pl.col("references").list.join("") != "").height == 25


def test_mmlu_leaves_mathematics_out(tmp_path: Path) -> None:
    table, counts = load("mmlu", "mmlu_stem/test_nonmath.jsonl")
    assert counts["rows"] == 1954 and not MATHS_SUBJECTS & set(table["family"])
    row = {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 2}
    path = written(tmp_path / "hub.jsonl", row | {"subject": "law"}, row | {"subject": "abstract_algebra"})
    table, counts = load_set(EvalSet.mmlu, path, "")
    assert table.select("problem_id", "answer").rows() == [("law/0", "C")] and counts["left_out"] == 1


def test_a_limit_is_spread_over_the_set() -> None:
    """Every 545/5th of the rows, which stand ordered by source and subject."""
    whole, few = (load("mathusereval", "mathusereval/math-user-eval.jsonl", limit=n)[0] for n in (0, 5))
    assert few["problem_id"].to_list() == [whole["problem_id"][i] for i in (0, 109, 218, 327, 436)]


def test_what_is_refused(tmp_path: Path) -> None:
    question = {"source": "a", "question_id": 7, "question": "q", "reference": "r", "category": "c"}
    question["subcategory"] = "s"
    twice = written(tmp_path / "twice.jsonl", question, question | {"source": "b"}, question)
    with pytest.raises(UserError, match="stand in it twice: a/7"):
        load_set(EvalSet.mathusereval, twice, "")
    other = written(tmp_path / "other.jsonl", question)
    with pytest.raises(UserError, match=r"other.jsonl:1: no row of gsm8k: KeyError 'answer'"):
        load_set(EvalSet.gsm8k, other, "")
    with pytest.raises(UserError, match=r"cmath: .*give its JSONL file: paths.cmath=FILE"):
        locate(EvalSet.cmath, "")
    with pytest.raises(UserError, match=r"there is no file \./missing\.jsonl"):
        locate(EvalSet.gsm8k, "./missing.jsonl")
    assert locate(EvalSet.mmlu, "owner/name:all") == ("", "owner/name:all")
    assert locate(EvalSet.gsm8k, "") == ("", "openai/gsm8k:main:test")
    assert locate(EvalSet.gsm8k, other) == (other, "")
    assert locate(EvalSet.gsm8k, str(DATA / "gsm8k")) == (str(DATA / "gsm8k" / "test.jsonl"), "")
