"""What the pipeline asks of auth: who calls, may they, and what it cost.

Two gates: the open one here takes any key, for a gateway without an auth service; `keyed_gate`.
"""

import asyncio
from typing import Protocol

from gateway.identity import LOCAL, Principal
from gateway.records import RequestRecord


class Ticket(Protocol):
    """An admitted request's hold on its tenant's quota, until it is settled."""

    @property
    def headers(self) -> dict[str, str]:
        """The rate limits as they stood at admission."""

    def settle(self, record: RequestRecord) -> None:
        """Accounts for what the request has used; the first call counts."""

    def cancel(self) -> None:
        """The request never ran: its tokens are free again. Nothing after `settle`."""


class Gate(Protocol):
    """Who may do what."""

    async def identify(self, credential: str | None, scope: str) -> Principal:
        """The caller behind a credential.

        Raises:
            InvalidApiKey, PermissionDenied, AuthUnavailable.
        """

    async def tokens_left(self, principal: Principal) -> int | None:
        """What a request that names no `max_tokens` can hope for now; None: any number.

        Raises:
            AuthUnavailable.
        """

    async def admit(
        self, principal: Principal, num_tokens: int, record_id: str | None = None
    ) -> Ticket:
        """A place for a request that may use up to `num_tokens`.

        Args:
            record_id: of the usage record of its whole answer, which the ledger takes once; None: a
                new one.

        Raises:
            RateLimitExceeded, InsufficientQuota, AuthUnavailable.
        """

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begins what has to run beside requests."""

    async def flush(self, timeout_s: float) -> None:
        """Hands over what is still to be told, as far as there is time."""

    async def close(self) -> None:
        """Gives files and sockets back."""


class OpenGate:
    """Any key is the local tenant, without limits."""

    async def identify(self, credential: str | None, scope: str) -> Principal:
        del credential, scope
        return LOCAL

    async def tokens_left(self, principal: Principal) -> int | None:
        del principal
        return None

    async def admit(
        self, principal: Principal, num_tokens: int, record_id: str | None = None
    ) -> Ticket:
        del principal, num_tokens, record_id
        return _FREE

    def start(self, tasks: asyncio.TaskGroup) -> None:
        del tasks

    async def flush(self, timeout_s: float) -> None:
        del timeout_s

    async def close(self) -> None:
        return None


class _FreeTicket:
    @property
    def headers(self) -> dict[str, str]:
        return {}

    def settle(self, record: RequestRecord) -> None:
        del record

    def cancel(self) -> None:
        return None


_FREE = _FreeTicket()
