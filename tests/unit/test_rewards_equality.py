r"""Pairs of answers over mathematics, physics, chemistry, intervals, units and words: right ones and wrong ones."""

from __future__ import annotations

import time

import pytest

from megatron_srpo.core.errors import UserError
from megatron_srpo.rewards.answers import math_reference, mcq_reference
from megatron_srpo.rewards.equality import equal

RIGHT = {
    "numbers": r"""
        42 | 42 || 42 | 42.0 || 42 | +42 || -7 | -7 || -7 | - 7 || 1,000 | 1000 || 1,234,567 | 1234567 || 0.5 | .5
        0.5 | 1/2 || 0.5 | \frac{1}{2} || \frac12 | 0.5 || \dfrac{3}{4} | 0.75 || 1/3 | 0.333333 || 2/4 | 1/2
        \frac{22}{7} | 3.142857 || -\frac{1}{2} | -0.5 || 007 | 7 || 0 | 0.0 || 100 | 1e2 || 2.50 | 2.5
        \sqrt{2} | 1.41421356 || \pi | 3.14159265 || \sqrt{12} | 2\sqrt{3} || 2^{10} | 1024 || 10^5 | 100000
        \frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} || 50\% | 50 || 50\% | 0.5 || 1\frac{1}{2} | 1.5 || 3! | 6
        \frac{\pi}{2} | \pi/2 || e^{2} | e^2 || \ln(4) | 2\ln 2 || 5. | 5 || $7$ | 7 || \left(7\right) | 7""",
    "physics": r"""
        6.63\times 10^{-34} | 6.63e-34 || 6.63 \times 10^{-34} | 6.63\times10^{-34} || 1.6e-19 | 1.6E-19
        3\times10^8 | 300000000 || 3\times 10^{8} | 3e8 || 9.81 | 9.810 || 1.6\cdot10^{-19} | 1.6e-19
        6.022*10^23 | 6.022\times 10^{23} || 0.00012 | 1.2e-4 || 9.8\text{ m/s}^2 | 9.8 || 9.8 m/s^2 | 9.8 m/s^{2}
        5\text{ m} | 5 m || 5\,\mathrm{m} | 5\text{ m} || 12\text{ cm} | 12 || 12 | 12\text{ cm}
        10\ \text{N} | 10 N
        \frac{1}{2}mv^2 | \frac{mv^2}{2} || mgh | mgh || F=ma | F = ma || v = 5 | 5 || \sqrt{2gh} | (2gh)^{1/2}
        1.60\times10^{-19}\text{ C} | 1.6e-19 C || 25 ^\circ | 25^\circ || \frac{GM}{r^2} | GM/r^2
        2\pi r | 2 \pi r""",
    "chemistry": r"""
        NaCl | NaCl || \text{NaCl} | NaCl || \mathrm{H_2O} | H_2O || H_2O | H_{2}O || H_2O | H_2 O
        CO_2 | \mathrm{CO}_2
        C_6H_{12}O_6 | C_{6}H_{12}O_6 || Fe | Fe || \text{Ca(OH)}_2 | Ca(OH)_2 || 18.02\text{ g/mol} | 18.02 g/mol
        7.4 | 7.40 || 2\text{ mol} | 2 mol || sodium chloride | Sodium chloride || benzene | Benzene || pH | pH""",
    "intervals and sets": r"""
        x=50\% | 50 || x=50\% | 0.5 || \{50\%,1\} | \{50,1\}
        (1,2] | (1,2] || [0,1) | [0, 1) || (-\infty, 3) | (-\infty,3) || \{1, 2\} | \{2,1\} || (1,2) | (1, 2)
        [0.5,1] | [\frac{1}{2}, 1] || (0,1)\cup(2,3) | (0,1) \cup (2,3) || x>2 | 2<x || x > 2 | x>2
        (3,4) | \left(3,4\right)
        x \geq 1 | x\ge 1 || (0.333333, 1) | (1/3, 1) || \{1,2,3\} | \{3,2,1\}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}""",
    "expressions": r"""
        x+1 | 1+x || 2x+2 | 2(x+1) || x^2-1 | (x-1)(x+1) || ab | ba || 2xa | 2ax || \sin x | \sin(x) || x_1 | x_1
        \frac{x}{2} | 0.5x || a+b | b+a || x=5 | 5 || x | x || 3x^2 | 3 x^2 || (x+1)^2 | x^2+2x+1""",
    "words": r"""
        Paris | Paris || Paris | paris || \text{Paris} | Paris || True | true || yes | Yes || increases | Increases
        the cat | the cat || New York | New  York || A | A || \textbf{B} | B || even | \text{even}
        DECREASES | decreases""",
    "bases and times": r"""
        1011_2 | 1011_{2} || 1011_2 | 11_{10} || FF_{16} | ff_{16} || FF_{16} | ff || 1011_2 | 1011
        12:30 | 12:30 || 09:05 | 9:05
        3:45 pm | 3:45 PM || 3:45 | 3:45 pm || 12:30:15 | 12:30:15 || 1:2 | 2:4 || 3:4 | 3:4""",
    "as models write them": r"""
        90 | 90° || 90 | 90^{\circ} || 90^\circ | 90\text{ degrees} || 25 | 25°C || 12\% | 12 percent || 3/4 | 75\%
        1 1/2 | 3/2 || 1 1/2 | 1\frac{1}{2} || -1\frac12 | -1.5 || 1500 | 1\,500 || 1{,}500 | 1500 || 6 | \approx 6
        (1,2) | （1，2） || 7 | 7。 || -5 | −5 || 120000 | 1.2×10⁵ || 2\sqrt{3} | 2√3 || (0,\infty) | (0, ∞)
        8.314 | 8.314\ \text{J mol}^{-1}\text{K}^{-1} || 12\text{ m}^2 | 12 m²
        60 | 60 miles per hour || 9 | 9 meters squared
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}
        \begin{pmatrix}1/2\\3\end{pmatrix} | \begin{pmatrix}0.5\\3\end{pmatrix} || No | no
        10^5 | 1e5 || 2\times 10^{-3} | 2e-3 || 1\,000 | 1000
        no solution | No solution || 1,2 | x=1 or x=2 || 1,2 | 1 \text{ and } 2 || 5 | \text{ 5 apples}""",
    "repeating decimals": r"""
        1/3 | 0.\overline{3} || \frac{1}{6} | 0.1\overline{6} || -\frac13 | -0.\overline{3}
        \frac{1}{7} | .\bar{142857} || \frac{1000}{3} | 333.\overline{3} || \frac{3001}{3} | 1,000.\overline{3}
        0.333333 | 0.\overline{3}
        1 | 0.\overline{9} || x = 1/3 | 0.\overline{3} || 33.\overline{3}\% | \frac{100}{3}""",
    "the empty set": r"""
        \varnothing | \emptyset || \emptyset | ∅ || \varnothing | \{\} || \emptyset | \{ \} || ∅ | \left\{ \right\}""",
    "residues": r"""
        6 \pmod 7 | 6 mod 7 || x \equiv 6 \pmod{7} | 6 mod 7 || x \equiv 6 \pmod{7} | x\equiv6\pmod7
        x \equiv 6 \pmod{7} | 6 \ (\text{mod } 7) || x = 6 \bmod 7 | x ≡ 6 (mod 7) || 6 \pmod 7 | 6
        7 | \equiv 7 \pmod 9 || x \equiv -1 \pmod{7} | x \equiv 6 \pmod{7}""",
    "what is counted or measured": r"""
        12 | 12 students || 3 | 3 green apples || 10 | 10 people || 1 | 1 apple || 0.5 | 0.5 pizza
        24 | 24 square unit || 12 | 12 cm long || 40 | 40 mph || 40 | 40 kPa || 8.3 | 8.3 J/(mol K)
        40 | 40 k\Omega || 40 | 40 \mu m || 5 | 5 μF || 6 | 6 Å
        5 | 5 correct answers || 5 | 5 more || 6 | 6 dice || 3 | 3 boxes || 90 | 90 degrees counterclockwise
        2 | 2 hours || 72 | 72 dollars""",
}  # fmt: skip
WRONG = {
    "numbers": r"""
        42 | 43 || 42 | -42 || 0.5 | 0.05 || 1/3 | 0.333 || 1/2 | 1/3 || 3.14 | 3.14159 || 1000 | 1,001
        0 | 0.0000001
        0.0000001 | 0.0000002 || 1e-7 | 2e-7 || 1e-7 | 0 || 0.0000004 | 0 || 100000.1 | 100001.1
        10^{20} | 10^{20}+1
        \pi | 3.14 || \sqrt{2} | 1.41 || \sqrt{2} | \sqrt{3} || 2^{10} | 1000 || 7 | 7x || 50\% | 5
        12 | 1 || 3! | 3
        123456789012 | 123456789013 || \frac{1}{10^9} | \frac{2}{10^9} || 10^{-8} | 10^{-9} || 1.5 | 15
        7 | seven""",
    "physics": r"""
        1.6e-19 | 1.7e-19 || 1.60\times10^{-19} | 1.67\times10^{-27} || 6.63\times10^{-34} | 6.02\times10^{-34}
        1.67\times 10^{-27} | 9.11\times 10^{-31} || 3\times10^8 | 3\times10^{-8} || 3e8 | 3e9 || 9.81 | 9.8
        5\text{ m} | 5 km
        5 m | 5 s || 3 cm | 3 m || 10\text{ N} | 10\text{ J} || 9.8\text{ m/s} | 9.8\text{ m/s}^2
        mgh | mgv || F=ma | F=mv
        \frac{1}{2}mv^2 | mv^2 || 2\times10^{-9} | 0 || 8.85\times10^{-12} | 1.26\times10^{-6} || 1.38e-23 | 0
        x\cdot 10^{-19} | 2x\cdot 10^{-19} || \frac{3}{10^{19}} | \frac{4}{10^{19}}""",
    "chemistry": r"""
        NaCl | ClNa || NaCl | NaCI || CO | OC || CO | Co || H_2O | H_2O_2 || H_2O | HO_2 || CO_2 | CO_3 || HCN | NHC
        C_6H_{12}O_6 | C_6H_6 || Fe | F || sodium | dosium || 2H | H_2 || FeS | SeF || NO | ON || Ca | aC
        KI | IK || HCN | Hcn""",
    "intervals and sets": r"""
        [1,2] | (1,2) || (1,2] | [1,2) || (1,2) | (2,1) || \{1,2\} | \{1,3\} || (0,1) | (0,2) || x>2 | x<2
        x>2 | x \geq 2
        (0.0000001, 1) | (0.0000002, 1) || (-\infty,3) | (3,\infty) || \{1,2\} | \{1,2,3\} || (1,2,3) | (1,3,2)
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\\3\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix} || [0,1] | [0,1.1]""",
    "expressions": r"""
        x+1 | x-1 || x+1 | y+1 || x^2 | x^3 || 2x | 3x || \sin x | \cos x || x_1 | x_2 || a-b | b-a || x^2+1 | x^2-1
        x | y || \frac{x}{y} | \frac{y}{x} || 0.0000001x | 0.0000002x || e^{x} | e^{-x} || x=5 | x=6 || x=5 | y=5""",
    "words": r"""
        listen | silent || Paris | Praia || yes | sey || cat | act || AB | BA || ATG | GTA || even | odd
        Paris | London
        the cat | the act || elbow | below || stressed | desserts || True | False || A | B || north | thorn
        angel | glean
        speed/time | speed/item || night+1 | thing+1 || decreases | increases || evil | live""",
    "bases and times": r"""
        101_2 | 101_3 || 1010_2 | 1012_2 || 1011_{2} | 1011_{8} || FF_{16} | FF_{18} || 1011_2 | 11
        12:30 | 24:60 || 3:45 | 1:15 || 12:30 | 2/5 || 10:00 | 10 || 10:15 | 2/3 || 3:45 am | 3:45 pm
        12:30 | 12:31 || 1:2 | 1:3""",
    "what has no value": r"""
        5 | 5/0 || 7/2 | 1/0 || 5 | \frac{1}{0} || 0 | \frac{0}{0}""",
    "repeating decimals": r"""
        0.\overline{3} | 0.3 || 1/3 | 0.\overline{6} || 0.\overline{3} | 0.333 || 10/3 | 0.\overline{3}""",
    "the empty set": r"""
        \varnothing | 0 || \varnothing | \{0\} || \emptyset | \{\emptyset\} || \varnothing | \{1\}""",
    "residues": r"""
        6 \pmod 7 | 5 \pmod 7 || 6 \pmod 7 | 6 \pmod 8 || x \equiv 6 \pmod 7 | y \equiv 6 \pmod 7 || 6 \pmod 7 | 7
        x \equiv 6 \pmod 7 | x \equiv 13 \pmod 7 || 2 | 100 \bmod 7 || 6 \pmod 7 | 13""",
    "a number and what goes on": r"""
        10 | 2.5 4 || 5 | 2 3
        5 | 5 or 6 || 5 | 5 \text{ or } 6 || 5 | 5 and 6 || 5 | 5 to 10 || 3 | 3 \text{ or } -3 || 6 | 6 (or 7)
        5 | 5 \text{ maybe } 6 || 6 | 6 hours 30 minutes || 6 | 6 feet 5 inches || 6 | 6 \\ 5 || 5 | 5\text{ 6}
        5 | 5\text{, 6} || 2 | 2 x || 2 | 2 pi || 2 | 2 sqrt(3) || 2 | 2 ln 2 || 3 | 3 i || 6 | 6 x^2 || 5 | 5 x-3
        6 | 6 sin(x) || 6 | 6 choose 3 || 11/2 | 1 1/2 || 1 | 1 1/2
        4 | 4 million || 2 | 2 dozen || 4 | 4 squared || 4 | 4 thousand dollars
        9 | 9 lakh || 9 | 9 tenths || 9 | 9 hundredths || 9 | 9 theta || 9 | 9 alpha
        123 | 1 2 3 || 6 | 2 3 || 0 | 1 000 || 5e | 1e5
        5<x<6 | \{5,6\} || 5<x<6 | 5 or 6 || 1 \le x \le 2 | 1,2 || 5^2 | 52 || 52 | 5²
        12\% | 1200 || 25^\circ\text{C} | 25^\circ\text{F}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix} || NO | No""",
}  # fmt: skip


