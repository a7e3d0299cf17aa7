r"""Whether two answers of mathematics, physics or chemistry are equal.

    1. the same text, apart from spaces and LaTeX's spacing and font commands
    2. numbers: exactly, or to 6 digits if one is a decimal; units that both have must be the same
    3. residues (6 mod 7), numerals with a base, and clock times
    4. words, names and formulas (NaCl, x_1): only the same text, see 1
    5. all else is mathematics: math-verify compares the expressions symbolically

math-verify alone would read `listen` as a product of letters, equal to `silent`, and round numbers to 6 places.
"""

from __future__ import annotations

import logging
import re
from cmath import isfinite
from fractions import Fraction

import math_verify
from math_verify import LatexExtractionConfig, grader
from sympy import Basic, Float, MatrixBase, Mul, Rational, UnevaluatedExpr

DECIMALS = Fraction(2, 10**6)  # relative tolerance if one of two numbers is a decimal: 0.333333 is 1/3
CLOSED_FORMS = Fraction(1, 10**12)  # relative tolerance of two expressions without decimals
NESTING_LIMIT = 30  # of brackets and exponents; math-verify's parser takes seconds for a hundred and minutes for more
EXPONENT_LIMIT = 400  # of a number in scientific notation; larger ones are compared as text

# math-verify's own time-outs use signals, which fail outside the main thread. They are off, because the pool has a
# time-out, and so is the library's warning that they are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Signs that models write in place of ASCII's and LaTeX's: those of Chinese texts, dashes, and mathematics in Unicode.
_SIGNS = str.maketrans("，、。．；：（）［］｛｝＋－＝＜＞／％−–", ",,..;:()[]{}+-=<>/%--") | {ord("∞"): r"\infty "}
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile("[⁻⁰¹²³⁴-⁹]+")
_EXPONENTIAL = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_GROUPS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")  # 1 000
_ROW = re.compile(r"\d[\d.]*(?: \d[\d.]*)+")  # 2 3 is no product
_INEQUALITY = re.compile(r"[<>≤≥]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![A-Za-z])")
_RANGE = re.compile(rf"{_INEQUALITY.pattern}|[(\[]|\\emptyset")
_EMPTY = re.compile(r"\\varnothing(?![A-Za-z])|∅|(?:\\left)?\\\{(?:\s|\\[,;:! ])*(?:\\right)?\\\}")
_REPEATING = re.compile(r"(\d{1,3}(?:,\d{3})+|\d*)\.(\d*) ?\\(?:overline|bar) ?\{ ?(\d+) ?\}(?!\d)")
_ROOT = re.compile(r"√ ?(\d+|[a-z])")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|[,!;: ])|~|\$")
_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|\bdegrees?\b|°)\s*")
_PERCENT = re.compile(r"\s*(?:\bpercent\b|\\?%)")
_DIGITS_IN_TEXT = re.compile(r"\\(?:text|mathrm)[a-z]*\s*\{([^{}]*\d[^{}]*)\}")
_FRACTION = re.compile(r"([+-]?)\\[dtc]?frac\{?(\d+)\}?\{?(\d+)\}?")
_MIXED = re.compile(
    r"([+-]?)(\d+)(?: (\d+) ?/ ?(\d+)| ?\\[dtc]?frac ?(?:\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(\d) ?(\d)))(?! ?[\d./])"
)
_NUMBER = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)(?:\s*(?:[eE]|(?:\\times|\\cdot|\*|×)\s*10\s*(?:\^|\*\*))\s*\{?\s*"
    r"([+-]?\d{1,4})(?:\s*\})?)?"
)
# A unit: words with exponents, as in kg m^2/s^2. A word of one or two letters must be a unit that we know, because it
# may also be a variable (2 x), and some longer ones are mathematics or go on to another answer.
_SHORT = r"[yzafpnµμumcdhkMGTPEZ]?(?:[mgsAKNJWVCFHTLlMΩÅ]|\\Omega|Pa|Hz|eV)|[hd]|\\mu ?m|cd|ft|in|lb|oz|hr|mi|yd|dB|sq"
_NO_UNIT = "or|and|to|not|but|by|then|plus|minus|times|over|choose|mod|sqrt|sin|cos|tan|cot|sec|csc|log|exp"
_NO_UNIT += "|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|nu|xi|rho|sigma|tau|phi|chi|psi|omega|pi"
_WORD = rf"(?:° ?[CFK]?|(?:{_SHORT})(?![A-Za-z])|(?!(?:{_NO_UNIT})(?![A-Za-z]))[A-Za-zµΩÅ]{{3,}})"
_POWER = r"(?: ?\^ ?\{? ?-?\d ?\}?|-?\d)?"
_SCALE = (
    r"(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|squared|cubed|factorial"
    r"|(?:ten|hundred|thousand)ths?)(?![A-Za-z])"
)
_UNIT = re.compile(
    rf"\s*(?!{_SCALE})(?:\\%|\(?{_WORD}{_POWER}(?: ?(?:[/*·.( -]|\\cdot(?![A-Za-z])) ?\(?{_WORD}{_POWER}\)?)*\)?)?"
)
_GOES_ON = re.compile(rf"(?<![A-Za-z])(?:or|and|not)(?![A-Za-z])|\d ?{_SCALE}")
# What is counted may have any name (5 apples), but these words take a number back, or make another one of it.
_REMARKS = {"false", "wrong", "incorrect", "impossible", "unknown", "perhaps", "maybe", "possibly", "probably"}
_REMARKS |= {"halves", "thirds", "quarters", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths"}
_RESIDUE = re.compile(
    r"(?:(\\?[A-Za-z]\w*)? ?(?:=|≡|\\equiv) ?)?([+-]? ?\d+) ?\(? ?\\?[bp]?mod(?:ulo)? ?\{? ?([1-9]\d*) ?\}? ?\)?"
)
_BASED = re.compile(r"([0-9A-Fa-f]+)_\{?(\d+)\}?")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2}(?::\d{2})?)\s*([aApP])?\.?\s*(?:[mM]\.?)?")
_FORMULA = re.compile(r"\(?[A-Za-z]{1,2}\)?(?:_?\d+|_[A-Za-z])?(?:[A-Z(][a-z]?\)?(?:_?\d+)?)*(?:\^?\d*[+-])?")
_OPERATOR = re.compile(r"[-+*/^=<>\\]|\d")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan", "sinh"}
_FUNCTIONS |= {"cosh", "tanh", "max", "min", "mod", "gcd", "lcm", "and", "infty", "inf", "det", "lim", "deg", "frac"}
_LITTLE = {"A", "An", "At", "By", "In", "Is", "It", "No", "On", "a", "an", "as", "at", "be", "by", "in", "is", "it"}
_LITTLE |= {"no", "of", "on", "or", "to"}
_LONG = 5  # letters; a run of so many inside an expression is a name and no product


