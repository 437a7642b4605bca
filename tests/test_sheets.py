"""Sheets survive spreadsheet programs, mistakes in them are named, agreement follows from the marks."""

import csv
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from selfcritique import sheets
from selfcritique.__main__ import main
from selfcritique.annotate import annotator, band
from selfcritique.artifacts import Artifact, Store, artifact_key, write_json
from selfcritique.config import Annotator, AnnotatorConfig
from selfcritique.errors import UserError
from selfcritique.records import Problem
from selfcritique.results import load_run

TEXTS = [
    "4 * 2 = 8\n#### 8",
    "=1+1",
    "+cmd|' /C calc'!A0",
    'a; b, "c"\r\nd\re',
    "@SUM(A1)",
    "-5",
    "只 8",
    "'=8",
]
SCORES = [1.0, 2.5, 4.0, 5.5, 6.0, 8.0, 9.0, None]  # two to a band, one unparsed


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of which what a sheet needs is left: critic scores and what the critic was taught."""
    monkeypatch.chdir(tmp_path)
    store = Store(Path("store"))
    problems = [
        Problem(f"Question {i}?", "" if i == 0 else f"Solution {i}", str(i), "made") for i in range(8)
    ]

    def made(stage: str, inputs: dict[str, Artifact], **tables: pl.DataFrame) -> Artifact:
        def work(out: Path) -> dict[str, str]:
            for name, table in tables.items():
                table.write_parquet(out / f"{name}.parquet")
            return {}

        key = artifact_key(stage, 1, {}, {role: a.key for role, a in inputs.items()})
        return store.build(stage, 1, key, {}, inputs, work)

    ids = [f"{i}e45678901234567" for i in range(8)]  # which spreadsheet programs would read as numbers
    asked = pl.DataFrame(
        [
            {"problem_id": p.id, "question": p.question, "reference": p.reference, "answer": p.answer}
            for p in problems
        ]
    )
    said = pl.DataFrame({"problem_id": asked["problem_id"], "response_id": ids, "text": TEXTS})
    scored = pl.DataFrame({"response_id": ids, "score": SCORES})
    taught = pl.DataFrame({"response_id": ["", *ids[:4]], "score": [10, 1, 2, 4, 10]})
    inputs = {
        "problems": made("problems", {}, problems=asked),
        "responses": made("sample", {}, responses=said),
    }
    done = {
        **inputs,
        "gate_scores": made("score", inputs, scored=scored),
        "critic_data": made("critic_data", inputs, examples=taught),
    }
    write_json(Path("lineage.json"), {name: {"stage": a.stage, "key": a.key} for name, a in done.items()})
    write_json(Path("summary.json"), {})
    Path("config.yaml").write_text("store: store")
    return tmp_path


def filled(path: Path, marks: dict[str, str], encoding: str = "utf-8-sig", delimiter: str = ",") -> Path:
    """The sheet sheet.csv as a spreadsheet program saves it after marking: response id -> score."""
    with open("sheet.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding=encoding, newline="") as file:
        sheet = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        sheet.writeheader()
        for row in rows:
            sheet.writerow(row | {"score": marks.get(row["id"][1:], ""), "comment": "step 1 is wrong"})
        sheet.writerow(dict.fromkeys(rows[0], ""))
    return path


def export(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["annotate", "export", "run=.", "out=sheet.csv", *words])
    assert ended.value.code == 0


def test_a_sheet_is_blind_and_nothing_in_it_is_a_formula(run: Path) -> None:
    export()
    data = Path("sheet.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(data.decode("utf-8-sig").splitlines(keepends=True)))
    assert rows[0] == list(sheets.COLUMNS)
    assert len(rows) == 1 + 7  # the unparsed critique has no band
    assert all(row[4:] == ["", ""] and row[0].startswith("r") for row in rows[1:])
    cells = [cell for row in rows[1:] for cell in row if cell]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]
    references = {row[1]: row[2] for row in rows[1:]}
    assert references["Question 0?"] == "0" and references["Question 1?"] == "Solution 1"


def test_a_draw_is_even_over_the_bands() -> None:
    """8 low, 2 mid, 40 high and 50 top scores. 20 are drawn in turns: 2 of 4 bands, then 4 of 3."""
    scores = [1.0] * 8 + [4.0] * 2 + [7.0] * 40 + [10.0] * 50
    table = pl.DataFrame({"response_id": list(map(str, range(100))), "score": scores, "question": "q",
                          "reference": "r", "response": list(map(str, range(100)))})  # fmt: skip

    def bands(n: int, seed: int = 0) -> dict[str, int]:
        return Counter(band(score) for score in sheets.draw(table, n, seed)["score"])

    assert bands(8) == {"low": 2, "mid": 2, "high": 2, "top": 2}
    assert bands(20) == {"low": 6, "mid": 2, "high": 6, "top": 6}
    assert bands(500) == {"low": 8, "mid": 2, "high": 40, "top": 50}
    first, again, other = (sheets.draw(table, 20, seed)["response_id"].to_list() for seed in (0, 0, 1))
    assert first == again != other
    assert sheets.draw(pl.concat([table.head(8)] * 2), 100, 0).height == 8  # no text is marked twice


@pytest.mark.parametrize(("encoding", "delimiter"), [("utf-8-sig", ","), ("utf-8", ";"), ("utf-8-sig", "\t")])
def test_marks_come_back_from_spreadsheet_programs(run: Path, encoding: str, delimiter: str) -> None:
    export()
    scored = sheets.load_scored(load_run("."), "gate_scores")
    ids = scored["response_id"].to_list()
    given = {i: str(k) for k, i in enumerate(ids[:6], 1)}
    found = sheets.read_sheet(filled(Path("a.csv"), given, encoding, delimiter), scored)
    assert found == {i: sheets.Mark(int(score), "step 1 is wrong") for i, score in given.items()}


def test_agreement_by_hand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Critic 1, 2.5, 4, 5.5, 6, 8; annotator 1, 2, 4, 6, 6, 8. Decisions wrong wrong wrong RIGHT right right
    against four wrong and two right: agree 5/6, chance (3·4 + 3·2) / 36 = 1/2, κ 2/3. Quadratic: both means
    are 4.5, squares sum to 153.5 and 157, squared distances to 0.25 + 0.25.
    Annotator b says 3 where a says 1: the lower median is 1."""
    export()
    scored = sheets.load_scored(load_run("."), "gate_scores")
    ids = scored["response_id"].to_list()
    a = dict(zip(ids, ["1", "2", "4", "6", "6", "8"], strict=False))
    filled(Path("a.csv"), a)
    filled(Path("b.csv"), a | {ids[0]: "3"})
    with pytest.raises(SystemExit) as ended:
        main(["annotate", "import", "run=.", "sheet=[a.csv,b.csv]", "out=marks.csv"])
    assert ended.value.code == 0
    marks = {name: sheets.read_sheet(Path(name), scored) for name in ("a.csv", "b.csv")}
    between, critic, _ = sheets.agreement(marks, scored)
    assert (critic["a"], critic["b"], critic["n"]) == ("a.csv", "critic", 6)
    assert critic["kappa"] == pytest.approx(2 / 3)
    variances = 157 / 6 - 4.5**2 + 153.5 / 6 - 4.5**2
    assert critic["kappa_quadratic"] == pytest.approx(1 - (0.5 / 6) / variances)
    # ranks 1 2 3 4.5 4.5 6 and 1 to 6: covariance 17, variances 17 and 17.5
    assert critic["spearman"] == pytest.approx((17 / 17.5) ** 0.5)
    assert between["kappa"] == 1.0 and between["kappa_quadratic"] < 1.0
    assert (
        f"| a.csv – critic | 6 | {critic['kappa_quadratic']:.3f} | 0.667 | 0.986 |" in capsys.readouterr().out
    )
    mark = annotator(AnnotatorConfig(Annotator.file, "marks.csv"))
    problem = Problem("Question 3?", "Solution 3", "3", "made")
    first, unmarked = (mark(problem, i, "3") for i in (ids[0], ids[6]))
    assert first is not None and first.analysis == "step 1 is wrong\nScore: 1"
    assert unmarked is None


