"""Virtual token counters: what each tenant of a priority class was served, over its weight.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with prompts charged chunk by
chunk instead of whole: so a long prompt shares each step with those who were served less.
`queue.py` keeps who waits; here is only how much everybody had, and whose turn that makes it.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from services.scheduler.sequence import Sequence

# The paper's prices. A generated token costs a row in a step of its own, and that step's read of
# all weights and of its context; prompt tokens share one.
INPUT_COST, OUTPUT_COST = 1, 2
# Tenants that are gone and were served more than those who wait: their counters are kept, up to
# so many. Past that the smallest lead is forgiven.
_MAX_DEBTORS = 1024
# Sequences back to which it is remembered whose they were.
_COMPANY = 1024


@dataclass(slots=True, eq=False)
class Account:
    """One tenant in one class."""

    tenant: str
    weight: float
    counter: float = 0.0
    # Its sequences that wait or run.
    num_open: int = 0
    # Tokens that it has waiting.
    num_tokens: int = 0

    def charge(self, cost: float) -> None:
        """It was served that much."""
        self.counter += cost / self.weight


class Accounts:
    """Everybody's account in one class; forgets whoever would gain or lose nothing by it."""

    def __init__(self) -> None:
        self._of_tenant: dict[str, Account] = {}
        self._num_open = 0
        # Who was the last to have anything waiting, when nobody has.
        self._last: Account | None = None
        self._lately: deque[str] = deque()
        self._num_lately: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._of_tenant)

    @property
    def is_shared(self) -> bool:
        """More than one tenant came lately."""
        return len(self._num_lately) > 1

    def get(self, tenant: str) -> Account | None:
        """The tenant's account, if it has one."""
        return self._of_tenant.get(tenant)

    def open(self, tenant: str, weight: float) -> Account:
        """One more sequence of the tenant; its weight is the last one told."""
        account = self._of_tenant.get(tenant)
        if account is None:
            account = self._of_tenant[tenant] = Account(tenant, weight)
        account.weight = weight
        account.num_open += 1
        self._num_open += 1
        self._note(tenant)
        return account

    def lift(self, account: Account, backlogged: Collection[Account]) -> None:
        """It had nothing waiting and now has: no credit for the time between.

        `backlogged`: the others that have anything waiting.
        """
        account.counter = max(account.counter, self.level(backlogged))

    def level(self, backlogged: Collection[Account]) -> float:
        """Where a newcomer starts: with the least served of those who wait, or the last who did."""
        if backlogged:
            return min(account.counter for account in backlogged)
        return self._last.counter if self._last is not None else 0.0

    def emptied(self, account: Account, backlogged: Collection[Account]) -> None:
        """The last that it had waiting is gone."""
        if not backlogged:
            self._last = account

    def close(self, account: Account, backlogged: Collection[Account]) -> None:
        """One of its sequences is over."""
        account.num_open -= 1
        self._num_open -= 1
        if self._num_open == 0:  # nobody competes: all begin anew
            self._of_tenant.clear()
            self._last = None
        elif account.num_open == 0:
            level = self.level(backlogged)
            if account.counter <= level:  # it would be lifted anyway
                del self._of_tenant[account.tenant]
            elif len(self._of_tenant) > 2 * self._num_open + _MAX_DEBTORS:
                self._sweep(level)

    def _note(self, tenant: str) -> None:
        self._lately.append(tenant)
        self._num_lately[tenant] += 1
        if len(self._lately) > _COMPANY:
            oldest = self._lately.popleft()
            self._num_lately[oldest] -= 1
            if not self._num_lately[oldest]:
                del self._num_lately[oldest]

    def _sweep(self, level: float) -> None:
        """Drops the accounts that mean nothing any more, and the smallest leads past the bound."""
        debtors = [one for one in self._of_tenant.values() if one.num_open == 0]
        debtors.sort(key=lambda one: one.counter, reverse=True)
        for rank, account in enumerate(debtors):
            if account.counter <= level or rank >= _MAX_DEBTORS // 2:
                del self._of_tenant[account.tenant]


class Turn(NamedTuple):
    """A tenant whose turn comes by `counter`, and at equal ones by the order of `sequence`."""

    counter: float
    order: tuple[int, int]
    sequence: Sequence
    weight: float
    # The tenant's sequences from this one on: lists to be read one after another, or what is left.
    rest: tuple[Seq[Sequence], ...] | Iterator[Sequence]


class Turns:
    """Whose turn it is while a plan gives tokens away: the tenant's that was served least.

    Counts what the plan gave, and changes nothing else. `tenants` is one turn each, the first.
    """

    def __init__(self, tenants: list[Turn]) -> None:
        heapq.heapify(tenants)
        self._heap = tenants
        self._cost = 0
        self._is_line_over = False
        self._is_closed = False

    def __iter__(self) -> Iterator[Sequence]:
        heap = self._heap
        while heap:
            counter, _, sequence, weight, rest = heap[0]
            self._cost, self._is_line_over = 0, False
            yield sequence
            if isinstance(rest, tuple):
                rest = chain.from_iterable(rest)
                next(rest)
            following = None if self._is_line_over else next(rest, None)
            if following is None:
                heapq.heappop(heap)
            else:
                counter += self._cost / weight
                turn = Turn(counter, following.order, following, weight, rest)
                heapq.heapreplace(heap, turn)
            if self._is_closed:  # a thousand tenants that wait need not be asked
                heap[:] = [turn for turn in heap if turn.sequence.placement is not None]
                heapq.heapify(heap)

    def charge(self, cost: int) -> None:
        """The one whose turn it is gets that much of this plan."""
        self._cost = cost

    def end_line(self) -> None:
        """Nobody else of this tenant gets a turn."""
        self._is_line_over = True

    def close(self) -> None:
        """Nobody gets a turn any more who waits; each tenant's running prompts come first."""
        self._is_closed = True


def counter_of(sequence: Sequence) -> float:
    """What its tenant was served."""
    return sequence.account.counter if sequence.account is not None else 0.0


def cost_of_known(sequence: Sequence, first: int, end: int) -> int:
    """What computing its known tokens from `first` to `end` - 1 costs: a second time, nothing.

    That it lost its place was our doing, and its client got nothing for it.
    """
    return INPUT_COST * max(0, end - max(first, sequence.num_charged))


def charge_known(sequence: Sequence, first: int, end: int) -> None:
    """Those tokens are on their way to the device."""
    if sequence.account is not None:
        sequence.account.charge(cost_of_known(sequence, first, end))
    sequence.num_charged = max(sequence.num_charged, end)


def charge_output(sequence: Sequence) -> None:
    """Its last token was generated and kept."""
    account = sequence.account
    if account is not None:
        account.counter += OUTPUT_COST / account.weight
    sequence.num_charged = len(sequence.token_ids)
