"""An answer's text as a small tree: exact numbers, words, groups, and formulas at the leaves.

Regular expressions of linear cost and bounded nesting only: nothing here evaluates a text, so that hostile
ones (a hundred thousand digits, thousands of braces) cost milliseconds.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

_MAX_NUMBER = 1000  # digits, and size of an exponent, up to which a number becomes a Fraction
_MAX_DEPTH = 8  # nested brackets that are read as structure


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_VULGAR = re.compile(r"(?<=[0-9])([¼-¾⅐-⅞])")  # 3½ is 3 1/2
_SYMBOLS = str.maketrans({
    "⁄": "/", "−": "-", "×": r"\times ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "±": r"\pm ", "∓": r"\mp ",
    "∈": r"\in ", "·": r"\cdot ", "°": r"^\circ ", "、": ",", "，": ",", "。": ".", "“": "", "”": "",
})  # fmt: skip
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=[0-9])(?:,\s?\\!\s?|\s?\{\s?,\s?\}\s?(?:\\!)?|\\[,;:! ]|~)(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:displaystyle|limits|!)|[¥€£]", ""),
        (r"(?<!\\)\\(?:q?quad|[,;: ]|hspace\{[^{}]*\})|~|\s+", " "),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
        (r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{", r"\\text{"),
        (r"\\text\{\s*([ei])\s*\}(?=.)", r" \1 "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"(?:√|(?<![a-zA-Z])\\?sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
        (r"\\leq?(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
        (r"\\geq?(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\ne "),
        (r"~=|\\simeq(?![a-zA-Z])", r"\\approx "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<![a-zA-Z\\])(?:infinity|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
        (r"(?<=[0-9)}\] ])[和或及](?=[ 0-9({\\-])", ","),
        (r",(?:\s*,)+", ","),
        (r"\\text\{\s*(?:percent(?:age)?|pct)\s*\}|(?<![a-zA-Z])(?:percent(?:age)?|pct)(?![a-zA-Z])", "%"),
        (r"\s*\\?%", "%"),
        (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
    )
)
_HEADING = re.compile(r"[A-Za-z][A-Za-z ]{3,80}:\s*(?=[$\\])")


def _normalise(text: str) -> str:
    """The same notation for the same thing: Unicode, spacing, fonts, relations, percent, separators."""
    text = _HEADING.sub("", text.strip(), count=1)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = unicodedata.normalize("NFKC", _VULGAR.sub(r" \1", text)).translate(_SYMBOLS)
    if "\\begin" not in text:  # there a doubled backslash ends a row
        text = re.sub(r"\\\\(?=[a-zA-Z{}()\[\]])", r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip(" ,;").rstrip(" .,;")


class Num(NamedTuple):
    """An exact number as it is written; `10%` holds 10 and `percent`."""

    key: str  # equal numbers of ordinary size have equal keys ("3/2"), huge ones digits and exponent
    percent: bool
    places: int | None  # decimal places shown; None for integers and fractions, which are exact
    significant: int  # digits shown, leading zeros aside
    latex: str


PLAIN_NUMBER = re.compile(r"\$?(-?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.([0-9]*))?")
_WRITTEN = re.compile(
    r"(?P<sign>[+-]?)\s*(?:"
    r"(?:(?P<whole>[0-9]+)\s*)?\\frac\s*(?:\{\s*(?P<p>[+-]?[0-9]+)\s*\}|(?P<p1>[0-9]))\s*"
    r"(?:\{\s*(?P<q>[+-]?[0-9]+)\s*\}|(?P<q1>[0-9]))"
    r"|(?:(?P<whole2>[0-9]+) )?(?P<p2>[0-9]+)\s*/\s*(?:(?P<q2>[0-9]+)|\((?P<q3>[+-]?[0-9]+)\))"
    r"|(?P<integer>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)?"
    r"(?P<point>\.[0-9]*)?"
    r"(?:[eE](?P<e>[+-]?[0-9]+)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<e1>[+-]?[0-9]+)\s*\}|(?P<e2>[0-9])))?"
    r")"
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(rf"\s*(?:\\text\{{\s*)?({'|'.join(_MAGNITUDES)})(?![a-zA-Z])(?:\s*\}})?")
_SHORT_UNITS = (
    "mm|cm|dm|km|nm|mg|kg|gm|ml|mL|ft|in|yd|mi|oz|lb|lbs|hr|hrs|min|mins|sec|secs|yr|yrs|mph|kph|kmh|"
    "sq|cu|pts|rs|Rs|USD|RMB|CNY|EUR|dollars?|cents?|degrees?|units?"
)
_UNIT = re.compile(
    r"\s*(?:\^\{?\\circ\}?\s*[CF]?"
    r"|\\text\{[^{}]*\}"
    rf"|(?:{_SHORT_UNITS})(?![a-zA-Z])"
    r"|(?<= )[mgsL](?![a-zA-Z^*+(_-])"
    r"|(?:[cdkm]?m|in|ft|yd|mi)(?=\^\{?[23])"
    r"|(?<= )(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt)(?![a-zA-Z]))[a-zA-Z]{3,}(?:[ ./-][a-zA-Z]+)*"
    r"|[^\W\d_a-zA-Zα-ωΑ-Ω]{1,8}"
    r")(?:\s*/\s*[a-zA-Z]+)?(?:\^\{?[23]\}?)?"
)
_CLOCK = re.compile(r"[ap]\.?\s*m\b", re.IGNORECASE)


def _decimal(sign: str, integer: str, point: str, exponent: str, percent: bool, latex: str) -> Num:
    """A decimal literal; `point` holds the digits after it, "" where there is none."""
    digits = integer.replace(",", "").replace(" ", "") + point
    stripped = digits.lstrip("0")
    places = len(point) if point else None
    if not stripped:
        return Num("0", percent, places, 0, latex)
    sign = "-" if sign == "-" else ""
    if not point and not exponent:
        return Num(sign + stripped, percent, None, 0, latex)
    power = int(exponent or 0) if len(exponent) < 12 else 10**12
    if len(digits) <= _MAX_NUMBER and abs(power) <= _MAX_NUMBER:
        value = Fraction(int(sign + stripped)) * Fraction(10) ** (power - len(point))
        key = str(value)
    else:
        trimmed = stripped.rstrip("0")
        shift = len(stripped) - len(trimmed) - len(point)
        key = f"{sign}{trimmed}e{power + shift if power < 10**12 else exponent}"
    shown = None if places is None else max(places - power, 0)
    return Num(key, percent, shown, len(stripped), latex)


def _number(text: str) -> Num | None:
    """A number with an optional percent sign, magnitude word or unit, and nothing else."""
    if "分" in text or re.match(r"[负零〇一二两三四五六七八九十百千半]|-?[0-9.]+[十百千万亿]", text):
        return _chinese(text)
    found = _WRITTEN.match(text)
    if not found or not re.match(r"[+-]?\s*(?:\.?[0-9]|\\frac)", found.group()):
        return None
    rest = text[found.end() :]
    percent = rest.startswith("%")
    rest = rest[1:] if percent else rest
    exponent = found["e"] or found["e1"] or found["e2"] or ""
    word = _MAGNITUDE.match(rest)
    if word and not exponent:
        exponent, rest = str(_MAGNITUDES[word[1]]), rest[word.end() :]
    if rest.strip() and not _is_unit(rest):
        return None
    latex = found.group()
    q = found["q"] or found["q1"] or found["q2"] or found["q3"]
    if not q:
        point = (found["point"] or ".")[1:]
        return _decimal(found["sign"], found["integer"] or "", point, exponent, percent, latex)
    p = found["p"] or found["p1"] or found["p2"]
    whole = found["whole"] or found["whole2"] or "0"
    if max(len(p), len(q), len(whole)) > _MAX_NUMBER or int(q) == 0:
        return None
    value = int(whole) + Fraction(int(p), int(q))
    value = -value if found["sign"] == "-" else value
    return Num(str(value * 10 ** int(exponent or 0)), percent, None, 0, latex)


def _is_unit(rest: str) -> bool:
    found = _UNIT.fullmatch(rest.rstrip(" .")) or _UNIT.fullmatch(rest.rstrip())
    return bool(found) and not _CLOCK.search(rest)


_CN_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CN_POWERS = {"十": 1, "百": 2, "千": 3, "万": 4, "亿": 8}
_CN = r"(?:[零〇一二两三四五六七八九十百万亿点0-9.]|千(?![克米瓦卡]))+"
_CN_UNIT = re.compile(
    r"(?:平方|立方|[个只元角分秒时天日月年岁米克吨升度次人名位本页支张条块件辆棵头匹双套组种类"
    r"根粒杯瓶箱袋包盒台层间排行列题道倍千毫厘公里斤两小钟号级期周厅枚颗朵尺寸亩顷])*"
)
_CHINESE = re.compile(
    rf"(?P<sign>负|-)?(?:(?P<whole>{_CN})又)?(?P<a>{_CN})(?:分之(?P<b>{_CN}))?(?P<unit>[^\W\d_a-zA-Z]{{0,8}})"
)


def _chinese(text: str) -> Num | None:
    """三十五, 3.5万, 三分之一, 二又三分之一, 百分之二十, 一半; a unit may follow."""
    text = text.replace(" ", "")
    if re.fullmatch("一?半", text):
        return Num("1/2", False, None, 0, r"\frac{1}{2}")
    found = _CHINESE.fullmatch(text)
    if not found or len(text) > 60:
        return None
    if not text[0].isascii() and not _CN_UNIT.fullmatch(found["unit"]):  # 一样多 is no number
        return None
    a, b = _chinese_value(found["a"]), _chinese_value(found["b"] or "")
    whole = _chinese_value(found["whole"] or "零")
    if a is None or whole is None or (found["b"] and (b is None or a == 0)):
        return None
    percent = bool(found["b"]) and found["a"] in ("百", "100")
    value = a if b is None else (b if percent else whole + b / a)
    value = -value if found["sign"] else value
    return Num(str(value), percent, None, 0, rf"\frac{{{value.numerator}}}{{{value.denominator}}}")


def _chinese_value(text: str) -> Fraction | None:
    """A Chinese or mixed numeral without sign; None where it is none."""
    integer, _, point = text.partition("点")
    if not text or (point and any(c not in _CN_DIGITS for c in point)):
        return None
    digits = "".join(str(_CN_DIGITS[c]) for c in point)
    tail = Fraction(int(digits), 10 ** len(digits)) if digits else Fraction(0)
    if len(integer) > 1 and all(c in _CN_DIGITS for c in integer):
        return Fraction(int("".join(str(_CN_DIGITS[c]) for c in integer))) + tail
    total = section = Fraction(0)
    current: Fraction | None = None
    for token in re.findall(r"[0-9]+(?:\.[0-9]+)?|.", integer):
        if token in _CN_DIGITS:
            current = Fraction(_CN_DIGITS[token])
        elif token in _CN_POWERS and _CN_POWERS[token] < 4:
            section += (Fraction(1) if current is None else current) * 10 ** _CN_POWERS[token]
            current = None
        elif token in _CN_POWERS:
            total = (total + section + (current or 0) or Fraction(1)) * 10 ** _CN_POWERS[token]
            section, current = Fraction(0), None
        elif token[0].isdigit():
            current = Fraction(token)
        else:
            return None
    return total + section + (current or 0) + tail


class Word(NamedTuple):
    key: str
    latex: str


class Formula(NamedTuple):
    """What only algebra can compare."""

    key: str
    latex: str


class Group(NamedTuple):
    """`kind`: the brackets ("(]", "{}"), "," a bare list, "U" a union, "M" a matrix, "R" its rows."""

    kind: str
    items: tuple["Node", ...]
    key: str
    latex: str


class Named(NamedTuple):
    """`x = node`, `x \\in node`, `0 < x < 1`, or an option: `(B) node`, whose name is "(B)"."""

    name: str
    node: "Node"
    key: str
    latex: str


Node: TypeAlias = Num | Word | Formula | Group | Named

_TOKEN = re.compile(r"\\(?:cup|le|ge|in|approx|begin|end)(?![a-zA-Z])|\\.|[()\[\]{},;=<>]", re.DOTALL)
_SEPARATORS = {*",;=<>", "\\cup", "\\le", "\\ge", "\\in", "\\approx"}
_OPEN, _CLOSE = {"(", "[", "{", "\\{", "\\begin"}, {")", "]", "}", "\\}", "\\end"}
_ATOM = r"(?:\\?[a-zA-Z]+'*|\\text\{[^{}]*\})(?:_(?:\{[^{}]*\}|\w))?(?:\([^()]*\))?"
_NAME = re.compile(
    rf"(?:\|?{_ATOM}\|?(?:\s*:\s*{_ATOM})?|\\frac\{{{_ATOM}\}}\{{{_ATOM}\}}|\(\s*{_ATOM}(?:\s*,\s*{_ATOM})*\s*\)"
    rf"|\\(?:angle|triangle|overline|vec|widehat)\s*(?:{_ATOM}|\{{{_ATOM}\}}))"
)
_MATRIX = re.compile(
    r"(?P<outer>[(\[]?)\s*\\begin\{(?P<env>[pb]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?"
    r"(?P<body>(?:(?!\\begin|\\end).)*)\\end\{(?P=env)\}\s*[)\]]?",
    re.DOTALL,
)
_OPTION = re.compile(r"(?:\\text\{)?\(?([A-J])(?:\)\}?\s*|[.:]\}?\s+)(?=[^\s,;=])")
_DOMAIN_CLAUSE = re.compile(r"(?:where|for|with)?\s*[a-zA-Z]\s*\\in\s*\\(?:text|mathbb)\s*\{?[ZN]\}?(?:\^.)?")
_FUNCTION_WORDS = re.compile(r"\b(?:sqrt|sinh|cosh|tanh|arcsin|arccos|arctan)\b")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|[^\W\d_a-zA-Zα-ωΑ-Ω]")
_CLOCK_OR_BASE = re.compile(
    r"[0-9]+:[0-9].*|[0-9:]+\s*[apAP]\.?\s*[mM]\.?|[0-9A-F]+_\{?[0-9a-z]+\}?", re.DOTALL
)
_FORMULA_UNIT = re.compile(
    rf"\s*(?:\\text\{{(?:\s[^{{}}]*|[^{{}}]{{2,}})\}}|(?<=[\s}})])(?:{_SHORT_UNITS}))(?:\^\{{?[23]\}}?)?$"
)
_INFINITY = Formula(r"\infty", r"\infty")
_MINUS_INFINITY = Formula(r"-\infty", r"-\infty")


def read(text: str, join: bool = True) -> Node:
    """The tree of an answer; with `join` off, 100,200 is a list of two numbers."""
    plain = PLAIN_NUMBER.fullmatch(text) if join else None
    if plain:
        return _decimal(plain[1], plain[2], plain[3] or "", "", False, text)
    text = _normalise(text)
    option = _OPTION.match(text)
    if not option:
        return _tree(text, 0, join)
    node = _tree(text[option.end() :], 0, join)
    return Named(f"({option[1]})", node, f"({option[1]}){node_key(node)}", text)


def _tree(text: str, depth: int, join: bool) -> Node:
    text = text.strip()
    if text.endswith(".") or (text.startswith("\\text{") and text.count("{") == 1 and text.endswith("}")):
        text = text.removesuffix(".").removeprefix("\\text{").removesuffix("}").strip()
    number = _number(text) if join or "," not in text else None
    if number:
        return number
    if depth > _MAX_DEPTH:
        return Formula(_squeezed(text), text)
    tokens = _top_level(text)
    for reader in (_matrix, _list, _relation, _union, _bracketed):
        node = reader(text, tokens, depth, join)
        if node:
            return node
    return _leaf(text)


_Tokens: TypeAlias = list[tuple[int, int, str]]


def _top_level(text: str) -> _Tokens:
    """Separators and relations outside all brackets: (start, end, token); none if brackets do not match."""
    depth, tokens = 0, []
    for found in _TOKEN.finditer(text):
        token = found.group()
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
            if depth < 0:
                return []
        elif depth == 0 and token in _SEPARATORS:
            tokens.append((found.start(), found.end(), token))
    return tokens if depth == 0 else []


def _pieces(text: str, tokens: _Tokens) -> list[str]:
    bounds = [0] + [bound for start, end, _ in tokens for bound in (start, end)] + [len(text)]
    return [text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]


def _matrix(text: str, _: _Tokens, depth: int, join: bool) -> Node | None:
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found["body"]) if row.strip()]
    cells = [[_tree(cell, depth + 1, join) for cell in row.split("&")] for row in rows]
    return _group("M", [_group("R", row, "") for row in cells], text)


def _list(text: str, tokens: _Tokens, depth: int, join: bool) -> Node | None:
    for separator in ";,":
        cuts = [t for t in tokens if t[2] == separator]
        if cuts:
            break
    else:
        plus_minus = depth == 0 and "\\pm" in text
        return _group(",", _items([text], depth, join), text) if plus_minus else None
    parts = [p for p in _pieces(text, cuts) if p]
    kept = [p for p in parts if not _DOMAIN_CLAUSE.fullmatch(p)] or parts
    nodes = _items(kept, depth, join)
    if len(nodes) == 1:
        return nodes[0]
    if isinstance(nodes[0], Named) and not any(isinstance(n, Named) for n in nodes[1:]):
        nodes[0] = nodes[0].node  # n = 1, 2, 3
    if depth:  # p = 5, q = 2; p = 7, q = 2
        return _group("()", [n.node if isinstance(n, Named) else n for n in nodes], text)
    return _group(",", nodes, text)


def _items(parts: Sequence[str], depth: int, join: bool) -> list[Node]:
    """Each part read; a plus-minus sign stands for two parts."""
    texts: list[str] = []
    for part in parts:
        if "\\pm" in part:
            texts.append(part.replace("\\pm", "+").replace("\\mp", "-"))
            texts.append(part.replace("\\pm", "-").replace("\\mp", "+"))
        else:
            texts.append(part)
    return [_tree(text, depth + 1, join) for text in texts]


def _relation(text: str, tokens: _Tokens, depth: int, join: bool) -> Node | None:
    about = [t for t in tokens if t[2] == "\\approx"]
    if about:  # x = 1/3 \approx 0.33: the exact side; x \approx 11: the only one
        left, right = text[: about[0][0]].strip(), text[about[0][1] :].strip()
        return _tree(right if _NAME.fullmatch(left) else left, depth + 1, join)
    kinds = [t[2] for t in tokens]
    parts = _pieces(text, tokens)
    if kinds and set(kinds) == {"="}:
        if _NAME.fullmatch(parts[0]) and not re.fullmatch("[a-z]{2}", parts[0]):
            return _named(parts[0], _tree(parts[-1], depth + 1, join), text)
        if len(parts) > 2 or not re.search("[a-zA-Z]", text):
            return _tree(parts[-1], depth + 1, join)
    if kinds == ["\\in"] and _NAME.fullmatch(parts[0]):
        return _named(parts[0], _tree(parts[1], depth + 1, join), text)
    if kinds and (set(kinds) <= {"<", "\\le"} or set(kinds) <= {">", "\\ge"}):
        return _inequality(parts, kinds, depth, join, text)
    return None


def _inequality(parts: list[str], kinds: list[str], depth: int, join: bool, text: str) -> Node | None:
    """`a < x \\le b` and `x > a` as the interval that x lies in."""
    if kinds[0] in (">", "\\ge"):
        parts, kinds = parts[::-1], [{">": "<", "\\ge": "\\le"}[k] for k in kinds[::-1]]
    names = [bool(_NAME.fullmatch(part)) for part in parts]
    opening = "(" if kinds[0] == "<" else "["
    closing = ")" if kinds[-1] == "<" else "]"
    low: Node = _MINUS_INFINITY
    high: Node = _INFINITY
    if len(parts) == 3 and names[1]:
        name, low, high = parts[1], _tree(parts[0], depth + 1, join), _tree(parts[2], depth + 1, join)
    elif names == [True, False]:
        name, opening, high = parts[0], "(", _tree(parts[1], depth + 1, join)
    elif names == [False, True]:
        name, closing, low = parts[1], ")", _tree(parts[0], depth + 1, join)
    else:
        return None
    return _named(name, _group(opening + closing, [low, high], text), text)


def _union(text: str, tokens: _Tokens, depth: int, join: bool) -> Node | None:
    cuts = [t for t in tokens if t[2] == "\\cup"]
    return _group("U", _items(_pieces(text, cuts), depth, join), text) if cuts else None


def _bracketed(text: str, _: _Tokens, depth: int, join: bool) -> Node | None:
    """(a, b), [a, b), {a, b}; brackets around one thing are dropped, except a set's."""
    found = re.match(r"\\\{|[(\[{]", text)
    closing = re.search(r"\\\}$|[)\]}]$", text)
    if not found or not closing:
        return None
    kind = found.group()[-1] + closing.group()[-1]
    if kind not in ("()", "(]", "[)", "[]", "{}"):
        return None
    inner = text[found.end() : closing.start()]
    if not _balanced(inner):
        return None
    tokens = _top_level(inner)
    cuts = [t for t in tokens if t[2] == ";"] or [t for t in tokens if t[2] == ","]
    if not cuts:
        if kind in ("()", "[]") or (kind == "{}" and found.group() == "{" and "\\pm" not in inner):
            return _tree(inner, depth + 1, join)
        return _group("{}", _items([inner], depth, join), text) if kind == "{}" else None
    parts = _pieces(inner, cuts)
    if kind == "{}":
        return _group("{}", _items([p for p in parts if p], depth, join), text)
    return _group(kind, [_tree(part, depth + 1, join) for part in parts], text)


