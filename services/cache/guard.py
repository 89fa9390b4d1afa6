"""The lexical guard: what two questions of nearly the same embedding still differ in.

An embedding of a sentence hardly sees a number, a negation or who does what to whom: "Paris to
London" is 0.997 to "London to Paris". Pure; refuses where it is unsure.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.cache import lexicon
from services.cache.domain import Reason
from services.cache.stems import stem
from services.cache.wording import Wording

_ANTONYMS = lexicon.ANTONYMS | {frozenset(stem(word) for word in pair) for pair in lexicon.ANTONYMS}
_GROUPS: dict[str, set[int]] = {}
for _number, _group in enumerate(lexicon.SYNONYMS):
    for _word in _group:
        _GROUPS.setdefault(stem(_word), set()).add(_number)
_MEMBERS = [frozenset(stem(word) for word in group) for group in lexicon.SYNONYMS]
_LOOSE = frozenset(stem(word) for word in lexicon.LOOSE)
# More of them are never one question; it bounds the comparison of each with each.
_MAX_DIFFERING_WORDS = 40

Roles = dict[str, str]


def compare(a: Wording, b: Wording) -> Reason | None:
    """What keeps the two from sharing an answer; None where nothing is seen."""
    if a.numbers != b.numbers:
        return Reason.NUMBERS_DIFFER
    if a.num_negations != b.num_negations:
        return Reason.NEGATION_DIFFERS
    only_a, only_b = a.words - b.words, b.words - a.words
    if len(only_a) + len(only_b) > _MAX_DIFFERING_WORDS:
        return Reason.CONTENT_DIFFERS
    if _have_antonyms(only_a, only_b):
        return Reason.ANTONYMS
    if a.names - b.words or b.names - a.words:
        return Reason.NAMES_DIFFER
    if _question_differs(a, b):
        return Reason.QUESTION_DIFFERS
    if not _are_paired(_unmatched(a, b), _unmatched(b, a)):
        return Reason.CONTENT_DIFFERS
    if _roles_differ(a, b):
        return Reason.ROLES_DIFFER
    return None


def anchors(wording: Wording) -> list[frozenset[str]]:
    """Per word that adds something: the words, one of which whatever passes the guard must have."""
    return [
        frozenset((word, *(other for group in _GROUPS.get(word, ()) for other in _MEMBERS[group])))
        for word in wording.content
        if word not in _LOOSE
    ]


def _unmatched(a: Wording, b: Wording) -> list[str]:
    there = set(b.content)
    return [word for word in a.content if word not in there]


def _have_antonyms(left: Iterable[str], right: frozenset[str]) -> bool:
    return any(_are_opposite(one, other) for one in left for other in right)


def _are_opposite(a: str, b: str) -> bool:
    if frozenset((a, b)) in _ANTONYMS:
        return True
    long, short = (a, b) if len(a) > len(b) else (b, a)
    if len(short) > 2 and long.endswith(short):
        return long[: -len(short)].rstrip("-") in lexicon.NEGATIVE_PREFIXES
    return long[:-4] == short[:-3] and {long[-4:], short[-3:]} == {"less", "ful"}


def _are_synonyms(a: str, b: str) -> bool:
    return bool(_GROUPS.get(a, set()) & _GROUPS.get(b, set()))


def _are_paired(left: list[str], right: list[str]) -> bool:
    """Each word of one side has a synonym on the other, or adds nothing."""
    return all(
        word in _LOOSE or any(_are_synonyms(word, other) for other in others)
        for words, others in ((left, right), (right, left))
        for word in words
    )


def _question_differs(a: Wording, b: Wording) -> bool:
    if a.tense and b.tense and a.tense != b.tense:
        return True
    kinds = {a.question, b.question}
    return len(kinds) > 1 and kinds != {"", "what"}


def _roles_differ(a: Wording, b: Wording) -> bool:
    """Whether shared words stand in another order, or face another way."""
    roles_a, roles_b = _by_word(a), _by_word(b)
    shared = [word for word in a.content if word in roles_b]
    if len(set(shared)) != len(shared):  # a word twice: only the same order is sure
        return shared != [word for word in b.content if word in roles_a]
    for word in shared:
        roles = {roles_a[word], roles_b[word]}
        if len(roles) > 1 and roles & lexicon.STRONG_DIRECTIONS:
            return True
    place = {word: i for i, word in enumerate(b.content)}
    return any(
        place[one] > place[other]
        and not _may_swap(one, other, roles_a, roles_b)
        and not _is_compound(one, other, a, b)
        for i, one in enumerate(shared)
        for other in shared[i + 1 :]
    )


def _by_word(wording: Wording) -> Roles:
    return dict(zip(wording.content, wording.roles, strict=True))


def _may_swap(one: str, other: str, roles_a: Roles, roles_b: Roles) -> bool:
    """A phrase with a preposition may move: "in Python" before or after the rest."""
    return any(roles_a[word] and roles_a[word] == roles_b[word] for word in (one, other))


def _is_compound(first: str, second: str, a: Wording, b: Wording) -> bool:
    """ "a list in Python" is "a Python list": `first` stands before `second` in `a`."""
    for long, short, head, part in ((a, b, first, second), (b, a, second, first)):
        is_phrase = _by_word(long)[part] in lexicon.NEUTRAL_DIRECTIONS
        at = short.content.index(part)
        if is_phrase and short.content[at + 1 : at + 2] == (head,) and not short.roles[at + 1]:
            return True
    return False
