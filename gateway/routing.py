"""Where a request goes: a pure choice among replicas that could serve it. No clock, no sockets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.request import ReplicaId

# A running sequence costs the others about as much of a step as this many prompt tokens.
_TOKENS_PER_REQUEST = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that can take a request now, and what it has to do.

    Attributes:
        num_tokens_waiting: prompt tokens not computed yet, by its last report.
        num_requests: running and waiting, by its last report.
        num_local_inflight: this gateway's own requests there now.
        num_tokens_submitted: prompt tokens sent there since its last report.
    """

    replica_id: ReplicaId
    num_tokens_waiting: int = 0
    num_requests: int = 0
    num_local_inflight: int = 0
    num_tokens_submitted: int = 0

    @property
    def load(self) -> int:
        """Work ahead of a new request, in prompt tokens."""
        requests = max(self.num_requests, self.num_local_inflight)
        return self.num_tokens_waiting + self.num_tokens_submitted + _TOKENS_PER_REQUEST * requests


def choose(candidates: Sequence[Candidate], draw: Callable[[int], int]) -> Candidate | None:
    """The less loaded of two drawn at random (Mitzenmacher 2001); None where there is none.

    Drawing keeps gateways with equally old reports from all choosing the same replica.

    Args:
        draw: a uniform integer in [0, n).
    """
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    first = draw(len(candidates))
    second = draw(len(candidates) - 1)
    second += second >= first
    pair = (candidates[first], candidates[second])
    return min(pair, key=lambda candidate: candidate.load)
