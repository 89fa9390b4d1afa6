"""Owns how facts are asked for: colours, the calendar and definitions.

Capitals are in `capitals.py`, sums and counting in `sums.py`, chit-chat in `smalltalk.py`.
"""

from __future__ import annotations

from demo.capitals import capital_intents
from demo.definitions import DEFINITIONS
from demo.facts import (
    COLOURS,
    DAYS,
    DAYS_IN_MONTH,
    ORDINALS,
    UNITS,
)
from demo.intents import ASK, Fact, Intent

_IS = "(what is|what's|which is)"


def _colours() -> list[Intent]:
    facts = tuple(
        Fact({"x": (thing,)}, f"{thing[0].upper()}{thing[1:]} is {colour}.")
        for thing, colour in COLOURS.items()
    )
    return [
        Intent(
            "colours",
            trained=(
                "(what|which) (colour|color) is {x}?",
                f"{ASK} the (colour|color) of {{x}}?",
                "(what|which) (colour|color) does {x} have?",
                "{x} is (what|which) (colour|color)?",
                "(colour|color) of {x}(?|)",
                "{x} (colour|color)?",
                "tell me what (colour|color) {x} is.",
                "do you know (what|which) (colour|color) {x} is?",
                "of (what|which) (colour|color) is {x}?",
                "{x} has (what|which) (colour|color)?",
                "(what|which) (colour|color) would you say {x} is?",
                "how would you describe the (colour|color) of {x}?",
                "i want to know the (colour|color) of {x}",
                "what is the usual (colour|color) of {x}?",
                "(which|what) (colour|color) is {x} (usually|normally)?",
                "in (which|what) (colour|color) does {x} come?",
            ),
            held_out=(
                "can you tell me what (colour|color) {x} is?",
                "what (colour|color) do you think {x} is?",
                "what is the typical (colour|color) of {x}?",
                "{x}: which (colour|color)?",
            ),
            facts=facts,
            weight=6,
        )
    ]


def _neighbours(names: tuple[str, ...], kind: str) -> list[Intent]:
    pairs = [(name, names[(i + 1) % len(names)]) for i, name in enumerate(names)]
    after = tuple(Fact({"x": (a,)}, f"{b} comes after {a}.") for a, b in pairs)
    before = tuple(Fact({"x": (b,)}, f"{a} comes before {b}.") for a, b in pairs)
    return [
        _neighbour(kind, "after", "(follows|succeeds|is next after)", after),
        _neighbour(kind, "before", "(precedes|is just ahead of|leads up to)", before),
    ]


def _neighbour(kind: str, side: str, verb: str, facts: tuple[Fact, ...]) -> Intent:
    return Intent(
        "calendar",
        trained=(
            f"(what|which) {kind} (comes|is|falls|goes) (right |directly |){side} {{x}}?",
            f"(what|which) {kind} {verb} {{x}}?",
            f"(what|which) is the {kind} {side} {{x}}?",
            f"{ASK} the {kind} (that comes |){side} {{x}}?",
            f"the {kind} {side} {{x}}(?| is)",
            f"what comes {side} {{x}}?",
            f"{side} {{x}} (comes|is) (what|which) {kind}?",
            f"if today is {{x}}, what {kind} comes {side} it?",
            f"tell me what {kind} comes {side} {{x}}",
            f"what {kind} do we have {side} {{x}}?",
            f"name the {kind} {side} {{x}}",
            f"which {kind} is immediately {side} {{x}}?",
        ),
        held_out=(
            f"do you know which {kind} comes {side} {{x}}?",
            f"can you name the {kind} which comes {side} {{x}}?",
            f"what is {side} {{x}}?",
        ),
        facts=facts,
        weight=1.6,
    )


def _month_lengths() -> Intent:
    return Intent(
        "calendar",
        trained=(
            "how many days (are in|are there in|does|has) {x}( have|)?",
            "how (long|many days) is {x}?",
            "(number|the number|what is the number) of days in {x}",
            "how many days in {x}?",
            "days in {x}(?|)",
            "what is the length of {x} in days?",
            "tell me how many days {x} has",
            "{x} has how many days?",
        ),
        held_out=(
            "how many days do we get in {x}?",
            "do you know how many days {x} has?",
        ),
        facts=tuple(Fact({"x": (m,)}, f"{m} has {days}.") for m, days in DAYS_IN_MONTH.items()),
        weight=2,
    )


