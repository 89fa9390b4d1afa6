"""What a client's Cache-Control asks of the cache (RFC 9111, section 5.2.1). Pure."""

import re
from dataclasses import dataclass

_MAX_AGE = re.compile(r"max-age\s*=\s*\"?(\d{1,10})\"?")


@dataclass(frozen=True, slots=True)
class Directives:
    """The directives that are obeyed; others don't concern this cache.

    Attributes:
        no_store: neither read nor keep.
        no_cache: don't read; the fresh answer is kept.
        max_age_s: don't use older answers.
    """

    no_store: bool = False
    no_cache: bool = False
    max_age_s: int | None = None


def parse_cache_control(value: str) -> Directives:
    """One header's value; what can't be read is ignored, as the RFC asks."""
    no_store = no_cache = False
    max_age_s: int | None = None
    for directive in value.lower().split(","):
        word = directive.strip()
        no_store |= word == "no-store"
        no_cache |= word == "no-cache"
        if found := _MAX_AGE.fullmatch(word):
            max_age_s = int(found[1]) if max_age_s is None else min(max_age_s, int(found[1]))
    # nothing kept is younger than no age at all
    return Directives(no_store, no_cache or max_age_s == 0, max_age_s)
