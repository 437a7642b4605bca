"""Runs side by side: shared models are one, seeds are paired, numbers follow from the rows."""

import json
from pathlib import Path

import polars as pl
import pytest

from runs import Finished
from selfcritique.compare import changes, differences, load_models, markdown
from selfcritique.errors import UserError


def finished(root: Path, experiment: str, seed: int, models: dict[str, tuple[str, str]]) -> None:
    """A run whose models have the given (key, answers: y right, x wrong)."""
    folder = root / "outputs" / experiment / str(seed)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(
        json.dumps({"experiment": experiment, "seed": seed, "models": dict.fromkeys(models)})
    )
    (folder / "lineage.json").write_text(
        json.dumps(
            {f"{s}_{name}": {"key": key} for name, (key, _) in models.items() for s in ("eval", "test")}
        )
    )
    for key, answers in models.values():
        place = root / "store" / "evaluate" / key
        place.mkdir(parents=True, exist_ok=True)
        verdicts = ["correct" if a == "y" else "incorrect" for a in answers]
        pl.DataFrame({"problem_id": [str(i) for i in range(len(answers))], "source": "s", "kind": "greedy",
                      "difficulty": range(len(answers)), "verdict": verdicts}
                     ).write_parquet(place / "eval.parquet")  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    finished(tmp_path, "demo", 0, {"base": ("b0", "yyxx"), "rft": ("r0", "yyyx")})
    finished(tmp_path, "demo", 1, {"base": ("b1", "yxxx"), "rft": ("r1", "yyyx")})
    finished(tmp_path, "other", 0, {"base": ("b0", "yyxx"), "rft": ("o0", "yxxx")})
    return tmp_path


def test_a_shared_model_is_one(root: Path) -> None:
    models = load_models([f"{root}/outputs/*/*"], root / "store")
    assert [m.name for m in models] == ["base", "rft", "rft@other"]
    assert [sorted(m.rows) for m in models] == [[0, 1], [0, 1], [0]]


def test_points_of_a_sweep_are_told_apart_by_what_it_varies(root: Path) -> None:
    """Two settings under two seeds, points 0, 5, 10, 15; the base is the same, and so is the RFT model."""
    points = []
    for i, (by, seed, key) in enumerate(
        (x, s, k) for x, k in (("critic", "c"), ("random", "d")) for s in (0, 1)
    ):
        i *= 5  # by name, 10 stands before 5
        models = {"base": (f"b{seed}", "yyxx"), "rft": (f"r{seed}", "yyyx"), "dpo": (f"{key}{seed}", "yyyy")}
        finished(root, "sweep", i, models)
        folder = root / "outputs" / "sweep" / str(i)
        (folder / "summary.json").write_text(
            json.dumps({"experiment": "sweep", "seed": seed, "models": dict.fromkeys(models)})
        )
        label = {"rft.select.by": by, "seed": str(seed)}
        points.append({"number": i, "label": label, "folder": f"outputs/sweep/{i}", "error": ""})
    (root / "outputs" / "sweep" / "sweep.json").write_text(json.dumps({"points": points}))
    models = load_models([f"{root}/outputs/sweep/*", f"{root}/outputs/other/*"], root / "store")
    named = ["base", "rft", "dpo", "dpo@by=random", "rft@other"]
    assert [(m.name, sorted(m.rows)) for m in models] == [(n, [0, 1]) for n in named[:4]] + [(named[4], [0])]
    later = load_models([f"{root}/outputs/other/*", f"{root}/outputs/sweep/15"], root / "store")
    assert [m.name for m in later] == [
        "base",
        "rft",
        *(f"{n}@sweep,by=random" for n in ("base", "rft", "dpo")),
    ]
    found = differences(models, "accuracy", ["rft"])
    assert [(r["a"], r["b"]) for r in found] == [(n, "rft") for n in named[2:]]


def test_a_group_of_the_problems(root: Path) -> None:
    """Of base's yyxx the first and the last: 1/2; of rft's yyyx the same."""
    models = load_models([f"{root}/outputs/demo/0"], root / "store", "difficulty=0,3")
    assert [m.rows[0]["verdict"].to_list() for m in models] == [["correct", "incorrect"]] * 2
    for where, said in (("colour=red", "grouped by"), ("difficulty=7", "no test problem has")):
        with pytest.raises(UserError, match=said):
            load_models([f"{root}/outputs/demo/0"], root / "store", where)


def test_differences_over_seeds(root: Path) -> None:
    """rft − base: 3/4 − 2/4 and 3/4 − 1/4, on the mean 0.375, or 100 % of base's mean 3/8."""
    models = load_models([f"{root}/outputs/demo/*", f"{root}/outputs/other/*"], root / "store")
    rows = {(r["a"], r["b"]): r for r in differences(models, "accuracy")}
    assert set(rows) == {("rft", "base"), ("rft@other", "base"), ("rft@other", "rft")}
    found = rows["rft", "base"]
    assert (found["delta"], found["relative"]) == (pytest.approx(0.375), pytest.approx(1.0))
    assert [found["each"][s]["delta"] for s in (0, 1)] == [0.25, 0.5]
    assert rows["rft@other", "base"]["delta"] == -0.25
    table = markdown(models)
    assert "| base | 50.0 [" in table and table.count("| rft@other |") == 1
    assert "| rft − base | +25.0 [" in table and "| +100.0 % |" in table


def test_answers_that_differ(smoke: Finished) -> None:
    models = {m.name: m for m in load_models([str(smoke.out)], smoke.store)}
    right, texts = {}, {}
    for name in ("base", "rft"):
        answers = pl.read_parquet(smoke.artifact(f"test_{name}") / "responses.parquet")
        right[name] = set(answers.filter(verdict="correct")["problem_id"])
        texts[name] = dict(answers.select("problem_id", "text").iter_rows())
    head, *shown = changes([models["base"], models["rft"]], 1000)
    gained, lost = right["rft"] - right["base"], right["base"] - right["rft"]
    assert head == f"rft − base, seed 0: {len(gained)} right only by rft, {len(lost)} only by base"
    assert len(shown) == 3 * len(gained | lost) and gained | lost
    for problem in gained:
        assert f"  rft, correct: {texts['rft'][problem]}" in shown
    for problem in lost:
        assert f"  base, correct: {texts['base'][problem]}" in shown
    assert len(list(changes([models["base"], models["rft"]], 1))) == 1 + 3 * (bool(gained) + bool(lost))


def test_what_cannot_be_compared_is_said(root: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        load_models([f"{root}/outputs/nothing/*"], root / "store")
    finished(root, "demo", 2, {"base": ("b0", "yyxx")})
    moved = root / "outputs" / "demo" / "2" / "summary.json"
    moved.write_text(moved.read_text().replace('"seed": 2', '"seed": 0').replace("b0", "b9"))
    (moved.parent / "lineage.json").write_text(
        json.dumps({f"{stage}_base": {"key": "b9"} for stage in ("eval", "test")})
    )
    with pytest.raises(UserError, match="seed 0 stands in two of the runs"):
        load_models([f"{root}/outputs/demo/*"], root / "store")
    with pytest.raises(UserError, match="is gone"):
        load_models([f"{root}/outputs/demo/0"], root / "elsewhere")
