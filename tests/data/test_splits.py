"""The seven splits: sizes, disjointness, mixtures, and what of the test is found in training files."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from selfcritique import stages
from selfcritique.config import DataConfig, Source, SourceConfig, SplitsConfig
from selfcritique.data.sources import problem_of
from selfcritique.data.splits import build_splits, normalise
from selfcritique.errors import UserError
from selfcritique.progress import Progress

GSM8K = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gsm8k"
NAMES = [f.name for f in fields(SplitsConfig)]
TRAINING = [name for name in NAMES if name != "test"]


def config(*mix: SourceConfig, seed: int = 0, each: int = 10, **sizes: int) -> DataConfig:
    return DataConfig(seed=seed, mix=list(mix), splits=SplitsConfig(**dict.fromkeys(NAMES, each) | sizes))


def sizes(table: pl.DataFrame, *by: str) -> dict[Any, int]:
    columns = by or ("split",)
    found = Counter(table.select(columns).iter_rows())
    return {key if len(key) > 1 else key[0]: n for key, n in found.items()}


def write(path: Path, questions: list[str], **more: str) -> Path:
    rows = [{"question": q, "reference": "#### 1", **more} for q in questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def jsonl(path: Path, weight: float = 1.0) -> SourceConfig:
    return SourceConfig(source=Source.jsonl, path=str(path), weight=weight)


def words(prefix: str, n: int) -> list[str]:
    """Questions that differ in more than their numbers."""
    return [f"{prefix} {chr(97 + i // 26)}{chr(97 + i % 26)}?" for i in range(n)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Tom has 3 pens.", "tom  has 3\npens", True),
        ("Tom has ３ pens", "Tom has 3 pens!", True),  # full width
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("x_1", "x1", True),
        ("Tom has 3 pens.", "Tom has 4 pens.", False),
        ("10%", "10", False),
        ("小明有3支笔。", "小明有 3 支笔", True),
    ],
)
def test_normalise(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) == same


def test_splits_have_their_sizes_and_share_no_question() -> None:
    few = SourceConfig(families=["bus"], registers=["plain"], steps=[2], limit=8)
    wanted = {name: 10 + 5 * i for i, name in enumerate(NAMES)}
    table, counts = build_splits(config(few, **wanted))
    assert sizes(table) == wanted
    texts = [normalise(q) for q in table["question"]]
    assert len(set(texts)) == len(texts) == table["problem_id"].n_unique()
    assert counts["repeats"] > 0  # some of these few hundred problems were drawn twice


def test_splits_are_a_function_of_the_seed() -> None:
    mix = SourceConfig(), SourceConfig(families=["ages"], weight=0.5)
    (one, _), (same, _), (other, _) = (build_splits(config(*mix, seed=s)) for s in (0, 0, 1))
    assert one.equals(same) and not set(one["problem_id"]) & set(other["problem_id"])


def test_the_first_problems_of_a_split_do_not_depend_on_its_size() -> None:
    """A larger last split keeps every other split as it is."""
    small, _ = build_splits(config(SourceConfig()))
    large, _ = build_splits(config(SourceConfig(), dev=30))
    others = pl.col("split") != "dev"
    assert small.filter(others).equals(large.filter(others))
    assert large.filter(split="dev").head(10).equals(small.filter(split="dev"))


def test_mixtures_follow_the_weights_in_every_split_and_fill_it(tmp_path: Path) -> None:
    """Weights 2 : 1 : 1 of 10: 5, and 2 or 3 each, 10 together; the sources alternate within a split."""
    files = [
        jsonl(write(tmp_path / f"{n}.jsonl", words(n, 60), source=n), w)
        for n, w in (("a", 2), ("b", 1), ("c", 1))
    ]
    table, _ = build_splits(config(*files))
    assert sizes(table) == dict.fromkeys(NAMES, 10)
    by_source = sizes(table, "split", "source")
    assert all(by_source[name, "a"] == 5 for name in NAMES)
    assert all({by_source[name, "b"], by_source[name, "c"]} == {2, 3} for name in NAMES)
    dev = table.filter(split="dev")["source"].to_list()
    assert dev != sorted(dev)


def test_a_test_question_in_a_training_file_is_removed_there_and_counted(tmp_path: Path) -> None:
    """Two of the training file's questions stand in the test file too, one of them spelt otherwise."""
    test = words("test", 10)
    train = words("train", 60)
    train[3:3] = [test[0], test[1].upper().replace(" ", "  ")]
    write(tmp_path / "test.jsonl", test)
    write(tmp_path / "train.jsonl", train)
    table, counts = build_splits(config(jsonl(tmp_path)))
    assert counts == {"repeats": 0, "removed_from_training": 2, "near_duplicates": 0}
    assert table.filter(split="test")["question"].to_list() == test
    assert sizes(table) == dict.fromkeys(NAMES, 10)
    assert not {normalise(q) for q in test} & {
        normalise(q) for q in table.filter(pl.col("split") != "test")["question"]
    }


