"""Equality of formulas, with Math-Verify's LaTeX parser and SymPy. Runs only inside answer workers.

Two expressions are equal if they agree to 50 digits at several fixed points (for constants: once); that is
faster than simplifying their difference and has no opinion on form. Equations are equal if one is a
constant multiple of the other. Sets, inequalities and the rest are left to Math-Verify.
"""

import itertools
import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from math_verify.grader import should_treat_as_complex

from selfcritique.answer_reader import Node, Num, Word, value_of
from selfcritique.answers import Unsupported, Verdict, decide

_NOTATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_CASE_MATTERS = ConversionConfig(lowercase_symbols=False)
_DIGITS = 60  # working precision
_ZERO = sympy.Float(10) ** -40  # what cancels exactly is computed as less than this
_LARGE = sympy.Float(10) ** 10  # above it 50 digits might hide a small difference
_MAX_EXTRA = 2000
_INTEGER_NAMES = re.compile("[ijkmn](_.*)?")
_CONSTANT_NAMES = re.compile(r"[CcKk](_\{?\d\}?)?")
_VARIABLE_NAMES = re.compile("[xyztuv]")
_POINTS = (
    (7, "1.3717", "0.6911"),
    (10, "-0.8147", "-0.3359"),
    (4, "2.2361", "-1.1803"),
    (3, "0.4142", "0.2907"),
)  # for each point: the first whole-number value, the first other value, the step to the next name


def verdict(gold: str, predicted: str) -> str:
    """The verdict on a pair that needs algebra; MemoryError is the caller's."""
    try:
        return Verdict.correct if decide(gold, predicted, leaf) else Verdict.incorrect
    except MemoryError:
        raise
    except Exception:  # parser and SymPy raise anything on texts like these
        return Verdict.unsupported


def warm_up() -> None:
    """Parse, evaluate and compare once, so that graders are forked with everything imported."""
    logging.disable(logging.CRITICAL)
    for gold, predicted in ((r"x^2 + 2x + 1", r"(x+1)^2"), (r"\sqrt{2}x", "x"), (r"-x > -1", "x < 1")):
        verdict(gold, predicted)


def leaf(gold: Node, predicted: Node) -> bool:
    """Equality of two nodes by algebra."""
    a = _parse(gold.latex)
    if a is None:
        raise Unsupported(f"gold answer not understood: {gold.latex[:80]}")
    b = _parse(predicted.latex)
    if b is None:
        if isinstance(gold, Num | Word):
            return False
        raise Unsupported(f"answer not understood: {predicted.latex[:80]}")
    for shown, exact in ((gold, b), (predicted, a)):
        if isinstance(shown, Num) and isinstance(exact, sympy.Expr):
            return _matches_number(shown, exact)
    return _equal(a, b)


@lru_cache(maxsize=256)
def _parse(latex: str) -> Any:
    """A SymPy object whose symbols carry no assumptions and whose decimals are exact, or None."""
    try:
        parsed = latex2sympy(
            normalize_latex(latex, _NOTATION),
            is_real=not should_treat_as_complex(latex),
            convert_degrees=True,
            normalization_config=None,
            conversion_config=_CASE_MATTERS,
        )
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return None
    if not isinstance(parsed, sympy.Basic | sympy.MatrixBase):
        return None
    exact = {f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)}
    plain = {s: sympy.I if s.name == "i" else sympy.Symbol(s.name) for s in parsed.free_symbols}
    return parsed.xreplace({**exact, **plain})


def _equal(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) and isinstance(
        b, sympy.MatrixBase | sympy.MatrixExpr
    ):
        a, b = sympy.Matrix(a.doit()), sympy.Matrix(b.doit())
        return a.shape == b.shape and all(_equal(p, q) for p, q in zip(a.flat(), b.flat(), strict=True))
    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq):
        return _proportional(a.lhs - a.rhs, b.lhs - b.rhs)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return any(_same_expression(a, renamed) for renamed in _renamings(a, b))
    if isinstance(a, sympy.Eq) or isinstance(b, sympy.Eq):
        return False
    return bool(verify(a, b, float_rounding=15, numeric_precision=30, strict=True, timeout_seconds=None))


