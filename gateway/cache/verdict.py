"""What the cache said about a request, and what it keeps. Values only."""

import enum
from dataclasses import dataclass
from typing import Any

from gateway.tokens import Finish, TokenLogprobs


class Outcome(enum.Enum):
    """What became of the question whether an answer is there."""

    HIT = "hit"
    MISS = "miss"
    # the cache was not read
    BYPASS = "bypass"


class Tier(enum.Enum):
    """How an answer was found."""

    EXACT = "exact"
    SEMANTIC = "semantic"


@dataclass(frozen=True, slots=True)
class StoredChoice:
    """One finished choice; `logprobs` is empty or has one per token."""

    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A finished answer as the model gave it.

    Attributes:
        compute_s: what computing it took, queueing left out.
    """

    choices: tuple[StoredChoice, ...]
    prompt_tokens: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of one lookup.

    Attributes:
        reason: a word for headers and metrics, from a bounded set.
        tier: of a hit.
        similarity: cosine of the best candidate, also where it was refused.
        answer: of a hit.
    """

    outcome: Outcome
    reason: str
    tier: Tier | None = None
    similarity: float | None = None
    age_s: float | None = None
    entry_id: str | None = None
    answer: StoredAnswer | None = None

    @property
    def is_hit(self) -> bool:
        return self.answer is not None

    def headers(self) -> dict[str, str]:
        """As HTTP headers or gRPC metadata."""
        found = {"infermesh-cache": self.outcome.value, "infermesh-cache-reason": self.reason}
        if self.similarity is not None:
            found["infermesh-cache-similarity"] = f"{self.similarity:.4f}"
        if self.age_s is not None:
            found["infermesh-cache-age"] = str(int(self.age_s))
        if self.entry_id is not None:
            found["infermesh-cache-entry"] = self.entry_id
        return found

    def as_json(self) -> dict[str, Any]:
        """For the admin port."""
        return {
            "outcome": self.outcome.value,
            "reason": self.reason,
            "tier": self.tier.value if self.tier else None,
            "similarity": self.similarity,
            "age_s": self.age_s,
            "entry_id": self.entry_id,
        }


HEADERS = (
    "infermesh-cache",
    "infermesh-cache-reason",
    "infermesh-cache-similarity",
    "infermesh-cache-age",
    "infermesh-cache-entry",
)


def miss(reason: str) -> Verdict:
    """Nothing to reuse, and why."""
    return Verdict(Outcome.MISS, reason)


def bypass(reason: str) -> Verdict:
    """The cache is not read, and why."""
    return Verdict(Outcome.BYPASS, reason)
