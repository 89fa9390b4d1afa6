"""What the auth service asks of a store of leases; the database and Redis are the two that there
are.
"""

from __future__ import annotations

from typing import Protocol

from services.auth.values import Gateway, Grant, Report


class LeaseStore(Protocol):
    """Quota of every tenant: what is settled, and what is open with gateways."""

    async def hello(self, gateway: Gateway) -> None:
        """Ends the leases of earlier runs of this gateway, whose requests ended with them.

        Raises:
            AuthUnavailable: the store does not answer.
        """

    async def report(self, gateway: Gateway, report: Report) -> Grant:
        """Takes in what was spent and returned, and grants what there is room for, at once.

        Raises:
            AuthUnavailable: the store does not answer.
        """