def equal(expected: str, given: str) -> bool:
    """Whether `given` is the answer `expected`. The answers are parsed as LaTeX and never evaluated as code."""
    expected, given = _in_latex(expected), _in_latex(given)
    ours, theirs = _plain(expected), _plain(given)
    if _squeezed(ours) == _squeezed(theirs):
        return True
    for compare in (_equal_residues, _equal_numbers, _equal_numerals, _equal_times, _equal_words):
        verdict = compare(ours, theirs)
        if verdict is not None:
            return verdict
    # math-verify reads a row of numbers as their product or sum, and takes the ends of an interval for the interval.
    if _ROW.fullmatch(ours) or _ROW.fullmatch(theirs) or (_INEQUALITY.search(ours) and not _RANGE.search(theirs)):
        return False
    return _equal_expressions(expected, given)


def _in_latex(text: str) -> str:
    raised = _RAISED.sub(lambda found: f"^{{{found[0].translate(_POWERS)}}}", text.translate(_SIGNS))
    raised = _REPEATING.sub(_as_fraction, _EMPTY.sub(r"\\emptyset ", raised))
    return _EXPONENTIAL.sub(r"\1\\times 10^{\2}", _ROOT.sub(r"\\sqrt{\1}", raised))


def _as_fraction(found: re.Match[str]) -> str:
    r"""A repeating decimal: 0.1\overline{6} is (16 - 1)/90."""
    before = found[1].replace(",", "") + found[2]
    above = int(before + found[3]) - int(before or "0")
    return rf"\frac{{{above}}}{{{(10 ** len(found[3]) - 1) * 10 ** len(found[2])}}}"


