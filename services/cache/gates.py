"""The gates: which requests the semantic tier is closed to, and which answers live short.

Pure. Errs towards closing: a gate shut in vain costs one generation.
"""

from __future__ import annotations

import re

from services.cache.domain import Reason, Traits

# 256 tokens of the embedder are fewer characters than this in any ordinary text; the exact count is
# taken when the text is embedded. It also bounds the work of the patterns here and of the guard.
MAX_TEXT_CHARS = 2000

# No pattern may try the same run of characters from each of its places: texts are the clients'.
_PERSONAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"[\w.+-]@[\w-]{1,63}\.\w{2}",  # e-mail
        r"(?<![\w.])\+?\(?\d{2,4}\)?(?:[ ./-]\(?\d{2,5}\)?){2,5}(?![\w.])",  # phone
        r"(?<!\w)\+\d{8,15}(?!\w)|(?<![\w.])\d{9,12}(?![\w.])",  # phone or account number
        r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)",  # payment card
        r"\b[a-z]{2}\d{2}(?: ?[a-z0-9]{4}){3,7}(?: ?[a-z0-9]{1,3})?\b",  # IBAN
        r"\b\d{3}-\d{2}-\d{4}\b",  # social security number
        r"\b(?:sk|pk|rk|ghp|gho|ghs|glpat|xox[abp]|akia|asia|eyj)[-_]?[a-z0-9_-]{12}",  # keys
        r"-----begin [a-z ]*private key",
        r"\b(?:api[ _-]?key|password|passwort|passwd|secret)\b\s*(?:is|[:=])",
        r"\b(?:token|pin|otp)\b\s*(?:is|[:=])\s*[\"'`]?\w{0,40}\d",  # "what a token is" is not
        r"(?<![a-z0-9+/_-])(?=[a-z0-9+/_-]*\d)(?=[a-z0-9+/_-]*[a-z])[a-z0-9+/_-]{24}",  # random
        r"\b(?:my|our|mine)\b",
        r"\bam i\b|\b(?:do|did|have|has|will|can) i (?:have|owe|own)\b",
        r"\bi(?:'m| am|'ve| have| was| live| work| owe| own| bought| ordered| paid)\b",
    )
)
_VOLATILE = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|now|nowadays|currently|current|latest|newest|recent"
    r"|recently|breaking|headlines?|this (?:week|month|year|morning|afternoon|evening|season)"
    r"|(?:last|next) (?:week|month|year|night|season)|so far|at the moment|these days|right now"
    r"|weather|forecast|temperature (?:in|at|outside)|news|live score|scores?|standings"
    r"|stock|share price|exchange rates?|price of|bitcoin|traffic|what time|what day|what date"
    r"|what year|the (?:time|date)|how old is|still|up to date|upcoming|trending)\b",
    re.IGNORECASE,
)


def semantic_gate(traits: Traits, text: str) -> Reason | None:
    """Why the semantic tier is closed to this request; None where it is open."""
    if not traits.semantic_enabled:
        return Reason.SEMANTIC_DISABLED
    if traits.has_tools:
        return Reason.TOOLS
    if traits.has_media:
        return Reason.MEDIA
    if traits.n > 1:
        return Reason.SEVERAL_CHOICES
    if traits.wants_logprobs:
        return Reason.LOGPROBS
    if traits.sampling_beyond_policy:
        return Reason.SAMPLING
    return _text_gate(text)


def _text_gate(text: str) -> Reason | None:
    if not text.strip():
        return Reason.NO_TEXT
    if len(text) > MAX_TEXT_CHARS:
        return Reason.TEXT_TOO_LONG
    if any(pattern.search(text) for pattern in _PERSONAL):
        return Reason.PERSONAL_DATA
    return None


def is_volatile(text: str) -> bool:
    """Whether the answer depends on when it is asked."""
    return _VOLATILE.search(text[:MAX_TEXT_CHARS]) is not None
