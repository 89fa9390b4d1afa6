"""When a usage record is given up: the ledger refuses it alone, again and again, and takes others.

Pure. A ledger that takes nothing at all is broken itself: then no record is to blame.
"""

from dataclasses import dataclass

# So often alone, in as many rounds.
FINAL_REFUSALS = 4
_MAX_SUSPECTS = 10_000


@dataclass(slots=True)
class _Suspect:
    num_refusals: int
    # what the ledger had taken when the round of the first refusal began
    taken_before: int


class Refusals:
    """What is known of the records that were refused lately."""

    def __init__(self) -> None:
        self._num_taken = 0
        self._taken_before_round = 0
        self._suspects: dict[str, _Suspect] = {}

    def begin_round(self) -> None:
        """Each record is sent once per round at most."""
        self._taken_before_round = self._num_taken

    def took(self, num_records: int) -> None:
        """The ledger has these."""
        self._num_taken += num_records

    @property
    def has_progressed(self) -> bool:
        """Anything was taken in this round."""
        return self._num_taken > self._taken_before_round

    def refused_alone(self, record_id: str) -> bool:
        """Notes a refusal of one record by itself; whether it is given up."""
        found = self._suspects.setdefault(record_id, _Suspect(0, self._taken_before_round))
        found.num_refusals += 1
        is_final = found.num_refusals >= FINAL_REFUSALS and self._num_taken > found.taken_before
        if is_final or len(self._suspects) > _MAX_SUSPECTS:
            del self._suspects[record_id]  # without room it starts again: it is kept for longer
        return is_final