def test_the_test_of_one_source_is_removed_from_the_training_of_another(tmp_path: Path) -> None:
    """The first source, read first, trains on three questions that the second tests on."""
    test = words("test", 5)
    mine = words("first", 60)
    first = write(tmp_path / "first.jsonl", mine[:20] + test[:3] + mine[20:])
    write(tmp_path / "second/test.jsonl", test)
    write(tmp_path / "second/train.jsonl", words("second", 60))
    table, counts = build_splits(config(jsonl(first), jsonl(tmp_path / "second")))
    assert set(table.filter(split="test")["question"]) == {*mine[:5], *test}
    assert not set(table.filter(pl.col("split") != "test")["question"]) & set(test)
    assert counts == {"repeats": 0, "removed_from_training": 3, "near_duplicates": 0}


def test_repeats_and_near_duplicates_are_counted(tmp_path: Path) -> None:
    """A question twice is one repeat; test questions like a training question but for the numbers: 2."""
    test = ["Add 1 and 2.", "Add 3 and 44.", "Take 1 from 2.", "What is half of 8?"]
    train = ["Add 10 and 20.", "Take one from 2.", *words("train", 60)]
    write(tmp_path / "test.jsonl", test)
    write(tmp_path / "train.jsonl", [train[0], *train])
    _, counts = build_splits(config(jsonl(tmp_path), test=4))
    assert counts == {"repeats": 1, "removed_from_training": 0, "near_duplicates": 2}


def test_a_file_alone_gives_its_first_questions_to_the_test(tmp_path: Path) -> None:
    questions = words("question", 70)
    table, _ = build_splits(config(jsonl(write(tmp_path / "all.jsonl", questions))))
    assert table.filter(split="test")["question"].to_list() == questions[:10]
    assert table["question"].to_list() == questions


def test_held_out_families_are_tested_on_and_never_trained_on() -> None:
    source = SourceConfig(families=["bus", "share"], test_families=["ages"])
    table, _ = build_splits(config(source))
    families = table.group_by(pl.col("split") == "test").agg(pl.col("family").unique().sort())
    assert dict(families.iter_rows()) == {False: ["bus", "share"], True: ["ages"]}


def test_registers_of_the_test_are_its_own() -> None:
    table, _ = build_splits(config(SourceConfig(registers=["plain"], test_registers=["chatty"])))
    registers = table.group_by(pl.col("split") == "test").agg(pl.col("register").unique())
    assert dict(registers.iter_rows()) == {False: ["plain"], True: ["chatty"]}


# ---- what stops ----------------------------------------------------------------------------------------


def test_too_few_problems_in_a_file(tmp_path: Path) -> None:
    """25 of 70: the test and one split of 10 get theirs, the second finds 5."""
    path = write(tmp_path / "few.jsonl", words("q", 25))
    with pytest.raises(
        UserError, match=r"few\.jsonl has 5 problems left for split critic_train, which wants 10"
    ):
        build_splits(config(jsonl(path)))


def test_an_endless_source_with_too_few_distinct_problems_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfcritique.data.splits.MAX_REPEATS", 200)
    source = SourceConfig(families=["bus"], registers=["plain"], steps=[2], limit=8)
    with pytest.raises(
        UserError, match=r"word_problems .*problems left for split test, .*data\.splits\.test"
    ):
        build_splits(config(source, test=100_000))


def test_unknown_families_registers_and_steps_are_refused_together() -> None:
    wrong = SourceConfig(
        families=["bus", "buss"],
        test_families=["age"],
        registers=["plian"],
        test_registers=["chaty"],
        steps=[1, 2, 6],
    )
    with pytest.raises(UserError) as error:
        build_splits(config(wrong))
    for part in ("['age', 'buss']; there are collect, bus", "['chaty', 'plian']; there are plain", "[1, 6]"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no registers given; there are plain"):
        build_splits(config(SourceConfig(registers=[])))


# ---- GSM8K ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"GSM8K is not at {GSM8K}")
def test_gsm8k_from_a_folder() -> None:
    """All 1,319 test questions, in order; every reference ends with its answer, marks and all."""
    source = SourceConfig(source=Source.gsm8k, path=str(GSM8K))
    table, counts = build_splits(config(source, test=1319, base_train=3000))
    assert sizes(table) == {name: 10 for name in TRAINING} | {"base_train": 3000, "test": 1319}
    first = table.filter(split="test").row(0, named=True)
    assert first["question"].startswith("Janet") and first["answer"] == "18"
    assert first["reference"].endswith("#### 18") and "<<16-3-4=9>>" in first["reference"]
    assert set(table["source"]) == {"gsm8k"}
    ends = table["reference"].str.extract(r"#### ([^\n]+)$").str.replace_all(",", "")
    assert ends.equals(table["answer"].str.replace_all(",", "").rename("reference"))
    assert counts["removed_from_training"] == 0


def test_a_test_file_with_fewer_questions_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SourceConfig(source=Source.gsm8k, path=str(GSM8K))
    settings = stages.Problems(config(source, test=1320))
    assert stages.problems(settings, {}, tmp_path, Progress("problems"))["splits"]["test"] == 1319
    assert "the test file has 1319 questions, fewer than data.splits.test=1320" in capsys.readouterr().err


def test_rows_of_math() -> None:
    """Fields by their names there; the answer is the last box of the solution."""
    row = {"problem": "x + 1 = 4?", "level": "Level 3", "type": "Algebra", "solution": r"So $x = \boxed{3}$."}
    found = problem_of(row, Source.math, "here")
    assert (found.question, found.answer, found.subject) == ("x + 1 = 4?", "3", "Algebra")
    assert (found.source, found.difficulty) == ("math", 3)
