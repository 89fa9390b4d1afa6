"""The word lists of `english.toml`, as the guard looks them up. Data only."""

from __future__ import annotations

import tomllib
from pathlib import Path

_LISTS: dict[str, str] = tomllib.loads(
    Path(__file__).with_name("english.toml").read_text(encoding="utf-8")
)


def _words(name: str) -> frozenset[str]:
    return frozenset(_LISTS[name].split())


def _table(name: str, by: str = "=") -> dict[str, str]:
    # The last separator: an operator may be one itself.
    return {key: value for key, _, value in (one.rpartition(by) for one in _LISTS[name].split())}


NUMBER_WORDS = _table("numbers")
OPERATORS = _table("operators", ":")
ROMAN = _table("roman")
CONTRACTIONS = {short: long.replace("_", " ") for short, long in _table("contractions").items()}
CONTRACTION_ENDS = {"n't": " not", "'re": " are", "'ve": " have", "'ll": " will", "'d": " would"}
NEGATORS = _words("negators")
NEGATIVE_PREFIXES = _words("negative_prefixes")
ANTONYMS = frozenset(frozenset(pair.split("/")) for pair in _LISTS["antonyms"].split())
SYNONYMS = tuple(group.split("/") for group in _LISTS["synonyms"].split())
FILLERS = _words("fillers")
LOOSE = _words("loose")
DIRECTIONS = _table("directions")
STRONG_DIRECTIONS = _words("strong_directions")
NEUTRAL_DIRECTIONS = _words("neutral_directions")
INFINITIVE_LEADS = _words("infinitive_leads")
PAST = _words("past")
PRESENT = _words("present")
IRREGULAR = _table("irregular")
POLAR = _words("polar")
IMPERATIVES = _words("imperatives")
HOW_MEASURES = _words("how_measures")
HOW_KINDS = _words("how_kinds")
