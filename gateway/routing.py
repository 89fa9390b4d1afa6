"""Where a request goes: a pure choice among replicas that could serve it. No clock, no sockets."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.request import ReplicaId

# A running sequence costs the others about as much of a step as this many prompt tokens.
_TOKENS_PER_REQUEST = 32


class Policy(enum.StrEnum):
    """How a replica is chosen; the values are the setting's."""

    PREFIX = "prefix"
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that can take a request now, and what it has to do.

    Attributes:
        num_tokens_waiting: prompt tokens not computed yet, by its last report.
        num_requests: running and waiting, by its last report.
        num_local_inflight: this gateway's own requests there now.
        num_tokens_submitted: prompt tokens sent there since its last report, less those it holds.
        num_tokens_matched: of the request's prompt, held there.
        compute_cost: of the rest of it, in tokens.
        kv_usage: share of its KV blocks that hold anything, by its last report.
    """

    replica_id: ReplicaId
    num_tokens_waiting: int = 0
    num_requests: int = 0
    num_local_inflight: int = 0
    num_tokens_submitted: int = 0
    num_tokens_matched: int = 0
    compute_cost: float = 0.0
    kv_usage: float = 0.0

    @property
    def load(self) -> int:
        """Work ahead of a new request, in prompt tokens."""
        requests = max(self.num_requests, self.num_local_inflight)
        return self.num_tokens_waiting + self.num_tokens_submitted + _TOKENS_PER_REQUEST * requests

    @property
    def cost(self) -> float:
        """What a request that goes here costs, in prompt tokens: those ahead of it; twice its own,
        for it waits for them, and so does whoever comes after it; and as many again as its blocks
        push out of a full cache, where others will want them (eviction cost of Preble, 2024).
        """
        return self.load + self.compute_cost * (2 + self.kv_usage)


def choose(candidates: Sequence[Candidate], draw: Callable[[int], int]) -> Candidate | None:
    """The less loaded of two drawn at random (Mitzenmacher 2001); None where there is none.

    Drawing keeps gateways with equally old reports from all choosing the same replica.

    Args:
        draw: a uniform integer in [0, n).
    """
    return min(_two(candidates, draw), key=lambda candidate: candidate.load, default=None)


def choose_by_prefix(
    candidates: Sequence[Candidate], draw: Callable[[int], int]
) -> Candidate | None:
    """The one where a request costs least, of two that hold most of its prompt and two others.

    So a prefix is computed again where the queue before it is longer than the prefix.
    """
    most = max((candidate.num_tokens_matched for candidate in candidates), default=0)
    holders = [one for one in candidates if one.num_tokens_matched == most]
    others = [one for one in candidates if one.num_tokens_matched < most]
    drawn = [*_two(holders, draw), *_two(others, draw)]
    return min(drawn, key=lambda candidate: candidate.cost, default=None)


def choose_in_turn(candidates: Sequence[Candidate], turn: int) -> Candidate | None:
    """One after the other, whatever they have to do."""
    return candidates[turn % len(candidates)] if candidates else None


def _two(candidates: Sequence[Candidate], draw: Callable[[int], int]) -> Sequence[Candidate]:
    """Two different ones, in random order; all where there are fewer."""
    if len(candidates) < 2:
        return candidates
    first = draw(len(candidates))
    second = draw(len(candidates) - 1)
    second += second >= first
    return candidates[first], candidates[second]
