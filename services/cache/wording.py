"""A question taken apart for the lexical guard: numbers, negation, names, words and their order.

Pure, and for English; other languages keep their words as they stand, so that the guard refuses
more of them. `core` is also what is embedded: how a question is put is not what it asks.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from services.cache import lexicon

_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*(?:st|nd|rd|th)?(?![A-Za-z])|[^\W\d_][\w]*(?:[.'+#-]+\w+)*[+#]*|\w+|\*\*|[<>]=|[^\w\s]"
)
_IGNORED = frozenset("?.!,;:\"'()[]{}“”‘’`…«»")
_CARRIERS = re.compile("^(?:" + "|".join(lexicon.CARRIERS) + ")", re.IGNORECASE)
_CODAS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in lexicon.CODAS)
_POLAR = frozenset(
    [
        "is",
        "are",
        "am",
        "was",
        "were",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "can",
        "could",
        "should",
        "would",
        "will",
        "may",
        "might",
        "must",
    ]
)
_WH = {
    "what": "what", "which": "what", "who": "who", "whom": "who", "whose": "whose", "where": "where",
    "when": "when", "why": "why",
}  # fmt: skip
_HOW = frozenset(
    [
        "many",
        "much",
        "long",
        "far",
        "old",
        "tall",
        "high",
        "big",
        "often",
        "deep",
        "heavy",
        "fast",
        "hot",
        "wide",
        "large",
    ]
)
_IMPERATIVES = frozenset(
    ["tell", "name", "give", "define", "explain", "describe", "say", "list", "show", "write"]
)


@dataclass(frozen=True, slots=True)
class Wording:
    """What must agree between two questions that share an answer."""

    # Numbers with the operators between them, in order: "17 * 23".
    numbers: tuple[str, ...]
    num_negations: int
    # Casefolded words that were capitalised inside the text.
    names: frozenset[str]
    # Every word, casefolded; what names are looked up in.
    words: frozenset[str]
    # Stems of content words in order.
    content: tuple[str, ...]
    # The preposition that each content word hangs on, aligned with `content`; "" for none.
    roles: tuple[str, ...]
    # Aligned with `content`: joined to the next by "and" or "or".
    question: str
    tense: str


def core(text: str) -> str:
    """The text without greetings, courtesies and "can you tell me"; never empty unless it was."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").split())
    short = text
    while True:
        found = _CARRIERS.match(short)
        if found is None or not found.end():
            break
        short = short[found.end() :]
    for coda in _CODAS:
        short = coda.sub("", short)
    return short or text


def analyse(text: str) -> Wording:
    """Takes a text apart; about 100 µs for a question."""
    tokens = _tokens(core(text))
    words = [token.casefold() for token in tokens]
    numbers, is_number = _numbers(words)
    content, roles = _content(words, is_number)
    return Wording(
        numbers=numbers,
        num_negations=sum(word in lexicon.NEGATORS for word in words),
        names=_names(tokens),
        words=frozenset(words) | {stem(word) for word in words},
        content=content,
        roles=roles,
        question=_question(words),
        tense=_tense(words),
    )


def stem(word: str) -> str:
    """A light stem: plurals, -ing and -ed; irregular forms by list."""
    known = lexicon.IRREGULAR.get(word)
    if known is not None:
        return known
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return stem(word[:-1]) if word.endswith("ings") else _drop_e(word[:-1])
    for end in ("ing", "ed"):
        root = word[: -len(end)]
        if word.endswith(end) and len(root) > 2 and re.search("[aeiouy]", root):
            if root[-1] == root[-2] and root[-1] not in "lsz":
                return root[:-1]
            return _drop_e(root)
    return _drop_e(word)


def _drop_e(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def _tokens(text: str) -> list[str]:
    words: list[str] = []
    for token in _TOKEN.findall(text):
        low = token.casefold()
        if low in lexicon.CONTRACTIONS:
            words.extend(lexicon.CONTRACTIONS[low].split())
            continue
        for end, long in lexicon.CONTRACTION_ENDS:
            if low.endswith(end) and len(low) > len(end):
                words.extend((token[: -len(end)] + long).split())
                break
        else:
            words.extend(_possessive(token))
    return [word for word in words if word not in _IGNORED]


def _possessive(token: str) -> list[str]:
    """`France's` as France and the marker 's."""
    if token.casefold().endswith("'s") and len(token) > 2:
        return [token[:-2], "'s"]
    return [token]


def _numbers(words: list[str]) -> tuple[tuple[str, ...], list[bool]]:
    """Numbers in order with the operators beside them, and which words these are."""
    values = [_number(word) for word in words]
    is_number = [value is not None for value in values]
    found: list[str] = []
    for i, word in enumerate(words):
        value = values[i]
        if value is not None:
            found.append(value)
        elif word in lexicon.OPERATORS and _beside_number(is_number, values, i):
            found.append(lexicon.OPERATORS[word])
            is_number[i] = True
    return tuple(found), is_number


def _beside_number(is_number: list[bool], values: list[str | None], i: int) -> bool:
    """An operator stands after a number, or leads one."""
    before = i > 0 and values[i - 1] is not None
    after = any(value is not None for value in values[i + 1 : i + 3])
    return (before and (after or i + 1 == len(values))) or (not before and after and i == 0)


def _number(word: str) -> str | None:
    if word[0].isdigit():
        plain = word.replace(",", "")
        return plain.rstrip("0").rstrip(".") if "." in plain and plain.count(".") == 1 else plain
    if word == "one":  # "one" is a pronoun as often as a number
        return None
    return lexicon.NUMBER_WORDS.get(word)


def _names(tokens: list[str]) -> frozenset[str]:
    names = set()
    for i, token in enumerate(tokens):
        low = token.casefold()
        if not token[0].isupper() or low in lexicon.FILLERS or low in _POLAR or len(low) < 2:
            continue
        if i == 0 and low in _IMPERATIVES:
            continue
        if i > 0:  # a first word is capitalised in any case; the content check compares it
            names.add(low)
    return frozenset(names)


def _content(words: list[str], is_number: list[bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stems: list[str] = []
    roles: list[str] = []
    role = ""
    for i, word in enumerate(words):
        if word == "'s":  # "France's capital" is the capital of France
            if roles:
                roles[-1] = "of"
            continue
        if word == "to" and (i == 0 or words[i - 1] in lexicon.INFINITIVE_LEADS):
            role = ""
        elif word in lexicon.DIRECTIONS:
            role = lexicon.DIRECTIONS[word]
        elif word in ("and", "or"):
            role = roles[-1] if roles else ""
        elif is_number[i]:
            role = ""
        elif word not in lexicon.FILLERS and word not in lexicon.NEGATORS:
            stems.append(stem(word))
            roles.append(role)
            role = ""
    return tuple(stems), tuple(roles)


def _question(words: list[str]) -> str:
    """What kind of answer is asked for; "" for a plain phrase or command."""
    for i, word in enumerate(words):
        if word == "how":
            after = words[i + 1] if i + 1 < len(words) else ""
            return f"how {after}" if after in _HOW else "how"
        if word in _WH:
            return _WH[word]
        if i == 0 and word in _POLAR:
            return (
                f"{word}?" if word in ("can", "could", "should", "would", "must", "may") else "is?"
            )
    return ""


def _tense(words: list[str]) -> str:
    for word in words:
        if word in lexicon.PAST:
            return "past"
        if word in lexicon.PRESENT:
            return "present"
    return ""
