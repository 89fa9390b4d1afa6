"""Owns how capitals are asked for, from the country and from the city. The pairs are facts."""

from __future__ import annotations

from demo.facts import CAPITALS, COUNTRY_ALIASES
from demo.intents import ASK, Fact, Intent

_CITY_OF_COUNTRY = tuple(
    Fact({"x": COUNTRY_ALIASES.get(country, (country,))}, f"The capital of {country} is {city}.")
    for country, city in CAPITALS.items()
)
_COUNTRY_OF_CITY = tuple(
    Fact({"x": (city,)}, f"{city} is the capital of {country}.")
    for country, city in CAPITALS.items()
)

_CITY = Intent(
    "capitals",
    trained=(
        f"{ASK} the capital of {{x}}?",
        f"{ASK} the capital (city|town) of {{x}}?",
        f"{ASK} {{x}}'s capital?",
        "(which|what) city is the capital of {x}?",
        "(which|what) is the capital (city |)of {x}?",
        "capital of {x}(?|)",
        "{x} capital(?|)",
        "(the |)capital city of {x}(?|)",
        "what does {x} have as (its|a) capital?",
        "i (need|want) (to know |)the capital of {x}.",
        "do you (happen to |)know what the capital of {x} is?",
        "can you (please |)name the capital of {x}?",
        "{x}: what is (its|the) capital?",
        "what is the name of the capital of {x}?",
        "what city is {x}'s capital?",
        "what is the capital called in {x}?",
        "(in|for) {x}, what is the capital?",
        "what's the seat of government of {x}?",
        "i forgot the capital of {x}, what is it?",
        "where is the capital of {x}?",
        "i would like to know the capital of {x}",
        "geography (quiz|question): capital of {x}",
    ),
    held_out=(
        "could you tell me which city is the capital of {x}?",
        "which capital does {x} have?",
        "what would be the capital of {x}?",
        "remind me, what is the capital of {x}?",
        "the capital of {x} is which city?",
        "{x} has what capital city?",
    ),
    facts=_CITY_OF_COUNTRY,
    weight=10,
    follow_ups=(
        "(and|what about|how about|now) {x}?",
        "and (of|for|in) {x}?",
        "and the (capital|one) of {x}?",
    ),
)

_COUNTRY = Intent(
    "capitals",
    trained=(
        "{x} is the capital of (which|what) country?",
        "(which|what) country (has|is) {x} (as its capital|the capital of)?",
        "{x} is the capital of what (nation|land|)?",
        "of (which|what) country is {x} the capital?",
        "(which|what) (country|nation|state)'s capital is {x}?",
        "what is {x} the capital of?",
        "tell me (which|what) country {x} is the capital of.",
        "name the country whose capital is {x}",
        "whose capital is {x}?",
    ),
    held_out=(
        "which country is {x} the capital city of?",
        "which nation has {x} as its capital?",
    ),
    facts=_COUNTRY_OF_CITY,
    weight=5,
)


def capital_intents() -> list[Intent]:
    """Every intent about capitals."""
    return [_CITY, _COUNTRY]
