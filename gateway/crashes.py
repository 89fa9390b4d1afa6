"""How often each choice of a request was lost with its replica or device, without a token since.

A token proves that the choice did not break what computed it; an innocent stream may live through
any number of crashes. The count travels with the request to the next replica.
"""

from collections.abc import Iterable

# Then it runs alone; one more, and it is the culprit.
SUSPECT = 2
CONVICTED = 3


class Crashes:
    """Counts per choice."""

    def __init__(self, num_choices: int) -> None:
        self._counts = [0] * num_choices

    def got_token(self, choice: int) -> None:
        """It computes."""
        self._counts[choice] = 0

    def crashed(self, choices: Iterable[int]) -> None:
        """These were in flight at one more."""
        for choice in choices:
            self._counts[choice] += 1

    def told(self, choices: Iterable[int], count: int) -> None:
        """Their replica counts for all that are open; those it does not mean get a token soon."""
        for choice in choices:
            self._counts[choice] = max(self._counts[choice], count)

    def worst(self, choices: Iterable[int]) -> int:
        """The most of these choices."""
        return max((self._counts[choice] for choice in choices), default=0)
