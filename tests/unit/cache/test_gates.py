"""The gates: what closes the semantic tier, and what shortens an answer's life."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from services.cache.courtesy import core
from services.cache.domain import Reason, Traits
from services.cache.gates import MAX_TEXT_CHARS, is_volatile, semantic_gate

OPEN = Traits(semantic_enabled=True)
QUESTION = "What is the capital of France?"


@pytest.mark.parametrize("text", [QUESTION, "Explain what a token is.", "A token is what?"])
def test_gate_is_open_when_nothing_stands_against_it(text: str) -> None:
    assert semantic_gate(OPEN, text) is None


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ({"semantic_enabled": False}, Reason.SEMANTIC_DISABLED),
        ({"has_tools": True}, Reason.TOOLS),
        ({"has_media": True}, Reason.MEDIA),
        ({"n": 2}, Reason.SEVERAL_CHOICES),
        ({"wants_logprobs": True}, Reason.LOGPROBS),
        ({"sampling_beyond_policy": True}, Reason.SAMPLING),
    ],
)
def test_gate_closes_when_the_request_has_a_trait(traits: dict[str, bool], reason: Reason) -> None:
    assert semantic_gate(replace(OPEN, **traits), QUESTION) is reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.NO_TEXT),
        (" \n", Reason.NO_TEXT),
        ("x" * (MAX_TEXT_CHARS + 1), Reason.TEXT_TOO_LONG),
        ("Mail it to jane.doe@example.com", Reason.PERSONAL_DATA),
        ("Call +44 20 7946 0958", Reason.PERSONAL_DATA),
        ("Whose number is (555) 123-4567?", Reason.PERSONAL_DATA),
        ("Is 4111 1111 1111 1111 valid?", Reason.PERSONAL_DATA),
        ("Check DE89 3704 0044 0532 0130 00", Reason.PERSONAL_DATA),
        ("SSN 078-05-1120", Reason.PERSONAL_DATA),
        ("Why is sk-abcdefghijklmnopqrstuv refused?", Reason.PERSONAL_DATA),
        ("The password is hunter2", Reason.PERSONAL_DATA),
        ("The PIN is 4711", Reason.PERSONAL_DATA),
        ("token: abc9", Reason.PERSONAL_DATA),
        ("What is my balance?", Reason.PERSONAL_DATA),
        ("How much do I owe? I have paid", Reason.PERSONAL_DATA),
        ("Decode ghp_16C7e42F292c6912E7710c838347Ae178B4a", Reason.PERSONAL_DATA),
    ],
)
def test_gate_closes_when_the_text_is_not_to_be_shared(text: str, reason: Reason) -> None:
    assert semantic_gate(OPEN, text) is reason


@pytest.mark.parametrize(
    "text",
    [
        "How do I get from Paris to London?",
        "What is 17 x 23?",
        "Who won in 1998?",
        "What is 3.14159 * 2?",
        "Name 5 cities of 2 states",
    ],
)
def test_gate_stays_open_when_numbers_are_ordinary(text: str) -> None:
    assert semantic_gate(OPEN, text) is None


@pytest.mark.parametrize(
    ("text", "volatile"),
    [
        ("What is the weather in Paris?", True),
        ("Who is the current president?", True),
        ("What happened today?", True),
        ("What is the latest version of Python?", True),
        ("What time is it?", True),
        (QUESTION, False),
        ("What is a leap year?", False),
    ],
)
def test_volatile_is_what_depends_on_the_time(text: str, volatile: bool) -> None:
    assert is_volatile(text) is volatile


@pytest.mark.parametrize(
    "unit", ["!", "-", ". ", "1", "1 ", "a", "a.", "a-", "a@", "ab-", "+", "/", "_", "hi ", "(12) "]
)
def test_the_work_grows_with_the_text_and_not_with_its_square(unit: str) -> None:
    """Texts are the clients', and the event loop runs this."""

    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        times = []
        for _ in range(5):
            began = time.perf_counter()
            semantic_gate(OPEN, text)
            is_volatile(text)
            core(text)
            times.append(time.perf_counter() - began)
        return min(times)

    # Four times the text is sixteen times the work where a pattern is quadratic.
    assert seconds(MAX_TEXT_CHARS) < 10 * seconds(MAX_TEXT_CHARS // 4) + 0.002
