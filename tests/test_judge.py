"""Verdicts of judges: the right score or none, in the forms models write; what was published beside it."""

import gc
from time import process_time

import pytest

from selfcritique.judge import LEADERBOARD, SUBJECTS, parse_rating, published_rating
from selfcritique.prompts import DIMENSIONS, MATHUSEREVAL, MT_BENCH, OVERALL, judge_prompt
from selfcritique.records import Parse

DIMS = "'事实正确性': 8, '满足用户需求': 7, '逻辑连贯性': 9, '完备性': 6"
FULL = "{" + DIMS + ", '综合得分': %s}"
OTHER = FULL.replace("8", "3") % 3

# text, score (None: failed), how it was read, what the published parser makes of it
FORMS: list[tuple[str, float | None, str, float]] = [
    (f"说明。\n{FULL % 7}", 7, "ok", 7),
    (f"{FULL % 10}", 10, "ok", 10),
    (f"{FULL % 1}", 1, "ok", 1),
    ((FULL % 7).replace("'", '"'), 7, "ok", -1),  # double quotes: -1 in the published mean
    ((FULL % 7).replace(": ", ":"), 7, "ok", -1),  # no spaces
    ((FULL % 7).replace(": ", "："), 7, "ok", -1),  # full-width colons
    ((FULL % 7).translate(str.maketrans("{}:,", "｛｝：，")), 7, "ok", -1),  # full-width throughout
    ((FULL % 7).replace("'", "‘", 1).replace("'", "’"), 7, "ok", -1),  # typographic quotes
    ((FULL % 7).replace("'", "“"), 7, "ok", -1),
    (FULL % "７", 7, "ok", 7),  # full-width digit
    ((FULL % 7).replace("'", ""), 7, "ok", -1),  # no quotes
    ((FULL % 7).replace("'", "`"), 7, "ok", -1),
    (FULL % "'7'", 7, "ok", -1),  # the number in quotes
    (FULL % "7/10", 7, "ok", 7),
    (FULL % "7分", 7, "ok", 7),
    (FULL % "7.0", 7, "ok", 7),
    (FULL % "7.5", 7.5, "repaired", 7),  # the published parser cuts the decimal off
    ("```json\n" + (FULL % 7).replace("'", '"').replace(", ", ",\n  ") + "\n```", 7, "ok", -1),
    ((FULL % 7).replace(", ", ",\n"), 7, "ok", 7),  # over several lines: found by the second look
    (f"{FULL % 7}\n以上是我的评分，满分 10 分。", 7, "ok", 7),  # text after
    (f"{FULL % 7}\n集合 {{1, 2}} 不影响结论。", 7, "ok", 7),  # braces after
    (f"先按格式 {OTHER}\n最终：{FULL % 7}", 7, "ok", 7),  # two verdicts: the last
    (f"{OTHER} 修正为 {FULL % 7}", 7, "ok", 7),  # on one line
    ("{" + FULL % 7 + "}", 7, "ok", 7),  # doubled braces
    ("{'评分': %s}" % (FULL % 7), 7, "ok", 7),  # nested
    ("{'综合得分': 7}", 7, "repaired", 7),  # dimensions missing
    ("{'事实正确性': 85, '综合得分': 7}", 7, "repaired", 7),  # a dimension on another scale
    (f"{DIMS}, '综合得分': 7", 7, "repaired", 7),  # no braces
    ("**综合得分**：7 分", 7, "repaired", -1),
    ("综合得分（1-10）：8/10", 8, "repaired", -1),
    ("总分为6分。", 6, "repaired", -1),
    ("Overall score: 4 out of 10", 4, "repaired", -1),
    ("{'Overall': 7}", 7, "repaired", -1),
    ("Rating: [[6]]", 6, "repaired", -1),  # MT-Bench's published form
    ("[[5.5]]", 5.5, "repaired", -1),
    ("这份回答很好。", None, "failed", -1),  # none
    ("", None, "failed", -1),
    ("{" + DIMS + "}", None, "failed", -1),  # dimensions alone make no overall score
    (FULL % 0, None, "failed", 0),  # out of range
    (FULL % 11, None, "failed", 11),
    (FULL % 85, None, "failed", 85),
    (FULL % -1, None, "failed", -1),
    (FULL % "7-8", None, "failed", 7),  # a range
    (FULL % "7～8", None, "failed", 7),
    (FULL % "7 or 8", None, "failed", 7),
    (FULL % "7/8", None, "failed", 7),  # another scale
    (FULL % "70%", None, "failed", 70),
    (FULL % "7,5", None, "failed", 7),  # a decimal comma, or two numbers
    (FULL % "分数", None, "failed", -1),  # the template echoed
    (FULL % "N/A", None, "failed", -1),
    (f"{OTHER}\n{FULL % 0}", None, "failed", 0),  # the earlier verdict does not stand in for the last
    ("综合得分主要由前两个维度决定，1-2 分表示错误。", None, "failed", -1),
    ("总分必须是1到2分", None, "failed", -1),
    ("Overall 3 steps are wrong.", None, "failed", -1),
    ("{'综合得分': 七}", None, "failed", -1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "score", "parse", "published"), FORMS)
