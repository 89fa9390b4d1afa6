"""Keys that were verified, or refused, a short while ago. Keeps hashes of keys only. No I/O.

While the change feed is open, an entry is good for its TTL, because a change drops it at once.
While the feed is broken the TTL shortens, and a verified key that can't be asked for again stays
usable for the rest of the outage allowance.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from gateway.identity import Principal
from infermesh.errors import InvalidApiKey

_UNWATCHED_TTL_S = 2.0
_REFUSED_TTL_S = 5.0
_CAPACITY = 10_000
_FOREVER = float("inf")

Digest = bytes


def digest(credential: str) -> Digest:
    """What a key is known by here."""
    return hashlib.sha256(credential.encode()).digest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One verified key; times are on the cache's clock."""

    principal: Principal
    verified_at: float
    expires_at: float


class PrincipalCache:
    """Principals by the digest of their key.

    Args:
        ttl_s: a verified key is asked for again after.
        outage_s: how long verified keys go on once the feed is broken.
        clock: monotonic seconds.
    """

    def __init__(self, ttl_s: float, outage_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._outage_s = outage_s
        self._clock = clock
        self._entries: OrderedDict[Digest, Entry] = OrderedDict()
        # no exception is kept: its traceback would keep the request that it was raised for
        self._refused: OrderedDict[Digest, tuple[float, str]] = OrderedDict()
        self._unwatched_since: float | None = clock()
        self.sequence: int | None = None

    @property
    def num_refused(self) -> int:
        """How many keys are remembered as no good."""
        return len(self._refused)

    def fresh(self, key: Digest) -> Principal | None:
        """A principal that needs no question.

        Raises:
            InvalidApiKey: the key was refused a moment ago.
        """
        now = self._clock()
        refused = self._refused.get(key)
        if refused is not None and now < refused[0]:
            raise InvalidApiKey(refused[1]) from None
        entry = self._entries.get(key)
        if entry is None or now >= entry.expires_at:
            return None
        ttl_s = self._ttl_s
        if self._unwatched_since is not None:
            ttl_s = min(ttl_s, _UNWATCHED_TTL_S)
        return entry.principal if now < entry.verified_at + ttl_s else None

    def stale(self, key: Digest) -> Principal | None:
        """A principal that can't be asked for now, and may go on nevertheless."""
        now = self._clock()
        entry = self._entries.get(key)
        if entry is None or now >= entry.expires_at:
            return None
        since = self._unwatched_since
        if since is None:
            since = entry.verified_at + self._ttl_s
        return entry.principal if now < since + self._outage_s else None

    def put(
        self, key: Digest, principal: Principal, valid_for_s: float | None, sequence: int
    ) -> None:
        """A verified key; not kept where the answer is older than the last change seen."""
        if self.sequence is not None and sequence < self.sequence:
            return
        now = self._clock()
        expires_at = _FOREVER if valid_for_s is None else now + valid_for_s
        self._entries[key] = Entry(principal, now, expires_at)
        self._entries.move_to_end(key)
        while len(self._entries) > _CAPACITY:
            self._entries.popitem(last=False)

    def refuse(self, key: Digest, message: str) -> None:
        """A key that is no good; asked for again after a moment."""
        now = self._clock()
        self._entries.pop(key, None)
        self._refused[key] = (now + _REFUSED_TTL_S, message)
        self._refused.move_to_end(key)
        # the oldest come first
        while len(self._refused) > _CAPACITY or next(iter(self._refused.values()))[0] <= now:
            self._refused.popitem(last=False)

    def watched(self, sequence: int, *, resync: bool) -> None:
        """The feed is open, everything up to `sequence` has been seen."""
        if resync:
            self._entries.clear()
        self.sequence = sequence
        self._unwatched_since = None

    def unwatched(self) -> None:
        """The feed is broken."""
        if self._unwatched_since is None:
            self._unwatched_since = self._clock()

    def drop(self, sequence: int, *, key_id: str = "", tenant: str = "") -> None:
        """A key or a tenant has changed."""
        self.sequence = sequence
        for key, entry in list(self._entries.items()):
            if entry.principal.key_id == key_id or entry.principal.tenant == tenant:
                del self._entries[key]
