"""Words alone refuse what the guard would refuse, and nothing else."""

import itertools

import pytest

from services.cache import guard
from services.cache.domain import EntryId, Reason, ScopedKey
from services.cache.wording import analyse
from services.cache.wordings import Wordings

HERE: ScopedKey = ("local", "model", b"one")
THERE: ScopedKey = ("local", "model", b"two")
QUESTIONS = (
    "What is the capital of France?", "Which city is the capital of France?",
    "Tell me the capital of Spain.", "What's France's capital?", "What is 17 times 23?",
    "What is 17 times 24?", "Is it safe to eat this?", "Is it unsafe to eat this?",
    "How far is it from Paris to London?", "How far is it from London to Paris?",
    "Please explain what a large car is", "Explain what a big automobile is", "Hello", "Why?",
    "Who wrote Hamlet?", "Who was the author of Hamlet?", "How do I fix a bug?",
    "How can I repair a bug?", "What is not a fruit?", "What is a fruit?",
)  # fmt: skip


def holding(*texts: str) -> Wordings:
    wordings = Wordings()
    for number, text in enumerate(texts):
        wordings.add(HERE, EntryId(number), text)
    while wordings.work(3):
        pass
    return wordings


@pytest.mark.parametrize("question", QUESTIONS)
def test_refusal_is_the_guards_for_every_pair(question: str) -> None:
    for kept in QUESTIONS:
        refused = holding(kept).refuse(HERE, analyse(question))
        assert (refused is None) == (guard.compare(analyse(question), analyse(kept)) is None)


def test_nothing_is_refused_that_one_of_many_would_answer() -> None:
    wordings = holding(*QUESTIONS)
    for question in QUESTIONS:
        assert wordings.refuse(HERE, analyse(question)) is None


def test_refusal_names_what_the_nearest_differs_in() -> None:
    wordings = holding("What is 17 times 23?", "Who wrote Hamlet?")
    assert wordings.refuse(HERE, analyse("What is 17 times 24?")) is Reason.NUMBERS_DIFFER
    assert wordings.refuse(HERE, analyse("Sing a song")) is Reason.CONTENT_DIFFERS


def test_other_partition_is_not_looked_at() -> None:
    wordings = holding("Who wrote Hamlet?")
    assert wordings.refuse(THERE, analyse("Who wrote Hamlet?")) is Reason.NO_CANDIDATE


def test_removed_entries_are_forgotten() -> None:
    wordings = holding(*QUESTIONS)
    for number in range(1, len(QUESTIONS)):
        wordings.remove(HERE, EntryId(number))
    assert wordings.refuse(HERE, analyse("Who wrote Hamlet?")) is Reason.CONTENT_DIFFERS
    assert wordings.refuse(HERE, analyse(QUESTIONS[0])) is None
    wordings.remove(HERE, EntryId(0))
    assert wordings.refuse(HERE, analyse(QUESTIONS[0])) is Reason.NO_CANDIDATE


def test_entries_that_were_not_taken_apart_yet_are_looked_at_or_left_to_the_embedding() -> None:
    wordings = Wordings()
    for number, text in enumerate(QUESTIONS[:8]):
        wordings.add(HERE, EntryId(number), text)
    assert wordings.refuse(HERE, analyse("Sing a song")) is Reason.CONTENT_DIFFERS
    for number, text in itertools.product(range(100, 109), QUESTIONS[:1]):
        wordings.add(HERE, EntryId(number), text)
    assert wordings.refuse(HERE, analyse("Sing a song")) is None
