"""Owns the shape of a question with its answer and the small pattern language paraphrases use.

Holds no text of its own: the facts and the paraphrases live in the topic modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")

# How a request for one fact may open.
ASK = "(what is|what's|tell me|name|give me|do you know|can you tell me|please tell me)"


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer and, per slot name, the wordings that may fill a pattern asking for it."""

    slots: Mapping[str, Sequence[str]]
    answer: str


@dataclass(frozen=True, slots=True)
class Intent:
    """One thing a user may want. `held_out` patterns are never trained on, only evaluated."""

    topic: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    facts: tuple[Fact, ...]
    weight: float = 1.0
    follow_ups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and the one answer that counts as right."""

    topic: str
    question: str
    answer: str


def ask(intent: Intent, patterns: Sequence[str], rng: Random) -> Exchange:
    """Fill one randomly chosen pattern with one randomly chosen fact."""
    fact = rng.choice(intent.facts)
    return Exchange(intent.topic, fill(rng.choice(patterns), fact.slots, rng), fact.answer)


def fill(pattern: str, slots: Mapping[str, Sequence[str]], rng: Random) -> str:
    """Choose among `(a|b)` alternatives, then put one wording into every `{slot}`."""

    def choose(match: re.Match[str]) -> str:
        return rng.choice(match.group(1).split("|"))

    def put(match: re.Match[str]) -> str:
        return rng.choice(slots[match.group(1)])

    return _SLOT.sub(put, _CHOICE.sub(choose, pattern))


def expansions(pattern: str) -> list[str]:
    """Every wording a pattern allows, slots left open: what proves held-out patterns unseen."""
    parts = _CHOICE.split(pattern)
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(words) for words in product(*options)]


def normalized(text: str) -> str:
    """Lower case, single spaces, no closing punctuation: equal for wordings told apart by none."""
    return " ".join(re.sub(r"[?!.,;:'\"]", " ", text.lower()).split())


def words_of(text: str) -> tuple[str, ...]:
    """A comma-separated list, over as many lines as it takes, as a tuple."""
    return tuple(word.strip() for word in text.replace("\n", " ").split(",") if word.strip())
