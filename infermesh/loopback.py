"""Which addresses nobody but this machine can reach."""

import ipaddress

from infermesh.config_fields import ConfigError
from infermesh.sockets import named


def check_bind(setting: str, address: str) -> None:
    """Raises ConfigError for an address that others than this machine could reach."""
    address = named(address)
    if address.startswith("unix:"):
        return
    host = address.rpartition(":")[0].strip("[]")
    if not _is_loopback(host):
        raise ConfigError(
            f"{setting} is {address}, which other machines can reach, but keys would travel in the "
            "clear; bind it to 127.0.0.1, [::1] or a unix socket"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
