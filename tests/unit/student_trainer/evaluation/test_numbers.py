"""Numbers are found as GSM8K, LaTeX and people write them."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.evaluation.numbers import Number, equal_numbers, final_number

CASES = [
    ("#### 72", "72"), ("#### 5\n#### 6", "5"), ("10 then #### 72.0 and 3", "72"),
    ("#### -5 dollars", "-5"), ("#### $1,000", "1000"), ("####18", "18"),
    ("#### 1. Add them\nso it is 7", "7"), ("#### Step 2\nso it is 7", "7"),
    ("#### 5 and \\boxed{6}", "5"), ("\\boxed{6}. The answer is 7. 8", "6"),
    ("\\boxed{5} or \\boxed{6}", "6"), ("\\boxed{x = 5} 9", "5"),
    ("\\boxed{\\frac{3}{4}}", "3/4"), ("\\boxed{3\\frac{1}{2}}", "7/2"),
    ("\\boxed{\\text{5 apples}}", "5"), ("\\boxed{5\\text{ apples}} 9", "5"),
    ("\\boxed{1\\,234}", "1234"), ("\\boxed{1{,}234}", "1234"), ("\\boxed{12 and 3", "3"),
    ("The answer is 12. I used 3 steps", "12"), ("The answer is **42**.", "42"),
    ("Answer: 3 + 4 = 7", "7"), ("Final answer:\n$8$", "8"), ("final answer is: 9 of 10", "9"),
    ("A: 18", "18"), ("so 3 + 4 = 7 apples.", "7"), ("1,234", "1234"), ("1 234", "1234"),
    ("1\u202f234\u202f567", "1234567"), ("3,4", "4"), ("1, 2, 3", "3"), (".5", "1/2"),
    ("5.", "5"), ("-.25", "-1/4"), ("2.50", "5/2"), ("It costs $1,000.50.", "2001/2"),
    ("\\$5", "5"), ("$-5", "-5"), ("-$5", "-5"), ("€5", "5"), ("5€", "5"), ("50%", "50"),
    ("50\\%", "50"), ("3½", "7/2"), ("-½", "-1/2"), ("¾", "3/4"), ("\u22125", "-5"),
    ("(-5)", "-5"), ("(5)", "5"), ("10-3", "3"), ("pages 5-10", "10"), ("3/4", "3/4"),
    ("1 1/2", "3/2"), ("$\\frac{-3}{4}$", "-3/4"), ("-\\frac{3}{4}", "-3/4"),
    ("\\dfrac12", "1/2"), ("1.5e3", "1500"), ("1.5 \\times 10^{3}", "1500"), ("2e-1", "1/5"),
    ("3kg", "3"), ("60mph", "60"), ("the 3rd", "3"), ("5 at 10:30", "5"), ("7 by 5pm", "7"),
    ("8 on 2024-01-05", "8"), ("8 on 1/2/2024", "8"), ("9**9**9**9", "9"),
    ("<think>#### 1</think>\n#### 2", "2"), ("１２", "12"),
    ("3D object", None), ("GPT-4", None), ("B12", None), ("x2", None), ("no digits", None),
    ("", None), ("#### none", None), ("10/0", None), ("v1.2.3", None), ("9" * 5000, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), CASES)
def test_the_number_is_found(text, number):
    found = final_number(text)
    assert (found and found.value) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so far 3 and", None), ("#### 12", None), ("#### 12\n", 12), ("\\boxed{12}", 12),
        ("\\boxed{12", None), ("The answer is 12", None), ("The answer is 12.", 12),
        ("The answer is 12, as", 12), ("<think>\n#### 5\n", None),
    ],
)  # fmt: skip
def test_a_text_that_was_cut_has_only_marked_numbers(text, number):
    found = final_number(text, truncated=True)
    assert (found and found.value) == number


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("72.0", "72", True), ("72.4", "72", False), ("1/3", "0.33", True), ("0.333", "0.33", True),
        ("0.3", "0.33", False), ("0.34", "0.33", False), ("2/6", "1/3", True),
        ("0.33", "1/3", False), ("1", "0.5", False), ("50%", "0.5", False),
    ],
)  # fmt: skip
def test_equality_is_exact_but_for_the_references_decimals(answer, reference, equal):
    assert equal_numbers(final_number(answer), final_number(reference)) is equal


@given(
    st.lists(st.sampled_from([*"0123456789.,-/$%^:eE ()#=\\{}x×", "\\boxed{", "\\frac"])).map(
        "".join
    )
)
def test_any_text_has_a_number_or_none(text):
    assert isinstance(final_number(text), Number | None)


@given(st.fractions())
def test_a_written_fraction_is_read_back(value):
    if len(str(value)) < 300:
        assert final_number(f"#### {value}").value == value


@pytest.mark.parametrize(
    "unit", ["1", "1 111", ",111", "\\boxed{", "the answer is ", "#### ", "1/", "9**", "\\frac{1}"]
)
def test_an_answer_of_100_kilobytes_takes_seconds_at_most(unit):
    since = time.process_time()
    final_number(unit * (100_000 // len(unit)))
    assert time.process_time() - since < 5
