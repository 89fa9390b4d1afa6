"""Tells the auth service what was used without a lease: by a lease of its own, which gets nothing.

    begin (an empty lease) -> spend (totals) -> close

Each step is repeated until it is answered, so that an answer that was lost counts nothing twice.
Pure: decides what is said next.
"""

import dataclasses
import secrets

from gateway.auth.account import Grant, State
from infermesh.quota import NOTHING, Amounts

_BEGIN, _SPEND, _CLOSE, _DONE = range(4)


class Debt:
    """One tenant's, of one moment."""

    def __init__(self, tenant: str, amounts: Amounts) -> None:
        self.tenant = tenant
        self.amounts = amounts
        self._lease_id = secrets.token_hex(16)
        self._step = _BEGIN

    @property
    def is_settled(self) -> bool:
        """The auth service has it, and holds nothing for it."""
        return self._step == _DONE

    def state(self) -> State:
        """What to report."""
        spent = NOTHING if self._step == _BEGIN else self.amounts
        state = State(self._lease_id, self.tenant, spent, NOTHING, NOTHING, NOTHING, NOTHING)
        return dataclasses.replace(state, closing=self._step == _CLOSE)

    def answered(self, grant: Grant) -> None:
        """Goes on to the next step.

        A lease that ran out before it was spent from begins again: counted twice where only the
        answer was late, which is better than never. An unknown tenant owes nothing.
        """
        if grant.ended and self._step == _SPEND:
            self._lease_id = secrets.token_hex(16)
            self._step = _BEGIN
        elif grant.ended:
            self._step = _DONE
        else:
            self._step += 1
