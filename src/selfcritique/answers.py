r"""Is this answer right? Find a response's final answer and compare it with the reference, exactly.

An answer is read into a small tree (`answer_reader`) and trees are compared here, in the process, as long
as numbers and words decide. Formulas need algebra, which runs in a worker process under a time and a
memory limit (`answer_worker`, `algebra`); it is started by the first pair that needs it.

What counts as equal: the same exact value, where a rounded decimal matches an exact value to every digit
it shows (at least three significant) and there is no other tolerance; the same set, or bare comma or "and"
list, in any order; the same tuple, interval or matrix (brackets keep order); the same formula, up to the
name of a free constant. Units, option letters and a leading `x =` are dropped; a percent sign on one side
only is a unit, so that 10% matches 10 and 0.1.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

from selfcritique.answer_reader import (
    PLAIN_NUMBER,
    Formula,
    Group,
    Named,
    Node,
    Num,
    Word,
    node_key,
    read,
    value_of,
)
from selfcritique.errors import UserError


class Verdict(StrEnum):
    correct = "correct"
    incorrect = "incorrect"
    unsupported = "unsupported"  # neither right nor wrong could be shown
    timeout = "timeout"


LIMIT_S = 2.0  # CPU time of one comparison, seconds
MEMORY_MB = 1024  # address space of one comparison
_MAX_TEXT = 1_000_000  # characters; beyond it nothing is read
_MAX_QUICK = 10_000  # characters; longer answers, plain numbers aside, are read within the limits of a worker
_MAX_MATCHES = 2500  # pairs tried when two lists are matched in any order


_ANSWER_IS = re.compile(r"(?:answer\s+is|answer\s*:|答案\s*[是为:：])", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$.{0,2000}?\$\$|\$[^$]*\$|\\\[(?:(?!\\\[).){0,2000}?\\\]|\\\((?:(?!\\\().){0,2000}?\\\)", re.DOTALL
)
_SENTENCE_END = re.compile(r"\n|\.(?=\s|$)|。|<\||,(?=[^\W\d_a-zA-Z])|，(?=[^\W\d_a-zA-Z])")
_SENTENCE = re.compile(r"[a-zA-Z]{2}\S* +\S+ +\S|[^\W\d_a-zA-Zα-ω零〇一二两三四五六七八九十百千万负半]")
_NUMBER_TOKEN = re.compile(
    r"(?<![\w)])-?\\?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"(?:\s?/\s?[0-9]+)?(?:\s?\\?%)?"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BETWEEN_NOISE = re.compile(r"[\s$]|\\[()\[\],;! ]|\\q?quad|\\text\s*\{|\}")
_BETWEEN_BOXES = re.compile(r"(?:[,;、和或]|,?and|,?or)(?:\w+(?:_\w|_\{\w+)?=)?")


def extract(response: str, *, last_number: bool = False) -> str | None:
    r"""The final answer: last \boxed{}, else after the last ####, else after the last "answer is".

    With `last_number`, for prompts whose format promises a value, else the last formula or number.
    Boxes joined by a comma or "and" are one list; otherwise the last box counts.
    """
    boxed = _boxed(response)
    if boxed is not None:
        return boxed
    if "####" in response:
        return response.rpartition("####")[2].strip().split("\n")[0].strip() or None
    for found in reversed(list(_ANSWER_IS.finditer(response))):
        clause = _clause(response[found.end() :])
        if clause:
            return clause
    return _last_value(response) if last_number else None


def _boxed(text: str) -> str | None:
    contents: list[str] = []
    next_start = len(text)
    for found in reversed(list(_BOX.finditer(text))):
        content, end = _braced(text, found.end())
        if contents:
            between = text[end : max(end, next_start)]
            if len(between) > 60 or not _BETWEEN_BOXES.fullmatch(_BETWEEN_NOISE.sub("", between)):
                break
        contents.append(content.strip())
        next_start = found.start()
    return ", ".join({canonical(content): content for content in reversed(contents)}.values()) or None


def _braced(text: str, at: int) -> tuple[str, int]:
    """What stands in the braces that open at `at` (spaces allowed), and where it ends."""
    while text[at : at + 1].isspace():
        at += 1
    if text[at : at + 1] != "{":
        end = re.compile(r"\S?\w*").match(text, at)
        return (end.group(), end.end()) if end else ("", at)
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[at + 1 : brace.start()], brace.end()
    return text[at + 1 :].split("\n")[0], len(text)  # cut off by the token limit


def _clause(tail: str) -> str:
    """The answer in what follows "answer is": a formula and its unit, or the sentence's rest."""
    tail = tail.lstrip(' :：*"\n\t')
    math = _MATH.match(tail)
    start = math.end() if math else 0
    end = _SENTENCE_END.search(tail, start)
    clause = tail[: end.start() if end else len(tail)].strip(' *"“”')
    clause = clause.rpartition(" is ")[2]
    return (_SENTENCE.match(clause) and _last_value(clause)) or clause