def test_what_the_critic_was_taught_can_be_marked_again(run: Path) -> None:
    export("stage=critic_data", "n=3", "seed=5")
    scored = sheets.load_scored(load_run("."), "critic_data")
    assert scored["score"].to_list() == [1.0, 2.0, 4.0, 10.0]  # without the corruption, which has no id
    assert (
        len(sheets.read_sheet(filled(Path("a.csv"), dict.fromkeys(scored["response_id"], "5")), scored)) == 3
    )


def test_every_mistake_is_named_by_its_line(run: Path) -> None:
    scored = sheets.load_scored(load_run("."), "gate_scores")
    sheets.write_sheet(scored, Path("sheet.csv"))  # in the order of TEXTS
    lines = Path("sheet.csv").read_text(encoding="utf-8-sig").splitlines()
    lines[2] = lines[2].replace('#### 8",', '#### 9",7')
    lines[3] = lines[3].replace("'=1+1,,", "'=1+1,11,")
    lines[4] = lines[4].replace("A0,,", "A0,7.5,")
    lines += [lines[3].replace(",11,", ",3,"), "rnone,q,r,t,5,"]
    Path("bad.csv").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        sheets.read_sheet(Path("bad.csv"), scored)
    found = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in found] == [
        "bad.csv:3",
        "bad.csv:4",
        "bad.csv:5",
        "bad.csv:13",
        "bad.csv:14",
    ]
    for line, part in zip(found, ("was changed", "'11'", "'7.5'", "twice", "'rnone'"), strict=True):
        assert part in line