def _units() -> Intent:
    return Intent(
        "calendar",
        trained=(
            "how many {x} (are in|are there in|make|make up) {y}?",
            "how many {x} does {y} have?",
            "how many {x} in {y}?",
            "{x} in {y}(?|)",
            "(what is |)the number of {x} in {y}?",
            "{y} has how many {x}?",
            "tell me how many {x} are in {y}",
        ),
        held_out=(
            "how many {x} has {y} got?",
            "do you know how many {x} there are in {y}?",
        ),
        facts=tuple(
            Fact({"x": (part,), "y": (whole,)}, f"There are {count} {part} in {whole}.")
            for part, whole, count in UNITS
        ),
        weight=1.5,
    )


def _ordinal(names: tuple[str, ...], kind: str, whole: str) -> Intent:
    return Intent(
        "calendar",
        trained=(
            f"{_IS} the {{x}} {kind} of the {whole}?",
            f"(what|which) {kind} is the {{x}} (one |)(of|in) the {whole}?",
            f"(name|tell me|give me) the {{x}} {kind} of the {whole}",
            f"the {{x}} {kind} of the {whole}(?| is)",
            f"{{x}} {kind} of the {whole}(?|)",
            f"(what|which) {kind} comes {{x}} in the {whole}?",
        ),
        held_out=(
            f"do you know the {{x}} {kind} of the {whole}?",
            f"which {kind} is {{x}} in the {whole}?",
        ),
        facts=tuple(
            Fact({"x": words}, f"The {words[0]} {kind} of the {whole} is {name}.")
            for words, name in zip(ORDINALS, names, strict=False)
        ),
        weight=1.2,
    )


def _definitions() -> Intent:
    return Intent(
        "definitions",
        trained=(
            "(what is|what's|what are) (a |an |the |){x}?",
            "(define|explain|describe) (a |the |){x}(.|)",
            "what does {x} mean?",
            "what is meant by {x}?",
            "(can|could) you (please |)(explain|define|describe) (the |a |){x}?",
            "(please |)(explain|define) (to me |)what (a |){x} (is|means)",
            "(tell me|say something) about (the |){x}.",
            "what do (you|people|we) mean by {x}?",
            "{x}(?|)",
            "{x} (meaning|definition)",
            "definition of {x}",
            "(give me|i need) (a|the) (short |)definition of {x}",
            "how would you (define|explain|describe) {x}?",
            "what is {x} in (serving|inference|LLM serving|machine learning|this mesh)?",
            "i (don't|do not) understand {x}",
            "i want to (know|understand|learn) what {x} is",
            "what is (a |the |){x} (for|good for|used for)?",
            "what does (a |the |){x} do?",
            "(in a few words|briefly|in short), what is {x}?",
            "why do (we|servers) need (a |){x}?",
            "do you know what {x} is?",
            "help me understand {x}",
            "what exactly is (a |the |){x}?",
        ),
        held_out=(
            "could you tell me what {x} is?",
            "what is the meaning of {x}?",
            "what is the definition of {x}?",
            "I would like to understand what {x} means",
            "how do you explain {x}?",
            "tell me what {x} is",
        ),
        facts=tuple(Fact({"x": names}, text) for names, text in DEFINITIONS.items()),
        weight=9,
        follow_ups=("(and|what about|how about) (a |the |){x}?", "and what is {x}?"),
    )


def topical_intents() -> list[Intent]:
    """Every intent that asks for a fact from the tables."""
    months = tuple(DAYS_IN_MONTH)
    return [
        *capital_intents(),
        *_colours(),
        *_neighbours(DAYS, "day"),
        *_neighbours(months, "month"),
        _month_lengths(),
        _units(),
        _ordinal(DAYS, "day", "week"),
        _ordinal(months, "month", "year"),
        _definitions(),
    ]
