"""What becomes of requests that no lease covers while the auth service, or its Redis, is away.

    closed   they wait a little, and are refused (503)
    open     their tenants' own limits are kept here, by this gateway alone, for a bounded time

Knows since when nobody answered; asks nobody itself.
"""

from dataclasses import dataclass

from gateway.auth.debt import Debt
from gateway.auth.metrics import FAIL_OPEN, OPEN_ADMISSIONS
from gateway.auth.open_account import OpenAccount, may_open
from infermesh.quota import NOTHING, Amounts, Limits
from infermesh.telemetry import logs

_log = logs.get(__name__)
# An instance that is replaced, and another that takes over, are no outage.
OPEN_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class FailPolicy:
    """As in `gateway.auth_fail_policy` and what begins like it.

    Attributes:
        max_s: of an outage; after that it is as if closed.
        share: of each tenant's limits, for this gateway.
    """

    is_open: bool = False
    max_s: float = 60.0
    share: float = 1.0


CLOSED = FailPolicy()


class FailOpen:
    """The outage, if there is one, and what was admitted in it."""

    def __init__(self, policy: FailPolicy) -> None:
        self._policy = policy
        self._accounts: dict[str, OpenAccount] = {}
        self._debts: list[Debt] = []
        self._unanswered_since: float | None = None
        self._was_open = False
        self._num_admitted = 0

    def asked(self, now: float) -> None:
        """A question is on its way, or could not be sent."""
        if self._unanswered_since is None:
            self._unanswered_since = now
        self._tell(self.is_open(now))

    def answered(self) -> None:
        """The auth service grants."""
        self._unanswered_since = None
        self._tell(False)

    def is_open(self, now: float) -> bool:
        """Requests may be admitted without a lease."""
        since = self._unanswered_since
        if not self._policy.is_open or since is None:
            return False
        return since + OPEN_AFTER_S <= now < since + self._policy.max_s

    def admits(self, limits: Limits, now: float) -> bool:
        """Requests of a tenant with these limits may be."""
        return self.is_open(now) and may_open(limits)

    def reserve(self, tenant: str, limits: Limits, cost: Amounts, now: float) -> OpenAccount:
        """Admits one request; whose account settles it.

        Raises:
            RateLimitExceeded: this gateway has admitted what it may.
        """
        account = self._account(tenant)
        account.reserve(limits, self._policy.share, cost, now)
        if cost != NOTHING:
            self._num_admitted += 1
            OPEN_ADMISSIONS.inc()
        return account

    def tokens_left(self, tenant: str, limits: Limits, now: float) -> int:
        """What a request of a tenant with a limit of tokens can hope for."""
        return self._account(tenant).left(limits, self._policy.share, now).tokens

    def debts(self, now: float) -> list[Debt]:
        """What is to be told now that the auth service answers."""
        for tenant, account in list(self._accounts.items()):
            owed = account.take_owed()
            if owed != NOTHING:
                self._debts.append(Debt(tenant, owed))
            if account.is_idle(now):
                del self._accounts[tenant]
        self._debts = [debt for debt in self._debts if not debt.is_settled]
        return list(self._debts)

    def _account(self, tenant: str) -> OpenAccount:
        return self._accounts.setdefault(tenant, OpenAccount(tenant))

    def _tell(self, is_open: bool) -> None:
        if is_open == self._was_open:
            return
        self._was_open = is_open
        FAIL_OPEN.set(is_open)
        if is_open:
            self._num_admitted = 0
            _log.error("quota fails open: requests are admitted without leases")
        else:
            _log.error("quota fails open no more", extra={"num_admitted": self._num_admitted})
