"""Takes off how a question is put: greetings, courtesies, "can you tell me". Pure.

What is left is what is embedded and compared: it is what the question asks.
"""

from __future__ import annotations

import re
import unicodedata

_WH = r"(?=(?:what|which|who|whose|where|when|why|how)\b)"
_WH_OR_THE = r"(?=(?:what|which|who|whose|where|when|why|how|the)\b)"
_CARRIERS = (
    r"(?:hi|hello|hey|good (?:morning|evening|afternoon))(?: there)?\b[\s,.!]*",
    r"(?:please|pls|kindly|ok|okay|so|well|quick question|thanks|thank you)\b[\s,.:!-]*",
    r"(?:(?:can|could|would|will) you|i(?: would|'d) like you to|i (?:want|need) you to)\s+"
    r"(?:please |kindly )?"
    r"(?=(?:tell|say|explain|give|show|describe|name|define|help|remind)\b)",
    r"(?:tell|give|show|remind) (?:me|us)\s+(?:please\s+)?" + _WH_OR_THE,
    r"(?:tell|give) (?:me|us) (?!about\b)(?=\w)",
    r"(?:explain|describe|say)(?: to me)?\s+" + _WH,
    r"(?:do|would|might) you (?:happen to )?know\s+" + _WH_OR_THE,
    r"i (?:want|need|wish|would like|'d like) to (?:know|find out|understand|ask)\s+" + _WH_OR_THE,
    r"i(?: am|'m| was|'ve been| have been)? (?:just )?(?:wonder(?:ing)?|curious)(?: about)?,?\s+"
    + _WH_OR_THE,
    r"(?:may|can|could) i ask\s+" + _WH,
)
_CARRIER = re.compile("^(?:" + "|".join(_CARRIERS) + ")", re.IGNORECASE)
# At the end of what has no punctuation there any more; one attempt per word.
_CODA = re.compile(r"(?<!\S)(?:please|pls|thanks|thank you|thx|kindly)$", re.IGNORECASE)
_END_MARKS = " ,.!?"
# "what the capital of France is": a question inside a sentence, with the verb at its end.
_INDIRECT = re.compile(r"^(what|who|where|when|how) (.+) (is|are|was|were)$", re.IGNORECASE)


def core(text: str) -> str:
    """The question alone, on one line; never empty unless the text was."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").split())
    short = text
    while True:
        found = _CARRIER.match(short)
        if found is None or not found.end():
            break
        short = short[found.end() :]
    short = short.rstrip(_END_MARKS)
    short = _CODA.sub("", short).rstrip(_END_MARKS)
    short = _INDIRECT.sub(r"\1 \3 \2", short)
    return short or text
