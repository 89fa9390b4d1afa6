"""Who calls: any key, or none, is the local tenant, which is safe on this machine only.

Keys, tenants and limits are the auth service's.
"""

import ipaddress
from dataclasses import dataclass

from infermesh.config import ConfigError


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf a request runs."""

    tenant: str

    def sharing_domain(self, user: str) -> str:
        """Who may share computed state with this caller: its tenant, narrowed to an end user."""
        return f"{self.tenant}/{user}" if user else self.tenant


def identify(credential: str | None) -> Principal:
    """The caller behind a credential."""
    del credential  # every key is accepted, see the module's first line
    return Principal(tenant="local")


def check_bind(setting: str, address: str) -> None:
    """Raises ConfigError for an address that others than this machine could reach."""
    if address.startswith("unix:"):
        return
    host = address.rpartition(":")[0].strip("[]")
    if not _is_loopback(host):
        raise ConfigError(
            f"{setting} is {address}, which other machines can reach, but any key is accepted "
            "so far; bind it to 127.0.0.1, [::1] or a unix socket"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
