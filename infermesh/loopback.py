"""Which addresses nobody but this machine can reach."""

import ipaddress

from infermesh.sockets import named


def is_local(address: str) -> bool:
    """Whether an address, to listen or to connect, is of this machine alone."""
    address = named(address)
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