def _last_value(text: str) -> str | None:
    numbers = list(_NUMBER_TOKEN.finditer(text))
    formulas = [m for m in _MATH.finditer(text) if not numbers or re.search("[0-9]", m.group())]
    last = max(numbers[-1:] + formulas[-1:], key=lambda m: m.end(), default=None)
    return last.group() if last else None


def _reading(text: str, join: bool = True) -> Node:
    return _remembered(text, join) if len(text) <= 1000 else read(extract(text) or text, join)


@lru_cache(maxsize=1 << 16)
def _remembered(text: str, join: bool) -> Node:
    return read(extract(text) or text, join)


Leaf: TypeAlias = Callable[[Node, Node], bool]
"""Compares two nodes of which at least one needs algebra; both carry their LaTeX."""


class NeedsAlgebra(Exception):
    """The fast path cannot decide."""


class Unsupported(Exception):
    """Nothing here can decide."""


def same(gold: Node, predicted: Node, leaf: Leaf) -> bool:
    """Equal under the policy; raises what `leaf` raises where it cannot decide."""
    if type(gold) is type(predicted) and node_key(gold) == node_key(predicted):
        return True
    if isinstance(gold, Named) or isinstance(predicted, Named):
        return _same_named(gold, predicted, leaf)
    if isinstance(gold, Num) and isinstance(predicted, Num):
        return _same_number(gold, predicted)
    if isinstance(gold, Group) and isinstance(predicted, Group):
        return _same_group(gold, predicted, leaf)
    both = (gold, predicted)
    if any(isinstance(n, Word) and len(n.key) > 1 for n in both):
        return False
    return any(isinstance(n, Formula) for n in both) and leaf(gold, predicted)


def _same_named(gold: Node, predicted: Node, leaf: Leaf) -> bool:
    if isinstance(gold, Named) and isinstance(predicted, Named):
        if gold.name.startswith("(") and len(gold.name) == 3 and len(predicted.name) == 3:
            return gold.name == predicted.name and same(gold.node, predicted.node, leaf)
        if gold.name != predicted.name and {gold.name, predicted.name} <= {"x", "y", "z"}:
            return isinstance(gold.node, Formula) and leaf(gold, predicted)  # lines, not values
        return same(gold.node, predicted.node, leaf)
    named, other = (gold, predicted) if isinstance(gold, Named) else (predicted, gold)
    assert isinstance(named, Named)
    if isinstance(other, Word) and named.name == f"({other.key})":
        return True
    if isinstance(other, Formula) and re.search(r"[=<>]|\\[lg]e ", other.latex):
        return leaf(gold, predicted)
    return same(named.node, other, leaf) if named is gold else same(other, named.node, leaf)


def _same_number(gold: Num, predicted: Num) -> bool:
    a, b = value_of(gold), value_of(predicted)
    if a is None or b is None:
        return gold.key == predicted.key and gold.percent == predicted.percent
    if _agree(gold, a, predicted, b):
        return True
    if gold.percent == predicted.percent:
        return False
    if gold.percent:
        return a == b or _agree(_as_ratio(gold), a / 100, predicted, b)
    return a == b or _agree(gold, a, _as_ratio(predicted), b / 100)


def _as_ratio(number: Num) -> Num:
    return number._replace(percent=False, places=None if number.places is None else number.places + 2)


def _agree(gold: Num, a: Fraction, predicted: Num, b: Fraction) -> bool:
    """Same value, or one is the other rounded to all the places it shows (at least 3 significant)."""
    if gold.percent != predicted.percent:
        return False
    if a == b or (gold.places is None) == (predicted.places is None):
        return a == b
    shown = gold if gold.places is not None else predicted
    return shown.significant >= 3 and abs(a - b) * 2 * 10 ** (shown.places or 0) <= 1


def _same_group(gold: Group, predicted: Group, leaf: Leaf) -> bool:
    unordered = {",", "{}"}
    if gold.kind in unordered and predicted.kind in unordered:
        return _same_unordered(gold.items, predicted.items, leaf)
    if gold.kind == predicted.kind == "U" and _same_unordered(gold.items, predicted.items, leaf):
        return True
    if "U" in (gold.kind, predicted.kind):
        return not unordered >= {gold.kind, predicted.kind} - {"U"} and leaf(gold, predicted)
    for bare, other in ((gold, predicted), (predicted, gold)):
        if bare.kind == "," and other.kind == "()" and all(isinstance(n, Named) for n in bare.items):
            return _all_same(gold.items, predicted.items, leaf)
    return gold.kind == predicted.kind and _all_same(gold.items, predicted.items, leaf)


def _all_same(gold: Sequence[Node], predicted: Sequence[Node], leaf: Leaf) -> bool:
    """In order. A pair that numbers decide spares the algebra of the others."""
    if len(gold) != len(predicted):
        return False
    undecided: Exception | None = None
    for a, b in zip(gold, predicted, strict=True):
        try:
            if not same(a, b, leaf):
                return False
        except (NeedsAlgebra, Unsupported) as error:
            undecided = error
    if undecided:
        raise undecided
    return True


