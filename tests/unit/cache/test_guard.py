"""The lexical guard tells apart what an embedding does not, and lets rewordings through."""

from __future__ import annotations

import pytest

from services.cache.courtesy import core
from services.cache.domain import Reason
from services.cache.guard import compare
from services.cache.wording import analyse
from tests.question_pairs import DIFFERENT, SAME


def difference(a: str, b: str) -> Reason | None:
    return compare(analyse(a), analyse(b))


@pytest.mark.parametrize(("a", "b"), SAME)
def test_guard_passes_when_only_the_wording_differs(a: str, b: str) -> None:
    assert difference(a, b) is None
    assert difference(b, a) is None


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_guard_refuses_when_the_questions_differ(a: str, b: str) -> None:
    assert difference(a, b) is not None
    assert difference(b, a) is not None


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("What is 17 x 23?", "What is 17 x 24?", Reason.NUMBERS_DIFFER),
        ("What is 17 x 23?", "What is 17 + 23?", Reason.NUMBERS_DIFFER),
        ("Name three fruits", "Name 4 fruits", Reason.NUMBERS_DIFFER),
        ("Is it legal?", "Is it not legal?", Reason.NEGATION_DIFFERS),
        ("Why should I go?", "Why shouldn't I go?", Reason.NEGATION_DIFFERS),
        ("Is it safe?", "Is it unsafe?", Reason.ANTONYMS),
        ("Is the drug harmful?", "Is the drug harmless?", Reason.ANTONYMS),
        ("Is it safe?", "Is it dangerous?", Reason.ANTONYMS),
        ("How do I log in?", "How do I log out?", Reason.ANTONYMS),
        ("Who was Marie Curie?", "Who was Pierre Curie?", Reason.NAMES_DIFFER),
        ("Trains Paris to London", "Trains London to Paris", Reason.ROLES_DIFFER),
        ("Trains from Paris", "Trains to Paris", Reason.ROLES_DIFFER),
        ("Who is the king?", "Who was the king?", Reason.QUESTION_DIFFERS),
        ("When was it built?", "Where was it built?", Reason.QUESTION_DIFFERS),
        ("Define entropy", "Define enthalpy", Reason.CONTENT_DIFFERS),
        ("Explain entropy", "Explain entropy briefly", Reason.CONTENT_DIFFERS),
    ],
)
def test_guard_names_the_difference_when_it_refuses(a: str, b: str, reason: Reason) -> None:
    assert difference(a, b) is reason


def test_guard_accepts_a_name_in_lower_case_when_the_other_side_capitalises_it() -> None:
    assert difference("what is the capital of france", "What is the capital of France?") is None


def test_guard_takes_a_passive_for_its_active() -> None:
    assert difference("A guitar is played by a man", "A man plays a guitar") is None
    assert difference("A man is bitten by a dog", "A man bites a dog") is Reason.ROLES_DIFFER


def test_guard_refuses_other_scripts_when_a_word_differs() -> None:
    assert difference("Was ist die Hauptstadt?", "Was ist der Hauptbahnhof?") is not None
    assert difference("法国的首都是哪里", "德国的首都是哪里") is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi there! Can you please tell me what HTTP is? Thanks!", "what is HTTP"),
        ("I was wondering why the sky is blue.", "why the sky is blue"),
        ("Explain how photosynthesis works", "how photosynthesis works"),
        ("  What\n is   this? ", "What is this"),
        ("please", "please"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_core_keeps_the_question_alone(text: str, expected: str) -> None:
    assert core(text) == expected