def pairs(table: dict[str, str]) -> list[tuple[str, str]]:
    lines = [pair for text in table.values() for line in text.splitlines() for pair in line.split(" || ")]
    return [(pair.split(" | ")[0].strip(), pair.split(" | ")[1].strip()) for pair in lines if pair.strip()]


def test_there_are_a_few_hundred_pairs():
    assert len(pairs(RIGHT)) > 120 and len(pairs(WRONG)) > 120


def test_answers_that_mean_the_same_are_equal_in_both_directions():
    assert [pair for pair in pairs(RIGHT) if not (equal(*pair) and equal(*pair[::-1]))] == []


def test_answers_that_only_look_alike_are_not_equal_in_either_direction():
    assert [pair for pair in pairs(WRONG) if equal(*pair) or equal(*pair[::-1])] == []


def test_a_number_with_a_remark_is_not_the_number():
    remarks = ["5 false", "5 wrong", "5 maybe", "5 \\text{ (false)}", "5 halves", "5 kg wrong"]
    assert [text for text in remarks if equal("5", text)] == []
    assert not equal("1", "1 wrong") and equal("5 odd", "5") and equal("5 cattle", "5")  # of the data, it is a name


@pytest.mark.parametrize(
    "written",
    [
        "72", 72, " 72 ", "$72$", r"\boxed{72}", "She has 48 clips.\n48+24 = 72\n#### 72", "**72**", "Answer: 72",
        "answer: 72", "The answer is 72", "The final answer is: **72**", "**Answer:** 72", "**Answer**: 72", "`72`",
        "So it is\n\\boxed{72}.",
    ],
)  # fmt: skip
def test_a_reference_answer_is_read_however_it_is_written(written):
    assert equal(math_reference(written), "72")