def _plain(text: str) -> str:
    text = _SPACING.sub(" ", text.strip()).strip()
    while (unwrapped := _FONT.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = _PERCENT.sub(r"\\%", _DEGREES.sub(" ° ", text)).removeprefix(r"\approx")
    return _GROUPS.sub("", " ".join(text.split())).removesuffix(".").strip()


def _squeezed(text: str) -> str:
    """Without spaces next to anything but two letters or two digits (1 1/2 is not 11/2, but 1 000 is 1000), and without
    braces around single characters."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\0", text)
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+(?![A-Za-z])|(?<![A-Za-z])\s+", "", text))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _equal_numbers(ours: str, theirs: str) -> bool | None:
    """None unless both are numbers, with or without a unit, or one is and the other goes on: 5 is not "5 or 6"."""
    first, second = _number(ours), _number(theirs)
    if first is None or second is None:
        return False if (first or second) and _GOES_ON.search(theirs if first else ours) else None
    if first[1] and second[1] and first[1] != second[1]:
        return False
    if not first[1] and not _REMARKS.isdisjoint(re.findall("[a-z]+", second[1].lower())):
        return False
    tolerance = DECIMALS if first[2] or second[2] else Fraction(0)
    if (first[1] == "%") != (second[1] == "%"):  # 50% may be meant as 50 or as 0.5
        percent, other = (first[0], second[0]) if first[1] == "%" else (second[0], first[0])
        return _close(percent, other, tolerance) or _close(percent / 100, other, tolerance)
    return _close(first[0], second[0], tolerance)


def _number(text: str) -> tuple[Fraction, str, bool] | None:
    """(value, unit, whether it is a decimal)."""
    mixed, fraction = _MIXED.match(text), _FRACTION.match(text)
    if mixed and (parts := _mixed(mixed)):
        value, decimal, end = parts, False, mixed.end()
    elif fraction and int(fraction[3]):
        value, decimal, end = Fraction(int(fraction[1] + fraction[2]), int(fraction[3])), False, fraction.end()
    else:
        found = _NUMBER.match(text)
        if found is None or not re.search(r"\d", found[1] or ""):
            return None
        power = int(found[2] or 0)
        if abs(power) > EXPONENT_LIMIT:
            return None
        value, decimal = Fraction(found[1].replace(",", "")) * Fraction(10) ** power, "." in found[1] or power != 0
        end = found.end()
        over = re.match(r"\s*/\s*(\d+)(?![\d.])", text[end:])
        if over and int(over[1]):
            value, end = value / int(over[1]), end + over.end()
    unit = text[end:]
    # 2x is no number with a unit: a unit follows a space, or is more than a letter.
    if unit and (not _UNIT.fullmatch(unit) or not (unit[0] == " " or "%" in unit)):
        return None
    return value, _squeezed(unit.replace("^", "").replace("{", "").replace("}", "").replace("\\", "")).strip(), decimal


def _mixed(found: re.Match[str]) -> Fraction | None:
    """The value of 1 1/2; None if its fraction is not below 1, so that it may be a product."""
    above, below = (int(part) for part in found.groups()[2:] if part is not None)
    value = int(found[2]) + Fraction(above, below) if above < below else None
    return -value if value and found[1] == "-" else value


def _close(first: Fraction, second: Fraction, tolerance: Fraction) -> bool:
    return abs(first - second) <= tolerance * max(abs(first), abs(second))


# ---- numerals, times, words ------------------------------------------------------------------------------------------


def _equal_residues(ours: str, theirs: str) -> bool | None:
    """None unless both are residues, or one is and the other an integer, which leaves its modulus out. -1 mod 7 is
    6 mod 7, but 13 mod 7 is not: it may be the question."""
    first, second = (_RESIDUE.fullmatch(text) for text in (ours, theirs))
    if first and second:
        a, b, modulus = (int(text.replace(" ", "")) for text in (first[2], second[2], first[3]))
        named = not first[1] or not second[1] or first[1] == second[1]
        same = a == b or ((a - b) % modulus == 0 and max(abs(a), abs(b)) < modulus)
        return named and same and modulus == int(second[3])
    residue, other = (first, theirs) if first else (second, ours)
    if residue is None or not re.fullmatch(r"[+-]? ?\d+", other):
        return None
    return int(residue[2].replace(" ", "")) == int(other.replace(" ", ""))


def _equal_numerals(ours: str, theirs: str) -> bool | None:
    """With a base on both sides the values count, with one on one side the digits; None if no side has one."""
    first, second = (_BASED.fullmatch(text.replace(" ", "")) for text in (ours, theirs))
    if (first is None and second is None) or not all(_digits(one) for one in (first, second)):
        return None
    if first and second:
        return int(first[1], int(first[2])) == int(second[1], int(second[2]))
    digits = [found[1] if found else text.replace(" ", "") for found, text in ((first, ours), (second, theirs))]
    return digits[0].upper() == digits[1].upper()


def _digits(found: re.Match[str] | None) -> bool:
    """Whether its digits exist in its base."""
    return found is None or (2 <= int(found[2]) <= 36 and all(int(digit, 36) < int(found[2]) for digit in found[1]))


def _equal_times(ours: str, theirs: str) -> bool | None:
    first, second = (_CLOCK.fullmatch(text) for text in (ours, theirs))
    if first is None and second is None:
        return None
    if first is None or second is None:
        return False
    same = (int(first[1]), first[2]) == (int(second[1]), second[2])
    halves = {(found[3] or "").lower() for found in (first, second)}
    return same and len(halves - {""}) < 2


def _equal_words(ours: str, theirs: str) -> bool | None:
    """None unless one side is a text, a name or a formula: only the same text is equal to it. Whether a word begins
    with a capital does not matter; inside a formula it does (CO, Co)."""
    if not _is_text(ours) and not _is_text(theirs):
        return None
    words = re.findall(r"[^\W\d_]+", f"{ours} {theirs}")
    if all(_is_word(word) for word in words):
        ours, theirs = ours.casefold(), theirs.casefold()
    return _squeezed(ours) == _squeezed(theirs)


def _is_word(word: str) -> bool:
    """Whether it is a word of a language and no formula: No or Nothing, but not Co, CO or NaCl."""
    if len(word) < 3:
        return word in _LITTLE
    return word[1:].islower() or (len(word) > 3 and word.isupper())


def _is_text(text: str) -> bool:
    bare = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    runs = [run for run in re.findall(r"[A-Za-z]+", bare) if run.lower() not in _FUNCTIONS]
    longest = max(map(len, runs), default=0)
    if longest >= _LONG:
        return True
    if "\\" not in text and _FORMULA.fullmatch(text.replace("{", "").replace("}", "").replace(" ", "")):
        letters = re.sub(r"[^A-Za-z]", "", text)
        return (len(letters) > 1 and letters != letters.lower()) or bool(re.match(r"[A-Za-z]+_?\d", text))
    return longest > 2 and not _OPERATOR.search(text)


# ---- mathematics -----------------------------------------------------------------------------------------------------


def _equal_expressions(expected: str, given: str) -> bool:
    if _nesting(given) > NESTING_LIMIT:
        return False
    gold, parsed = _parse(expected), _parse(given)
    if not gold or not parsed:
        return False
    return bool(math_verify.verify(gold, parsed, timeout_seconds=None))


def _parse(content: str) -> list:
    content = _DIGITS_IN_TEXT.sub(r" \1 ", content)  # math-verify leaves texts out, so 5\text{ 6} would be 5
    latex = f"\\boxed{{{content.strip(' $')}}}"
    return math_verify.parse(f"${latex}$", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


def _nesting(text: str) -> int:
    """How deeply brackets are nested at most, or how many exponents there are that need no brackets: x^x^x."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return max(deepest, len(re.findall(r"\^\s*[^\s{]\s*(?=\^)", text)))


def _relatively_equal(first: Basic, second: Basic, float_rounding: int, numeric_precision: int) -> bool:
    """In place of math-verify's comparison of numbers, which rounds to decimal places and takes 1e-19 for 0."""
    if isinstance(first, MatrixBase) and isinstance(second, MatrixBase):
        pairs = zip(first.flat(), second.flat(), strict=True) if first.shape == second.shape else [(0, 1)]
        return all(_relatively_equal(a, b, float_rounding, numeric_precision) for a, b in pairs)
    return any(_close_values(a, b) for a in _readings(first) for b in _readings(second))


def _readings(value: Basic) -> list[Basic]:
    """A percentage may be meant as it is or as its number; anything else is itself."""
    percent = UnevaluatedExpr(Rational(1, 100))
    if isinstance(value, Mul) and len(value.args) == 2 and value.args[1] == percent:
        return [value.doit(), value.args[0]]
    return [value.doit() if hasattr(value, "doit") else value]


def _close_values(first: Basic, second: Basic) -> bool:
    if first == second:
        return True
    if isinstance(first, Rational) and isinstance(second, Rational):
        return False
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return False
    tolerance = DECIMALS if first.has(Float) or second.has(Float) else CLOSED_FORMS
    a, b = complex(first.evalf(30)), complex(second.evalf(30))
    return isfinite(a) and isfinite(b) and abs(a - b) <= float(tolerance) * max(abs(a), abs(b))


grader.sympy_numeric_eq = _relatively_equal
