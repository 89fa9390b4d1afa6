"""Which versions speak with each other. Pure: a caller's words in, a verdict out.

The *version* is for people. The *protocol* is what counts between processes: a number that rises
only where a message changes its meaning for somebody who does not know. Each side also says the
oldest protocol that it still speaks; both ranges are in the user agent of every call.
"""

import re
from dataclasses import dataclass

import infermesh

# 1: the first. Raise PROTOCOL with such a change, and OLDEST_PROTOCOL a release later.
PROTOCOL = 1
OLDEST_PROTOCOL = 1

_TOKEN = re.compile(
    r"(?:^| )infermesh/([0-9A-Za-z.+-]{1,40}) \(protocol (\d{1,6}); oldest (\d{1,6})\)"
)
_MINOR = re.compile(r"(\d{1,6})\.(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Build:
    """One side of a connection."""

    version: str
    protocol: int
    oldest_protocol: int

    def __str__(self) -> str:
        return f"infermesh/{self.version} (protocol {self.protocol}; oldest {self.oldest_protocol})"


HERE = Build(infermesh.__version__, PROTOCOL, OLDEST_PROTOCOL)


def from_user_agent(words: str) -> Build | None:
    """The build that a caller names; None where it names none: it is too old to,
    or none of ours."""
    found = _TOKEN.search(words)
    return Build(found[1], int(found[2]), int(found[3])) if found else None


def incompatibility(service: str, here: Build, caller: Build) -> str | None:
    """The sentence that refuses a caller, with both versions and what to upgrade; None: they agree.

    Args:
        service: the one that is called.
    """
    both = (
        f"{service} is version {here.version}, which speaks protocols {here.oldest_protocol} to "
        f"{here.protocol}; its caller is version {caller.version}, which speaks "
        f"{caller.oldest_protocol} to {caller.protocol}"
    )
    if caller.protocol < here.oldest_protocol:
        return f"{both}: upgrade the caller first"
    if here.protocol < caller.oldest_protocol:
        return f"{both}: upgrade {service} first"
    return None


def are_far_apart(one: str, other: str) -> bool:
    """They differ by more than one minor version, or in the major one: not tested together."""
    first, second = _MINOR.match(one), _MINOR.match(other)
    if first is None or second is None:
        return one != other
    return first[1] != second[1] or abs(int(first[2]) - int(second[2])) > 1