def _matches_number(shown: Num, exact: sympy.Expr) -> bool:
    """An expression against a number as written: equal, or rounded to every digit shown."""
    value = value_of(shown)
    if value is None or exact.free_symbols:
        return False
    if _same_expression(sympy.Rational(value.numerator, value.denominator), exact):
        return True
    if shown.places is None or shown.significant < 3:
        return False
    evaluated = exact.evalf(_DIGITS)
    if not evaluated.is_Float:
        return False
    half_unit = Fraction(1, 2 * 10**shown.places)
    return bool(
        abs(evaluated - sympy.Rational(value.numerator, value.denominator)) <= sympy.Rational(half_unit)
    )


def _renamings(a: sympy.Expr, b: sympy.Expr) -> list[sympy.Expr]:
    """`b`, with its free constants called as in `a` where the two differ in nothing but their names.

    A free constant is named C, c, K or k on one side, and the formula holds something besides it.
    """
    ours = sorted(a.free_symbols - b.free_symbols, key=str)
    theirs = sorted(b.free_symbols - a.free_symbols, key=str)
    if not ours or len(ours) != len(theirs) or len(ours) > 3:
        return [b]
    if not (a.free_symbols & b.free_symbols or a.has(sympy.pi)):
        return [b]
    renamed = []
    for order in itertools.permutations(theirs):
        if all(_may_rename(p.name, q.name) for p, q in zip(ours, order, strict=True)):
            renamed.append(b.xreplace(dict(zip(order, ours, strict=True))))
    return renamed or [b]


def _may_rename(a: str, b: str) -> bool:
    constant = _CONSTANT_NAMES.fullmatch(a) or _CONSTANT_NAMES.fullmatch(b)
    return bool(constant) and not any(_VARIABLE_NAMES.fullmatch(name) for name in (a, b))


def _same_expression(a: sympy.Expr, b: sympy.Expr) -> bool:
    names = sorted({s.name for s in a.free_symbols | b.free_symbols})
    if not names:
        a, b = a.doit(), b.doit()
        if a.is_Rational and b.is_Rational:
            return bool(a == b)
    checked = False
    for point in _points(names):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None:
            continue
        if not _close(x, y):
            return False
        extra = int(sympy.log(abs(x), 10)) if abs(x) > _LARGE else 0
        if extra > _MAX_EXTRA:
            raise Unsupported("values too large to compare exactly")
        if extra and not _close(_value(a, point, extra), _value(b, point, extra), extra):
            return False
        checked = True
    return checked or bool(sympy.simplify(a - b) == 0)


def _proportional(a: sympy.Expr, b: sympy.Expr) -> bool:
    """b = c a with one constant c at all test points."""
    names = sorted({s.name for s in a.free_symbols | b.free_symbols})
    values = [(_value(a, point), _value(b, point)) for point in _points(names)]
    finite = [(x, y) for x, y in values if x is not None and y is not None]
    if not finite or any(abs(x) <= _ZERO or abs(y) <= _ZERO for x, y in finite):
        return False
    return all(_close(x * finite[0][1], y * finite[0][0]) for x, y in finite)


def _points(names: list[str]) -> list[dict[sympy.Symbol, sympy.Rational]]:
    """Fixed points with both signs; symbols that usually count get whole numbers."""
    if not names:
        return [{}]
    return [
        {
            sympy.Symbol(name): sympy.Integer(whole + 2 * i)
            if _INTEGER_NAMES.fullmatch(name)
            else sympy.Rational(base) + i * sympy.Rational(step)
            for i, name in enumerate(names)
        }
        for whole, base, step in _POINTS
    ]


def _value(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational], extra: int = 0) -> Any:
    """The value to 60 + extra digits, or None where it is not a finite number."""
    value = expression.evalf(_DIGITS + extra, subs=point, maxn=_DIGITS + extra + 100)
    parts = value.as_real_imag()
    return value if all(part.is_number and part.is_finite for part in parts) else None


def _close(x: Any, y: Any, extra: int = 0) -> bool:
    """Equal to 50 + extra of the digits that were computed."""
    return bool(abs(x - y) <= sympy.Float(10) ** -(50 + extra) * max(abs(x), abs(y), _ZERO))