def _same_unordered(gold: Sequence[Node], predicted: Sequence[Node], leaf: Leaf) -> bool:
    if len(gold) != len(predicted):
        return False
    common = Counter(map(node_key, gold)) & Counter(map(node_key, predicted))
    left, right = _without(gold, common), _without(predicted, common)
    names = {n.name for n in left if isinstance(n, Named)} & {n.name for n in right if isinstance(n, Named)}
    if all(isinstance(n, Num) and n.places is None and not n.percent for n in [*left, *right]):
        return not left
    if len(left) * len(right) > _MAX_MATCHES:
        raise Unsupported("too many items to match in any order")
    for item in left:
        match = next((b for b in right if _may_match(item, b, names) and same(item, b, leaf)), None)
        if match is None:
            return False
        right.remove(match)
    return True


def _without(items: Sequence[Node], common: Counter[str]) -> list[Node]:
    spare, kept = Counter(common), []
    for item in items:
        if spare[node_key(item)]:
            spare[node_key(item)] -= 1
        else:
            kept.append(item)
    return kept


def _may_match(a: Node, b: Node, names: set[str]) -> bool:
    """x = 1, y = 2 is not x = 2, y = 1."""
    if isinstance(a, Named) and isinstance(b, Named) and {a.name, b.name} & names:
        return a.name == b.name
    return True


def canonical(answer: str) -> str:
    """One text for equal answers, to group samples for maj@k; formulas and long texts stay as they are.

    Without the percent rule, which is not transitive (10% = 10 and 10% = 0.1): 10% stands alone.
    """
    if len(answer) > _MAX_QUICK and not PLAIN_NUMBER.fullmatch(answer):
        return answer
    node = _reading(answer)
    return node_key(node.node if isinstance(node, Named) else node)


def decide(gold: str, predicted: str, leaf: Leaf) -> bool:
    """Equality of two texts under the policy."""
    if gold == predicted:
        return True
    a, b = _reading(gold.strip()), _reading(predicted.strip())
    if same(a, b, leaf):
        return True
    number, other = (a, b) if isinstance(a, Num) else (b, a)
    if isinstance(number, Num) and "," in number.latex and isinstance(other, Group):
        return same(_reading(gold.strip(), join=False), _reading(predicted.strip(), join=False), leaf)
    return False


def _no_algebra(_: Node, __: Node) -> bool:
    raise NeedsAlgebra


def _fast(gold: str, predicted: str | None) -> Verdict | None:
    """The verdict where exact arithmetic on numbers, words and their groups suffices, else None."""
    if predicted is None or not predicted.strip():
        return Verdict.incorrect
    if max(len(gold), len(predicted)) > _MAX_TEXT:
        return Verdict.unsupported
    if any(len(text) > _MAX_QUICK and not PLAIN_NUMBER.fullmatch(text) for text in (gold, predicted)):
        return None
    try:
        return Verdict.correct if decide(gold, predicted, _no_algebra) else Verdict.incorrect
    except NeedsAlgebra:
        return None
    except Unsupported:
        return Verdict.unsupported


def compare(gold: str, predicted: str | None) -> Verdict:
    """Is `predicted` (an extracted answer; None where there is none) the same answer as `gold`?"""
    return compare_many([gold], [predicted])[0]


def compare_many(
    golds: Sequence[str],
    predictions: Sequence[str | None],
    workers: int = 1,
    limit_s: float = LIMIT_S,
    memory_mb: int = MEMORY_MB,
) -> list[Verdict]:
    """One verdict per pair, in order; formulas are compared by up to `workers` processes.

    `limit_s` (seconds of CPU; ten times as many of wall time) and `memory_mb` (address space) bound each
    comparison: beyond the first the verdict is `timeout`, beyond the second `unsupported`, and the other
    pairs are not affected.
    """
    if len(golds) != len(predictions):
        raise ValueError(f"{len(golds)} gold answers but {len(predictions)} predictions")
    empty = [i for i, gold in enumerate(golds) if not gold or not gold.strip()]
    if empty:
        raise UserError(
            f"Gold answer {empty[0]} of {len(golds)} is empty ({len(empty)} in all): nothing can be compared "
            "with it. Give each problem an answer, or leave the problem out."
        )
    verdicts = [_fast(gold, predicted) for gold, predicted in zip(golds, predictions, strict=True)]
    slow = [(golds[i], predictions[i] or "") for i, verdict in enumerate(verdicts) if verdict is None]
    if slow:
        from selfcritique.answer_worker import grade

        graded = iter(grade(slow, workers, limit_s, memory_mb))
        return [verdict or Verdict(next(graded)) for verdict in verdicts]
    return [verdict for verdict in verdicts if verdict]
