"""The cache's values: what is asked, what was answered, and what a lookup comes to.

Plain data; an answer is an opaque payload here, whose meaning ends at `wire.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

EntryId = NewType("EntryId", int)
# Sharing domain, model fingerprint, SHA-256: no fingerprint is ever compared without its scope.
ScopedKey = tuple[str, str, bytes]


class Outcome(enum.Enum):
    """What a lookup comes to; named as in the proto."""

    HIT_EXACT = "hit_exact"
    HIT_SEMANTIC = "hit_semantic"
    MISS = "miss"
    BYPASS = "bypass"


class Reason(enum.Enum):
    """Which rung of the ladder decided; named as in the proto."""

    SAME_REQUEST = "same_request"
    SAME_MEANING = "same_meaning"
    NO_CACHE = "no_cache"
    NO_CANDIDATE = "no_candidate"
    TOO_OLD = "too_old"
    SEMANTIC_DISABLED = "semantic_disabled"
    TOOLS = "tools"
    MEDIA = "media"
    SEVERAL_CHOICES = "several_choices"
    LOGPROBS = "logprobs"
    SAMPLING = "sampling"
    NO_TEXT = "no_text"
    TEXT_TOO_LONG = "text_too_long"
    PERSONAL_DATA = "personal_data"
    NUMBERS_DIFFER = "numbers_differ"
    NEGATION_DIFFERS = "negation_differs"
    ANTONYMS = "antonyms"
    NAMES_DIFFER = "names_differ"
    ROLES_DIFFER = "roles_differ"
    QUESTION_DIFFERS = "question_differs"
    CONTENT_DIFFERS = "content_differs"
    BELOW_THRESHOLD = "below_threshold"
    EMBEDDER_LOADING = "embedder_loading"
    EMBEDDER_FAILED = "embedder_failed"
    DEADLINE = "deadline"
    OVERLOADED = "overloaded"


class StoreOutcome(enum.Enum):
    """What became of an offered entry; named as in the proto."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    INCOMPLETE = "incomplete"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    QUARANTINED = "quarantined"
    OUTDATED = "outdated"


@dataclass(frozen=True, slots=True)
class Keys:
    """Whose request it is and what it must equal."""

    exact_fingerprint: bytes
    compatibility_fingerprint: bytes
    tenant: str
    sharing_domain: str
    model_id: str
    model_fingerprint: str

    @property
    def exact(self) -> ScopedKey:
        """Equal for the same request in the same sharing domain."""
        return (self.sharing_domain, self.model_fingerprint, self.exact_fingerprint)

    @property
    def partition(self) -> ScopedKey:
        """Equal where answers may be considered for reuse by meaning."""
        return (self.sharing_domain, self.model_fingerprint, self.compatibility_fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the gates need to know of a request."""

    semantic_enabled: bool = False
    has_tools: bool = False
    has_media: bool = False
    n: int = 1
    wants_logprobs: bool = False
    sampling_beyond_policy: bool = False
    no_cache: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """One lookup."""

    keys: Keys
    text: str
    traits: Traits
    max_age_s: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer as it travels, and the compute that a hit on it saves."""

    payload: bytes
    compute_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment among the invalidations of one life of the process."""

    instance: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer offered for keeping; `mark` is from before its generation began."""

    keys: Keys
    text: str
    traits: Traits
    answer: Answer
    ttl_s: float | None = None
    replace: bool = False
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept answer. Times are seconds since 1970: they outlive the process."""

    id: EntryId
    keys: Keys
    text: str
    answer: Answer
    created_s: float
    expires_s: float
    # The gates let it be found by meaning.
    is_semantic: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What a lookup came to. `similarity` is the best candidate's, also where it was refused."""

    outcome: Outcome
    reason: Reason
    similarity: float | None = None
    entry_id: EntryId | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A decision, and on a hit the entry with its age."""

    decision: Decision
    entry: Entry | None = None
    age_s: float = 0.0


def miss(reason: Reason, similarity: float | None = None) -> Decision:
    """A normal generation follows."""
    return Decision(Outcome.MISS, reason, similarity)
