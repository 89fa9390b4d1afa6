"""A light English stem: plurals, -ing and -ed; irregular forms by list. Pure."""

from __future__ import annotations

import re

from services.cache import lexicon

_VOWEL = re.compile("[aeiouy]")


def stem(word: str) -> str:
    """Equal for forms of one word; `word` is casefolded."""
    known = lexicon.IRREGULAR.get(word)
    if known is not None:
        return _without_e(known)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return stem(word[:-1]) if word.endswith("ings") else _without_e(word[:-1])
    for end in ("ing", "ed"):
        root = word[: -len(end)]
        if word.endswith(end) and len(root) > 2 and _VOWEL.search(root):
            is_doubled = root[-1] == root[-2] and root[-1] not in "lsz"
            return root[:-1] if is_doubled else _without_e(root)
    return _without_e(word)


def _without_e(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("e") else word
