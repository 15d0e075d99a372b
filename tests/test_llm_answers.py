"""What gbpo_llm.py and grpo_llm.py take for the right answer: forms that people and models write, both ways."""

import random
import time
from fractions import Fraction

import pytest

import gbpo_llm as gbpo

# completion -> the number that its last box holds
NUMBERS = {
    r"\boxed{5}": 5,
    r"$x - \boxed{5}$": 5,
    r"$- \boxed{5}$": -5,
    r"$-\,\boxed{5}$": -5,
    r"$-$\boxed{5}": -5,
    r"x=-~\boxed{5}": -5,
    r"\boxed{–5}": -5,
    r"\boxed{5\text{ months}}": 5,
    r"\boxed{142.0}": 142,
    r"\boxed{1,000}": 1000,
    r"\boxed{1{,}000}": 1000,
    r"\boxed{1\,000}": 1000,
    r"\boxed{1\,000\,000}": 10**6,
    r"\boxed{1\,000/3}": Fraction(1000, 3),
    r"\boxed{1,\!000}": 1000,
    r"\boxed{1 000}": 1000,
    r"\boxed{1~000}": 1000,
    "\\boxed{1\u202f000}": 1000,
    r"\boxed{−5}": -5,
    r"\boxed{- 5}": -5,
    r"\boxed{+5}": 5,
    "\\boxed{\uff15}": 5,
    r"-\boxed{5}": -5,
    r"$-\boxed{5}$": -5,
    r"x = −\boxed{5}": -5,
    r"\boxed{\frac34}": Fraction(3, 4),
    r"\boxed{-\frac34}": Fraction(-3, 4),
    r"\boxed{\dfrac{3}{4}}": Fraction(3, 4),
    r"\boxed{\tfrac{3}4}": Fraction(3, 4),
    r"\boxed{\frac{-3}{4}}": Fraction(-3, 4),
    r"\boxed{\frac{ 3 }{ 4 }}": Fraction(3, 4),
    r"\boxed{3 / 4}": Fraction(3, 4),
    r"\boxed{1\frac12}": Fraction(3, 2),
    r"\boxed{-2 \frac{1}{2}}": Fraction(-5, 2),
    r"\boxed{5^\circ}": 5,
    r"\boxed{5^{\circ}}": 5,
    r"\boxed{5°}": 5,
    r"\boxed{5^\circ\text{C}}": 5,
    r"\boxed{\$5}": 5,
    r"\boxed{\$1,250.50}": Fraction(2501, 2),
    r"\boxed{€5}": 5,
    r"\boxed{$5$}": 5,
    r"\boxed{\(5\)}": 5,
    r"\boxed{5\%}": 5,
    r"\boxed{5\text{ cm}}": 5,
    r"\boxed{5\text{ g}}": 5,
    r"\boxed{5 \mathrm{cm}}": 5,
    r"\boxed{5\text{ cm}^2}": 5,
    r"\boxed{5\,\text{m/s}}": 5,
    r"\boxed{5 \text{ square units}}": 5,
    r"\boxed{5\text{ oranges}}": 5,
    r"\boxed{5~cm}": 5,
    r"\boxed{5 cm}": 5,
    r"\boxed{\frac{3}{4}\text{ hours}}": Fraction(3, 4),
    r"\boxed{5.}": 5,
    r"\boxed{5 meters}": 5,
    r"\boxed{12 square units}": 12,
    r"\boxed{5cm}": 5,
    r"\boxed{x=5}": 5,
    r"\boxed{\textbf{(A)} 5}": 5,
    r"\boxed{\textbf{(A) }5}": 5,
    r"\boxed{\text{(A) 5}}": 5,
    r"\boxed{\text{(E) } \frac{1}{3}}": Fraction(1, 3),
    r"\boxed{(B)\ 5}": 5,
    r"\boxed{\underline{5}}": 5,
    r"\boxed{x_1 = -5}": -5,
    r"\boxed{f(x)=5}": 5,
    r"\boxed{\theta = 5^\circ}": 5,
    r"\boxed{\text{5}}": 5,
    r"\boxed{\text{5 cm}}": 5,
    r"\boxed{\frac{1,000}{3}}": Fraction(1000, 3),
    r"\boxed{\frac{3}{-4}}": Fraction(-3, 4),
    r"\boxed{3/-4}": Fraction(-3, 4),
    r"\boxed{5\text{ times}}": 5,
    r"\boxed{\mathbf{5}}": 5,
    r"\boxed{\displaystyle 5}": 5,
    r"\boxed 5": 5,
    r"so \boxed 42, as claimed": 42,
    r"\fbox{5}": 5,
    r"\boxed{\boxed{5}}": 5,
    r"\boxed {5}": 5,
    r"\boxed{5} and then \boxed{}": 5,
    r"\boxed{5} and then \boxed{ } again \boxed{": 5,
    r"\boxed{5}. Thus the answer is \boxed{5": 5,
    r"3-\boxed{5}": 5,
    r"the answer - \boxed{5}": 5,
    r"\boxed{1} then \boxed{5}": 5,
}
# completion -> a number that its last box does not hold, though a careless reader may take it for that
WRONG = {
    r"-\boxed{5}": 5,
    r"\boxed{5^2}": 52,
    "\\boxed{5\u00b2}": 52,
    "\\boxed{5\u00bd}": Fraction(51, 2),
    r"\boxed{\frac1234}": Fraction(1, 234),
    r"\boxed{\frac12 345}": Fraction(1, 2345),
    r"\boxed{2^\frac34}": Fraction(3, 4),
    r"\boxed{5i}": 5,
    r"\boxed{5\mathrm{i}}": 5,
    r"\boxed{5x}": 5,
    r"\boxed{5 ab}": 5,
    r"\boxed{5 m}": 5,
    r"\boxed{5\pi}": 5,
    r"\boxed{5 abc}": 5,
    r"\boxed{5 million}": 5,
    r"\boxed{5 thousandths}": 5,
    r"\boxed{5 point five}": 5,
    r"\boxed{5 seven}": 5,
    r"\boxed{10 minutes past noon}": 10,
    r"\boxed{5\text{ sixteenths}}": 5,
    r"\boxed{0.3\text{ repeating}}": Fraction(3, 10),
    r"\boxed{f(2)=5}": 5,
    r"\boxed{x+y=5}": 5,
    r"\boxed{\frac{1,2}{3}}": Fraction(12, 3),
    r"\boxed{2m+n = 5}": 5,
    r"\boxed{(A)}": 5,
    r"\boxed{5\text{ thousandths}}": 5,
    r"\boxed{5\text{ plus two}}": 5,
    r"\boxed{\text{5 million dollars}}": 5,
    r"\boxed{5\text{ pi}}": 5,
    r"\boxed{5 \text{ million}}": 5,
    r"\boxed{5\text{ or }7}": 5,
    r"\boxed{5\text{ or 7}}": 5,
    r"\boxed{5,7}": 5,
    r"\boxed{5 7}": 57,
    r"\boxed{1 00}": 100,
    r"\boxed{12,34}": 1234,
    r"\boxed{1,000 000}": 10**6,
    r"\boxed{101_2}": 101,
    r"\boxed{101\text{ base two}}": 101,
    r"\boxed{5!}": 5,
    r"\boxed{5\text{ sixths}}": 5,
    r"\boxed{5\text{ bn}}": 5,
    r"\boxed{5\text{ squared}}": 5,
    r"\boxed{x \neq 5}": 5,
    r"\boxed{x > 5}": 5,
    r"\boxed{2x=5}": 5,
    r"\boxed{1/0}": 1,
    r"\boxed{5+}": 5,
    r"\boxed{5} then \boxed{7}": 5,
    "5": 5,
    r"\boxed{5": 5,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_right_number_is_taken_in_every_form_without_math_verify(text):
    answer = gbpo.extract_answer(text, "boxed")
    assert (
        isinstance(answer, Fraction) and answer == NUMBERS[text] and gbpo.same_answer(answer, Fraction(NUMBERS[text]))
    )


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_number_earns_nothing(text):
    assert not gbpo.same_answer(gbpo.extract_answer(text, "boxed"), Fraction(WRONG[text]))


# what a dataset gives, what a completion's box holds, whether they are the same
EXPRESSIONS = [
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", True),
    ("(1,2)", r"\left( 1, 2 \right)", True),
    ("(1,2)", "(2,1)", False),
    ("2", r"\sqrt{4}", True),
    ("120000", r"1.2\times 10^5", True),
    ("x+1", "1+x", True),
    ("x+1", "x-1", False),
    (r"\text{yes}", "yes", True),
    ("yes", "no", False),
    ("always true", "always false", False),
    ("no solutions", "no primes", False),
    ("x+y=5", "x-y=5", False),
    ("(A), (C)", "(B), (C)", False),
    (r"\frac{a+b}{c}", "a+b/c", False),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt3", True),
    ("3", r"\pi", False),
    pytest.param("1", r"9^{9^{9^{9}}}", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("truth, answer, same", EXPRESSIONS)
def test_expressions_are_compared_by_math_verify_within_seconds(truth, answer, same):
    pytest.importorskip("math_verify")
    start = time.perf_counter()
    key = gbpo.extract_answer(f"so \\boxed{{{answer}}}", "boxed")
    assert gbpo.same_answer(key, gbpo.true_answer(truth, "boxed")) is same
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize("error", [ValueError, RecursionError, MemoryError, "timeout"])
def test_what_math_verify_raises_is_no_right_answer(error, monkeypatch):
    math_verify = pytest.importorskip("math_verify")
    raised = math_verify.errors.TimeoutException if error == "timeout" else error

    def fail(*_, **__):
        raise raised("x")

    monkeypatch.setattr(math_verify, "parse", fail)
    assert gbpo.same_answer(f"a{error}", "b") is False


@pytest.mark.parametrize(
    "answer, key",
    [
        ("#### 18", 18),
        ("3 * 6 = <<3*6=18>>18.\n#### 1,800", 1800),
        ("it is $\\boxed{\\frac34}$", Fraction(3, 4)),
    ]
    + [(4.0, 4), ("5", 5), (None, None), ("", None), ("long " * 50, None), ("yes", "yes")],
)
def test_answers_of_datasets_are_read(answer, key):
    assert gbpo.true_answer(answer, "boxed") == key
    assert gbpo.true_answer(answer, "exact") == (key if isinstance(key, (int, Fraction)) else None)


def test_answers_that_are_no_numbers_vote_and_numbers_vote_by_value():
    texts = [r"\boxed{(1,2)}", r"\boxed{\left(1, 2\right)}", r"\boxed{3}", "3.0", "nothing"]
    groups = [{"problem": {"answer": "(1,2)"}, "texts": texts}]
    rewards, stats = gbpo.majority_rewards(groups, gbpo.Args(reward="majority", group_size=2))
    assert rewards.tolist() == [[1, 1, 0, 0, 0]] and stats["ttrl/label_accuracy"].tolist() == [1]


PIECES = r"\boxed{ } { \frac \fbox{ \text{ cm \, \! $ - − 1 2 34 000 , . / ^ = x \circ % \sqrt ( ) \ ½ ² ５ ~".split(
    " "
)
PIECES += [" ", "\n", "\0", "\ud800", "é", "1" * 50, "\\boxed", "box"]


def test_random_text_raises_nothing_and_costs_milliseconds():
    rng, slowest = random.Random(0), 0.0
    for _ in range(5000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 60)))
        start = time.process_time()
        for reward in ("exact", "boxed", "majority"):
            key = gbpo.extract_answer(text, reward)
            assert key is None or isinstance(key, (Fraction, str)) and key != ""
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 0.05
