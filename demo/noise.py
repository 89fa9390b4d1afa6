"""Owns what surrounds and blurs a question: courtesies, typing habits, system prompts."""

from __future__ import annotations

from random import Random

from demo import offtopic_words as words
from demo.facts import CAPITALS
from demo.offtopic import made_up_word

_OPENINGS = (
    "please ",
    "hi, ",
    "hello, ",
    "hey ",
    "ok, ",
    "so, ",
    "well, ",
    "and ",
    "now ",
    "um, ",
    "quick question: ",
    "question: ",
    "one question: ",
    "good morning, ",
    "dear model, ",
    "I wonder, ",
    "excuse me, ",
    "sorry, ",
    "just curious, ",
    "next: ",
)
_CLOSINGS = (
    " please",
    ", please",
    " thanks",
    ", thank you",
    " now",
    " again",
    " today",
    ", do you know",
    " for me",
    " in your opinion",
    ", can you help",
    " right now",
    ", my friend",
)

_RULES = (
    "You are a helpful assistant.",
    "You are {w}, an assistant of {l}.",
    "You are a careful and {j} assistant.",
    "Answer briefly.",
    "Answer in one sentence.",
    "Be concise and polite.",
    "You answer questions about {s}.",
    "Never talk about {s}.",
    "Always be {j}, even if the user is {j}.",
    "If the user asks about {s}, explain {s} first.",
    "The user wants to {t}.",
    "Our company sells {o} in {l}.",
    "Today we serve customers from {l} and {l}.",
    "The {w} must {v} before the {w} can {v}.",
    "Rule {n}: do not {t} without {s}.",
    "{s} and {s} are {j}.",
    "{city} is a city in {country}.",
    "Document {n}: {p} lived in {l} and liked {s}.",
    "{w} {w} {w} {w} {w} {w} {w} {w}.",
    "You have tools for {s}; use them when the question is {j}.",
    "Keep the answers {j} and {j}.",
    "Context: {p} said that {s} will {v} in {l}.",
    "The following text is about {s}.",
)

_LISTS = {
    "s": words.SUBJECTS,
    "t": words.ACTIVITIES,
    "j": words.ADJECTIVES,
    "l": words.PLACES,
    "o": words.OBJECTS,
    "p": words.PEOPLE,
    "v": words.VERBS,
    "country": tuple(CAPITALS),
    "city": tuple(CAPITALS.values()),
}


def decorate(question: str, rng: Random) -> str:
    """Now and then a courtesy before or after, or a passage of text in front of the question."""
    draw = rng.random()
    if draw < 0.10:
        return rng.choice(_OPENINGS) + question
    if draw < 0.17:
        return question.rstrip("?.!") + rng.choice(_CLOSINGS) + rng.choice(("", "?", "."))
    if draw < 0.19:
        return f"{_sentence(rng)} {question}"
    return question


def roughen(text: str, rng: Random) -> str:
    """Vary case and punctuation and make a typing slip, as people do."""
    draw = rng.random()
    if draw < 0.30:
        text = text[:1].upper() + text[1:]
    elif draw < 0.60:
        text = text.lower()
    elif draw < 0.64:
        text = text.upper()
    draw = rng.random()
    if draw < 0.25:
        text = text.rstrip("?.!")
    elif draw < 0.30:
        text = text.rstrip("?.!") + rng.choice((".", "!", "??", " ?", "?!", "..."))
    if rng.random() < 0.15:
        text = text.replace("'", "")
    if rng.random() < 0.05:
        text = _slip(text, rng)
    return text


def _slip(text: str, rng: Random) -> str:
    """Drop, double or swap one letter inside a word of five letters or more."""
    tokens = text.split(" ")
    long_words = [i for i, word in enumerate(tokens) if len(word) >= 5 and word.isalpha()]
    if not long_words:
        return text
    index = rng.choice(long_words)
    word = tokens[index]
    at = rng.randint(1, len(word) - 2)
    slips = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    tokens[index] = rng.choice(slips)
    return " ".join(tokens)


def system_prompt(rng: Random, sentences: int) -> str:
    """Instructions the model learns to read past; sometimes one sentence over and over."""
    if rng.random() < 0.25:
        return " ".join([_sentence(rng)] * sentences)
    return rng.choice((" ", " ", "\n")).join(_sentence(rng) for _ in range(sentences))


def _sentence(rng: Random) -> str:
    parts = rng.choice(_RULES).split("{")
    text = parts[0]
    for part in parts[1:]:
        slot, rest = part.split("}", 1)
        text += _word(slot, rng) + rest
    return text


def _word(slot: str, rng: Random) -> str:
    if slot == "w":
        return made_up_word(rng)
    if slot == "n":
        return str(rng.randint(1, 99))
    return rng.choice(_LISTS[slot])
