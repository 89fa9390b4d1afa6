"""What a replica's past says of sending it requests: its circuit, and its slow start on return.

Owns what counts as a failure: a session that breaks, a lost device, a submit that fails in the
replica. A drain is none.
"""

import random
import time

from gateway.breaker import Circuit, CircuitBreaker, SlowStart
from infermesh.errors import Draining, Internal, MeshError, ProtocolViolation


class Admittance:
    """Of one replica."""

    def __init__(self) -> None:
        self.breaker = CircuitBreaker(time.monotonic, random.random)
        self.slow_start = SlowStart(time.monotonic)
        self._was_able = (False, False)
        self._was_ever_able = False

    @property
    def held_back(self) -> bool:
        """Time alone lets more requests go there."""
        return self.breaker.circuit is not Circuit.CLOSED or self.slow_start.active

    def permits(self, resumed: bool) -> bool:
        """Its circuit lets a request through; one of the many that waited for it, in its turn."""
        return self.breaker.permits and (not resumed or self.slow_start.permits)

    def chosen(self, resumed: bool) -> None:
        """A request is to be sent there."""
        self.breaker.chosen()
        if resumed:
            self.slow_start.chosen()

    def succeeded(self) -> None:
        """A request got a token."""
        if self.breaker.succeeded():
            self.slow_start.begin()

    def refused(self, error: MeshError) -> None:
        """A request was refused."""
        if isinstance(error, (Internal, ProtocolViolation)):
            self.breaker.failed()

    def lost(self, error: MeshError | None = None) -> None:
        """Its session broke, or it lost its device."""
        if not isinstance(error, Draining):
            self.breaker.failed()

    def seen(self, routable: bool, serving: bool) -> None:
        """What it is now; one that was able before, and is again, has returned."""
        able = (routable, routable and serving)
        returned = any(now and not before for now, before in zip(able, self._was_able, strict=True))
        if returned and self._was_ever_able:
            self.slow_start.begin()
        self._was_able = able
        self._was_ever_able |= all(able)
