"""A question taken apart for the lexical guard: numbers, negation, names, words and their order.

Pure, and for English; other languages keep their words as they stand, so that the guard refuses
more of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.cache import lexicon
from services.cache.courtesy import core
from services.cache.stems import stem

_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*(?:st|nd|rd|th)?(?![A-Za-z])"  # numbers, clock times, ordinals
    r"|[^\W\d_]\w*(?:[.'+#-]+\w+)*[+#]*"  # words, C++, don't, e-mail
    r"|\w+|\*\*|[<>]=|[^\w\s]"
)
_IGNORED = frozenset("?.!,;:\"'()[]{}“”‘’`…«»")
_WH = {"whom": "who", "which": "what"} | {
    word: word for word in ("what", "who", "whose", "where", "when", "why")
}
_BE = frozenset({"is", "are", "was", "were", "be", "been", "being"})


@dataclass(frozen=True, slots=True)
class Wording:
    """What must agree between two questions that share an answer."""

    # Numbers with the operators between them, in order: 17 * 23.
    numbers: tuple[str, ...]
    num_negations: int
    # Casefolded words that were capitalised inside the text.
    names: frozenset[str]
    # Every word, casefolded, and its stem.
    words: frozenset[str]
    # Stems of content words in order; a passive in the order of its active.
    content: tuple[str, ...]
    # The preposition that each content word hangs on, aligned with `content`; "" for none.
    roles: tuple[str, ...]
    # What kind of answer is asked for; "" for a phrase or a command.
    question: str
    # "past", "present" or "".
    tense: str


def analyse(text: str) -> Wording:
    """Takes a text apart."""
    tokens = _tokens(core(text))
    words = [token.casefold() for token in tokens]
    numbers, is_number = _numbers(tokens, words)
    content, roles = _content(words, is_number)
    return Wording(
        numbers=numbers,
        num_negations=sum(word in lexicon.NEGATORS for word in words),
        names=_names(tokens, is_number),
        words=frozenset(words) | {stem(word) for word in words},
        content=content,
        roles=roles,
        question=_question(words),
        tense=_tense(words),
    )


def _tokens(text: str) -> list[str]:
    words: list[str] = []
    for token in _TOKEN.findall(text):
        words += _expanded(token)
    return [word for word in words if word not in _IGNORED]


def _expanded(token: str) -> list[str]:
    """`isn't` as is, not; `France's` as France and the marker 's."""
    low = token.casefold()
    if low in lexicon.CONTRACTIONS:
        return lexicon.CONTRACTIONS[low].split()
    for end, long in lexicon.CONTRACTION_ENDS.items():
        if low.endswith(end) and len(low) > len(end):
            return (token[: -len(end)] + long).split()
    if low.endswith("'s") and len(token) > 2:
        return [token[:-2], "'s"]
    return [token]


def _numbers(tokens: list[str], words: list[str]) -> tuple[tuple[str, ...], list[bool]]:
    """Numbers in order with the operators beside them, and which words these are."""
    values = [_number(token, word) for token, word in zip(tokens, words, strict=True)]
    is_number = [value is not None for value in values]
    found: list[str] = []
    for i, (word, value) in enumerate(zip(words, values, strict=True)):
        if value is not None:
            found.append(value)
        elif word in lexicon.OPERATORS and _is_operator(values, i):
            found.append(lexicon.OPERATORS[word])
            is_number[i] = True
    while found and found[-1] == "=":  # "17 + 4 =" asks what "17 + 4" asks
        found.pop()
    return tuple(found), is_number


def _is_operator(values: list[str | None], i: int) -> bool:
    """It stands after a number and before one or the end, or is a sign before the first."""
    is_after = i > 0 and values[i - 1] is not None
    is_before = any(value is not None for value in values[i + 1 : i + 3])
    return is_before if i == 0 else is_after and (is_before or i + 1 == len(values))


def _number(token: str, word: str) -> str | None:
    if word[0].isdigit():
        plain = word.replace(",", "")
        return plain.rstrip("0").rstrip(".") if plain.count(".") == 1 else plain
    if word == "one":  # a pronoun as often as a number
        return None
    if token.isupper() and word in lexicon.ROMAN:
        return lexicon.ROMAN[word]
    return lexicon.NUMBER_WORDS.get(word)


def _names(tokens: list[str], is_number: list[bool]) -> frozenset[str]:
    """A first word is capitalised in any case; the content check compares it."""
    return frozenset(
        token.casefold()
        for token, number in zip(tokens[1:], is_number[1:], strict=True)
        if token[0].isupper()
        and len(token) > 1
        and not number
        and token.casefold() not in lexicon.FILLERS
        and token.casefold() not in lexicon.POLAR
    )


def _content(words: list[str], is_number: list[bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stems: list[str] = []
    roles: list[str] = []
    role, is_passive = "", False
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word == "'s":  # "France's capital" is the capital of France
            if roles:
                roles[-1] = "of"
        elif word == "to" and (not before or before in lexicon.INFINITIVE_LEADS):
            role = ""
        elif word in lexicon.DIRECTIONS:
            role = lexicon.DIRECTIONS[word]
            is_passive = is_passive or (word == "by" and bool(_BE & set(words[:i])))
        elif word in ("and", "or"):
            role = roles[-1] if roles else ""
        elif is_number[i]:
            role = ""
        elif word not in lexicon.FILLERS and word not in lexicon.NEGATORS:
            stems.append(stem(word))
            roles.append(role)
            role = ""
    return _active(stems, roles) if is_passive else (tuple(stems), tuple(roles))


def _active(stems: list[str], roles: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """'a guitar is played by a man' as: man, play, guitar. The verb stands before 'by'."""
    if "by" not in roles:  # "who was it written by": the doer is asked for
        verb = len(stems) - 1
        doer_start = doer_end = len(stems)
    else:
        doer_start = doer_end = roles.index("by")
        verb = doer_start - 1
        doer_end += 1
        while doer_end < len(stems) and not roles[doer_end]:
            doer_end += 1
    if verb < 0:
        return tuple(stems), tuple(roles)
    order = [*range(doer_start, doer_end), verb, *range(verb), *range(doer_end, len(stems))]
    plain = ["" if role == "by" else role for role in roles]
    return tuple(stems[i] for i in order), tuple(plain[i] for i in order)


def _question(words: list[str]) -> str:
    for i, word in enumerate(words):
        if word == "how":
            after = words[i + 1] if i + 1 < len(words) else ""
            if after in lexicon.HOW_MEASURES:  # the content has which: "tall" is height
                return "what"
            return f"how {after}" if after in lexicon.HOW_KINDS else "how"
        if word in _WH:
            return _WH[word]
        if i == 0 and word in lexicon.POLAR:
            is_modal = word not in lexicon.PAST and word not in lexicon.PRESENT
            return f"{word}?" if is_modal else "is?"
    return ""


def _tense(words: list[str]) -> str:
    for word in words:
        if word in lexicon.PAST:
            return "past"
        if word in lexicon.PRESENT:
            return "present"
    return ""