def test_what_cannot_be_read_is_said(run: Path) -> None:
    scored = sheets.load_scored(load_run("."), "gate_scores")
    sheets.write_sheet(scored, Path("sheet.csv"))
    with pytest.raises(UserError, match="exists and may hold marks"):
        sheets.write_sheet(scored, Path("sheet.csv"))
    with pytest.raises(UserError, match="no row has a score"):
        sheets.read_sheet(Path("sheet.csv"), scored)
    Path("latin.csv").write_bytes("id,question\nr1,Käse".encode("latin-1"))
    with pytest.raises(UserError, match="CSV UTF-8"):
        sheets.read_sheet(Path("latin.csv"), scored)
    Path("short.csv").write_text("id,score\nr1,5\n")
    with pytest.raises(UserError, match="question, reference, response, comment is missing"):
        sheets.read_sheet(Path("short.csv"), scored)
    with pytest.raises(UserError, match="gate_scores, critic_data"):
        sheets.load_scored(load_run("."), "gate")
    with pytest.raises(UserError, match=r"no finished run.*nowhere"):
        load_run("nowhere")
    with pytest.raises(UserError, match=r"is not in .*elsewhere.*store="):
        load_run(".", "elsewhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "export or import"),
        (("export", "run=."), "run=, out="),
        (("export", "run=.", "out=x.csv", "m=3"), "[stage=], [n=], [seed=], [store=]"),
        (("export", "run=.", "out=x.csv", "n=many"), "n=many"),
        (("import", "run=.", "sheet=x.csv"), "sheet=x.csv: there is no such file"),
        (("import", "run=.", "sheet=x.csv", "out=x.csv"), "name another file"),
    ],
)
def test_mistakes_on_the_command_line(
    words: tuple[str, ...], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["annotate", *words])
    assert ended.value.code == 1
    assert said in capsys.readouterr().err