def test_verdict_forms(text: str, score: float | None, parse: str, published: float) -> None:
    read = parse_rating(text, False, tuple(DIMENSIONS))
    assert (read.score, read.parse.value) == (score, parse)
    assert published_rating(text) == published


def test_there_are_thirty_forms_of_each_kind_the_issue_names() -> None:
    assert len({text for text, *_ in FORMS}) == len(FORMS) >= 30
    assert {parse for *_, parse, _ in FORMS} == {"ok", "repaired", "failed"}


def test_dimensions_are_read() -> None:
    read = parse_rating(FULL % 7, False, tuple(DIMENSIONS))
    assert read.dimensions == dict(zip(DIMENSIONS, (8, 7, 9, 6), strict=True))
    partly = parse_rating("{'事实正确性': 85, '完备性': 4, '综合得分': 7}", False, tuple(DIMENSIONS))
    assert partly.dimensions == {"完备性": 4}


@pytest.mark.parametrize(
    ("text", "score", "parse"),
    [
        (FULL % 7, 7, Parse.ok),  # a whole dictionary was not cut
        ("{" + DIMS + ", '综合得分': 1", None, Parse.truncated),  # perhaps the beginning of 10
        ("{" + DIMS + ", '综合得分': 7, '其他", 7, Parse.repaired),
        ("评价还没有写完", None, Parse.truncated),
    ],
)
def test_a_verdict_that_the_token_limit_may_have_cut(text: str, score: float | None, parse: Parse) -> None:
    read = parse_rating(text, True, tuple(DIMENSIONS))
    assert (read.score, read.parse) == (score, parse)


@pytest.mark.parametrize(
    "piece", ["{", "'", " ", "*", "(", "综合得分", "综合得分 ", "综合得分: ", "'综合得分': 7", "1"]
)
def test_a_looping_judge_is_read_in_linear_time(piece: str) -> None:
    """Twenty times the text takes about twenty times as long, not 400 times. The best of three, with no
    garbage of the other tests collected meanwhile."""

    def seconds(n: int) -> float:
        text = OVERALL + piece * n
        start = process_time()
        parse_rating(text, True)
        published_rating(text)
        return process_time() - start

    gc.disable()
    try:
        short, long = (min(seconds(n) for _ in range(3)) for n in (2_500, 50_000))
    finally:
        gc.enable()
    assert long < 150 * short


def test_leaderboard_rows_are_copied_right() -> None:
    """Weighted by the published sizes (545 in all) the eight subjects give the published overall score to
    0.08, whichever row: it is a micro average, although the page calls it macro. The mean of the eight is
    up to 0.31 away."""
    sizes = dict(zip(SUBJECTS, (113, 75, 81, 73, 54, 45, 58, 46), strict=True))
    assert sum(sizes.values()) == 545
    micro, macro = [], []
    for overall, *scores in LEADERBOARD.values():
        micro.append(abs(sum(n * s for n, s in zip(sizes.values(), scores, strict=True)) / 545 - overall))
        macro.append(abs(sum(scores) / 8 - overall))
    assert max(micro) < 0.08 and sum(x < 0.02 for x in micro) == 9
    assert max(macro) > 0.25
    assert all(a < b for a, b in zip(micro, macro, strict=True))


def test_protocol_in_the_prompt() -> None:
    text = judge_prompt(MATHUSEREVAL, "1+1=?", "2", "答案 3", "初等数学").messages[-1].content
    assert all(part in text for part in ("1+1=?", "\n2\n", "答案 3", "初等数学", "参考答案值 8 分"))
    assert all(name in text for name in DIMENSIONS)
    last = text.splitlines()[-1]
    assert last == "{" + ", ".join(f"'{name}': 分数" for name in (*DIMENSIONS, OVERALL)) + "}"
    assert parse_rating(last.replace("分数", "7"), False, tuple(DIMENSIONS)).parse is Parse.ok
    assert parse_rating(last, False).score is None  # an echo of the request is no verdict


def test_texts_are_data_to_the_prompt() -> None:
    """Names in braces and doubled braces in what is judged stay as they are."""
    text = judge_prompt(MT_BENCH, "q {answer}", "", "{{x}} {question}").messages[-1].content
    assert "q {answer}" in text and "{{x}} {question}" in text
    assert "Reference answer:\n<<<\n-\n>>>" in text and text.count("{'Overall': n}") == 1
    own = judge_prompt("Q {question} A {answer} R {reference} {{'综合得分': n}} {other}", "1", "2", "3")
    assert own.messages[-1].content == "Q 1 A 3 R 2 {'综合得分': n} {other}"
