"""Judges of free answers: their verdicts read, and what was published beside them.

A judge explains and then writes a dictionary of scores from 1 to 10. Models write it in many forms; what
cannot be read for certain has no score. The reader of MathUserEval's own scripts, which takes an unreadable
verdict for -1 and averages it, is re-described here so that its result can stand beside ours.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from selfcritique.prompts import OVERALL
from selfcritique.records import Parse

_OVERALL = (
    rf"{OVERALL}|综合(?:评分|分数|分)|总(?:体)?(?:得分|评分|分)|最终(?:得分|评分)|overall|final score|rating"
)
_QUOTES = str.maketrans("“”„‘’‚「」『』`", '"""\'\'\'""""\'')
# What stands between a name and its score: closing quote, "(1-10)", colon or "is", opening quote. Bounded
# repeats: a judge that loops writes thousands of spaces.
_SEPARATOR = (
    r"[\s_]{0,2}(?:score|rating)?[\s'\"*]{0,6}(?:\([^()]{0,40}\))?[\s*]{0,4}"
    r"(?:[:=]>?|为|是|\bis\b)[\s'\"*]{0,6}"
)
# A whole number or decimal, "/10" allowed, that is not the beginning of another number, a range or a ratio.
_NUMBER = re.compile(
    r"(-?\d+(?:\.\d+)?)(?:\s?/\s?10(?!\d)| out of 10(?!\d))?"
    r"(?!\d|[.,]\d|\s?%|\s?分?\s?(?:[-~–—/]|至|到|to\b|or\b|或)\s?\d)"
)
_DICTIONARY = re.compile(r"\{([^{}]*)\}")
_VERDICT = re.compile(rf"(?:{_OVERALL}){_SEPARATOR}(?=-?\d)|\[\[\s*(?=-?\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Rating:
    """What a judge said of one answer. `ok`: a dictionary with every dimension and a whole overall score."""

    score: float | None  # 1 to 10
    dimensions: dict[str, float]  # those that could be read
    parse: Parse


def parse_rating(text: str, truncated: bool, dimensions: Sequence[str] = ()) -> Rating:
    """The last dictionary with an overall score counts, without any the last overall score in the text.

    A range, another scale, a number outside 1 to 10, or one that the token limit may have cut is failed:
    an earlier verdict never stands in for the last one.
    """
    clean = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    inside = [d[1] for d in _DICTIONARY.finditer(clean) if _VERDICT.search(d[1])]
    body = inside[-1] if inside else clean
    verdicts = list(_VERDICT.finditer(body))
    nothing = Rating(None, {}, Parse.truncated if truncated else Parse.failed)
    if not verdicts:
        return nothing
    score = _score(body, verdicts[-1].end())
    cut = truncated and not inside and re.fullmatch(r"[\d.]*", body[verdicts[-1].end() :]) is not None
    if score is None or cut:
        return nothing
    names = {name: re.search(re.escape(name) + _SEPARATOR, body) for name in dimensions}
    found = {name: _score(body, match.end()) for name, match in names.items() if match}
    read = {name: value for name, value in found.items() if value is not None}
    whole = bool(inside) and score.is_integer() and len(read) == len(dimensions)
    return Rating(score, read, Parse.ok if whole else Parse.repaired)


def _score(text: str, start: int) -> float | None:
    found = _NUMBER.match(text, start)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None


def published_rating(text: str) -> float:
    """What MathUserEval's judge.py reads, -1 where it finds nothing.

    It looks at the last line that opens a brace, from its first brace to the first that closes after its
    last, for single-quoted names with a colon, one space and digits: of a decimal it keeps the whole part,
    and there is no range. Without an overall score there, the first such score of the whole text counts.
    """
    opens = text.rfind("{")
    closes = text.find("}", opens)
    first = text.find("{", text.rfind("\n", 0, max(opens, 0)) + 1)
    body = text[first + 1 : closes] if 0 <= opens < closes else ""
    pairs = {} if "\n" in body else dict(re.findall(r"'(.*?)': (\d+)", body))
    if OVERALL in pairs:
        return float(pairs[OVERALL])
    anywhere = re.search(rf"'{OVERALL}': (\d+(?:\.\d{{1,2}})?)", text)
    return float(anywhere[1]) if anywhere else -1.0


SUBJECTS = (
    "algebra",
    "calculate",
    "geometry",
    "trigonometry",
    "calculus",
    "discrete",
    "linear_algebra",
    "Probability",
)
# Published scores by GPT-4-1106-preview: overall, then SUBJECTS (THUDM/ChatGLM-Math, README at e91a91b).
LEADERBOARD = {
    "GPT-4-0125-Preview": (5.79, 5.04, 7.63, 3.98, 4.59, 7.26, 6.62, 5.48, 7.72),
    "GPT-4-1106-Preview": (5.73, 4.96, 7.00, 3.78, 4.71, 7.39, 6.96, 5.29, 7.91),
    "GLM-4": (5.11, 4.47, 6.56, 3.95, 4.74, 6.00, 5.67, 4.26, 6.02),
    "ChatGLM3-32B-SFT-2312 + RFT&DPO": (4.23, 3.88, 5.41, 2.90, 3.99, 5.22, 4.76, 3.38, 5.20),
    "GPT-4-0613": (4.14, 2.88, 4.76, 3.17, 2.78, 5.57, 5.49, 4.26, 6.22),
    "ChatGLM3-32B-SFT-2312 + RFT": (4.01, 3.84, 5.37, 2.57, 3.77, 4.72, 4.69, 2.98, 4.89),
    "Qwen-72B-Chat": (3.87, 3.96, 4.81, 3.83, 3.34, 4.54, 3.71, 2.84, 3.65),
    "GPT-3.5-Turbo-0613": (3.42, 2.81, 4.07, 2.23, 3.26, 4.83, 4.38, 3.26, 3.91),
    "ChatGLM3-32B-SFT-2312": (3.39, 3.35, 4.51, 2.51, 3.11, 4.04, 4.38, 2.41, 3.13),
    "Claude-2": (3.29, 2.35, 3.63, 2.20, 2.53, 4.56, 4.53, 3.29, 5.28),
    "DeepSeek-Chat-67B": (3.24, 2.21, 4.73, 2.12, 2.30, 4.41, 4.82, 2.79, 3.52),
    "Yi-34B-Chat": (2.64, 2.04, 3.61, 2.25, 2.27, 2.80, 3.47, 2.03, 3.41),
}