def _balanced(text: str) -> bool:
    """Every bracket closes, and none closes what opened before `text`."""
    depth = 0
    for found in _TOKEN.finditer(text):
        depth += (found.group() in _OPEN) - (found.group() in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _leaf(text: str) -> Node:
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip() if "\\text" in text else text
    worded = bare != text and re.fullmatch(r"[\w\s.,:()'-]+", bare)
    prose = _PROSE.search(_FUNCTION_WORDS.sub("", bare)) and "\\" not in bare
    clock_or_base = _CLOCK_OR_BASE.fullmatch(bare)
    letter = re.fullmatch(r"\(?([a-zA-Z])\)?", bare)
    if letter:
        return (Formula if letter[1] in "ei" else Word)(letter[1], letter[1])
    if worded or prose or clock_or_base:
        return Word(re.sub(r"[\s.{}]", "", bare).casefold(), text)
    text = _FORMULA_UNIT.sub("", text) or text
    return Formula(_squeezed(text), text)


def _squeezed(text: str) -> str:
    return re.sub(r"(?<![a-zA-Z])\s+|\s+(?![a-zA-Z])", "", text)


def _group(kind: str, items: Sequence[Node], latex: str) -> Group:
    if kind == "{}" or (kind == "," and all(isinstance(item, Group) for item in items)):
        items = list({node_key(item): item for item in items}.values())
    keys = [node_key(item) for item in items]
    if kind in (",", "{}", "U"):
        keys.sort()
    brackets = {",": "{}", "U": "∪∪", "M": "[]", "R": "[]"}.get(kind, kind)
    return Group(kind, tuple(items), brackets[0] + "; ".join(keys) + brackets[1], latex)


def _named(name: str, node: Node, latex: str) -> Named:
    name = re.sub(r"[\s{}]", "", name)
    return Named(name, node, f"{name} = {node_key(node)}", latex)


def node_key(node: Node) -> str:
    """Equal keys: the same answer, read without algebra."""
    return node.key + "%" if isinstance(node, Num) and node.percent else node.key


def value_of(number: Num) -> Fraction | None:
    """Exact value, percent sign disregarded; None for numbers too large to hold."""
    if len(number.key) > _MAX_NUMBER * 2 + 10 or "e" in number.key:
        return None
    return Fraction(number.key)
