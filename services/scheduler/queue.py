"""Sequences that wait for a place, in the order of service, bounded in tokens.

Class first, then the tenant that was served least (`fairness.py`), then arrival. Whether a waiting
sequence fits on the device is the planner's question.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType

from services.scheduler.fairness import Account, Accounts, Turn, Turns
from services.scheduler.sequence import Sequence

# Highest first.
PRIORITIES = (3, 2, 1)
# How full the queue may be for a newcomer of each class: the lowest is shed first.
SHARES: Mapping[int, float] = MappingProxyType({3: 1.0, 2: 0.8, 1: 0.5})
# A tenant of weight 1 may have so many times waiting what is still free (Choudhury and Hahne,
# "Dynamic queue length thresholds", 1998): alone it leaves a fifth, and a newcomer finds room.
_FREE_FACTOR = 4


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class _Class:
    """One priority class: who waits, by tenant."""

    def __init__(self) -> None:
        self.accounts = Accounts()
        # Of those tenants alone that have anything waiting.
        self.lines: dict[Account, list[Sequence]] = {}
        self.num_tokens = 0


class WaitingQueue:
    """Who waits; who was preempted keeps the place of its arrival within its tenant."""

    def __init__(self, max_tokens: int, shares: Mapping[int, float] = SHARES) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        # Tokens that ever left for the device.
        self.num_tokens_admitted = 0
        self._num_waiting = 0
        self._shares = shares
        self._classes = {priority: _Class() for priority in PRIORITIES}

    def __len__(self) -> int:
        return self._num_waiting

    def __contains__(self, sequence: Sequence) -> bool:
        return self._find(sequence) is not None

    def limit(self, priority: int) -> int:
        """Tokens that may wait, of all classes, for a newcomer of this class to be let in."""
        return int(self.max_tokens * self._shares[priority])

    def excess(
        self, num_tokens: int, priority: int, tenant: str, weight: float, reserved: int = 0
    ) -> int:
        """Tokens that must leave before a newcomer may come; 0 where it may come now.

        An empty queue takes anything, else a long request could never be served. `reserved` are
        tokens of the tenant that have their turn before the newcomer; they can't close the queue.
        """
        if self.num_tokens == 0:
            return 0
        limit = self.limit(priority)
        reserved = min(reserved, limit // 2)
        free = limit - self.num_tokens - reserved
        excess: float = num_tokens - free
        mine = self.num_tokens_of(tenant) + reserved
        if mine:
            # Each token of its own that leaves counts twice: one less waiting, one more free.
            factor = _FREE_FACTOR * weight
            excess = max(excess, (mine + num_tokens - factor * free) / (1 + factor))
        return max(0, math.ceil(excess))

    def num_tokens_of(self, tenant: str) -> int:
        """What the tenant has waiting, in all classes."""
        accounts = (one.accounts.get(tenant) for one in self._classes.values())
        return sum(account.num_tokens for account in accounts if account is not None)

    def num_tokens_ahead(self, priority: int, tenant: str, weight: float) -> int:
        """Tokens that are served before a newcomer: higher classes, its own tenant, and of each
        other tenant what it gets until the newcomer's turn comes.
        """
        ahead = sum(self._classes[p].num_tokens for p in PRIORITIES if p > priority)
        own = self._classes[priority]
        account = own.accounts.get(tenant)
        mine = account.num_tokens if account is not None else 0
        counter = account.counter if account is not None else 0.0
        if not mine:
            counter = max(counter, own.accounts.level(own.lines.keys()))
        turn_at = counter + mine / weight
        for other in own.lines:
            if other is not account:
                ahead += min(
                    other.num_tokens, max(0, int((turn_at - other.counter) * other.weight))
                )
        return ahead + mine

    def share_of(self, priority: int, tenant: str, weight: float) -> float:
        """The part of what leaves the queue that is the tenant's, if it waits in this class."""
        weights = {
            account.tenant: account.weight
            for p in PRIORITIES
            if p >= priority
            for account in self._classes[p].lines
        }
        weights[tenant] = weight
        return weight / sum(weights.values())

    def runs_beside_others(self, sequence: Sequence, num_admitted: int) -> bool:
        """The tenant of a waiting one runs something, in a class that other tenants use lately.

        `num_admitted`: of its waiting ones that count as running by now.
        """
        own, account = self._classes[sequence.priority], sequence.account
        if account is None or not own.accounts.is_shared:
            return False
        return account.num_open + num_admitted > len(own.lines[account])

    def turns(self, priority: int, running: Seq[Sequence] = (), is_open: bool = True) -> Turns:
        """One class in the order of service; don't change the queue meanwhile.

        Args:
            running: prompts of this class on the device, with chunks to go: they have their turns
                before what their tenants have waiting.
            is_open: else nobody gets a turn who waits.
        """
        prompts: dict[Account | None, list[Sequence]] = {}
        for sequence in running:
            prompts.setdefault(sequence.account, []).append(sequence)
        waiting = self._classes[priority].lines if is_open else {}
        tenants = [
            Turn(account.counter, line[0].order, line[0], account.weight, (line,))
            for account, line in waiting.items()
            if account not in prompts
        ]
        for account, line in prompts.items():
            counter, weight = (account.counter, account.weight) if account else (0.0, 1.0)
            behind = waiting.get(account, []) if account else []
            tenants.append(Turn(counter, line[0].order, line[0], weight, (line, behind)))
        return Turns(tenants)

    def push(self, sequence: Sequence, num_tokens: int) -> None:
        """`num_tokens` are what it has to compute; preempted ones are never turned away."""
        own = self._classes[sequence.priority]
        account = sequence.account
        if account is None:
            request = sequence.request
            account = own.accounts.open(request.tenant, request.tenant_weight)
            sequence.account = account
        line = own.lines.get(account)
        if line is None:
            own.accounts.lift(account, own.lines.keys())
            line = own.lines[account] = []
        insort(line, sequence, key=_key)
        self._num_waiting += 1
        sequence.queued_tokens = num_tokens
        self._count(own, account, num_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that waits here."""
        index = self._find(sequence)
        account = sequence.account
        if index is None or account is None:
            raise ValueError("the sequence does not wait here")
        own = self._classes[sequence.priority]
        line = own.lines[account]
        del line[index]
        self._num_waiting -= 1
        if not line:
            del own.lines[account]
            own.accounts.emptied(account, own.lines.keys())
        self._count(own, account, -sequence.queued_tokens)
        sequence.queued_tokens = 0

    def admit(self, sequence: Sequence) -> bool:
        """Takes it out because it gets a place; True where it overtakes an earlier one."""
        self.num_tokens_admitted += sequence.queued_tokens
        self.remove(sequence)
        return any(
            line[0].order < sequence.order and line[0].waits_for is None
            for account, line in self._classes[sequence.priority].lines.items()
            if account is not sequence.account
        )

    def close(self, sequence: Sequence) -> None:
        """A sequence that does not wait here is over: its tenant has one less open."""
        account, sequence.account = sequence.account, None
        if account is not None:
            own = self._classes[sequence.priority]
            own.accounts.close(account, own.lines.keys())

    def service_gap(self) -> float:
        """Weighted tokens between the most and the least served of those who wait in one class."""
        gaps = [0.0]
        for one in self._classes.values():
            if len(one.lines) > 1:
                counters = [account.counter for account in one.lines]
                gaps.append(max(counters) - min(counters))
        return max(gaps)

    def num_accounts(self) -> int:
        """Tenants remembered, per class."""
        return sum(len(one.accounts) for one in self._classes.values())

    def _find(self, sequence: Sequence) -> int | None:
        """Its place in its tenant's line."""
        if sequence.account is None:
            return None
        line = self._classes[sequence.priority].lines.get(sequence.account, [])
        index = bisect_left(line, _key(sequence), key=_key)
        return index if index < len(line) and line[index] is sequence else None

    def _count(self, own: _Class, account: Account, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        own.num_tokens += num_tokens
        account.num_tokens += num_tokens
