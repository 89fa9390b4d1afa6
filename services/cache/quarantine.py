"""Requests whose cached answer was reported as wrong: kept out for a time. Pure state."""

from __future__ import annotations

from collections.abc import Iterator

from services.cache.domain import EntryId, ScopedKey


class Quarantine:
    """Until when each exact key is kept out, and by which entry's report."""

    def __init__(self) -> None:
        self._until: dict[ScopedKey, tuple[float, EntryId]] = {}

    def __len__(self) -> int:
        return len(self._until)

    def __iter__(self) -> Iterator[tuple[ScopedKey, float, EntryId]]:
        return ((key, until_s, entry_id) for key, (until_s, entry_id) in self._until.items())

    def add(self, exact: ScopedKey, until_s: float, entry_id: EntryId) -> None:
        """Keeps a key out until then."""
        self._until[exact] = (until_s, entry_id)

    def holds(self, exact: ScopedKey, now_s: float) -> bool:
        """Whether the key is kept out now."""
        found = self._until.get(exact)
        return found is not None and found[0] > now_s

    def domain_of(self, entry_id: EntryId) -> str | None:
        """The sharing domain of the entry that was reported before; None where none was."""
        for (domain, _, _), (_, reported) in self._until.items():
            if reported == entry_id:
                return domain
        return None

    def expire(self, now_s: float) -> None:
        """Ends what is over."""
        self._until = {key: held for key, held in self._until.items() if held[0] > now_s}