def test_marks_around_parts_of_a_reference_answer_stay():
    assert math_reference("**3** and **4**") == "**3** and **4**"


def test_a_reference_answer_in_a_box_may_have_several_lines():
    assert math_reference("\\boxed{\\begin{pmatrix}\n1\n\\end{pmatrix}}") == "\\begin{pmatrix} 1 \\end{pmatrix}"


@pytest.mark.parametrize("written", [r"\frac{1}{2", "1}", "}{"])
def test_a_reference_answer_that_no_box_can_hold_is_refused(written):
    with pytest.raises(UserError, match="braces"):
        math_reference(written)


def test_brackets_nested_too_deeply_cost_no_time():
    before = time.process_time()
    assert not any(equal("5", text) for text in ("{" * 900 + "}" * 900, "(" * 900 + ")" * 900, "x^" * 600 + "2"))
    assert time.process_time() - before < 5  # as math-verify reads them, a minute


@pytest.mark.parametrize("written", ["x is 3\nso it is 4", "", "####", "Answer:", "because " * 100, None, True, ["72"]])
def test_a_reference_answer_that_cannot_be_read_is_refused(written):
    with pytest.raises(UserError, match="kind 'math' expects"):
        math_reference(written)


@pytest.mark.parametrize(
    ("written", "letter"),
    [("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("B) a cell", "B"), ("Answer: B", "B"), ("**b**", "B")],
)
def test_the_letter_of_a_multiple_choice_is_read_however_it_is_written(written, letter):
    assert mcq_reference(written) == letter


@pytest.mark.parametrize("written", ["a cell", "AB", "", "3", 3, None, ["A"], "(A) and (C)", "A. or C."])
def test_an_option_that_is_no_letter_is_refused(written):
    with pytest.raises(UserError, match="letter of the right option"):
        mcq_reference(written)
