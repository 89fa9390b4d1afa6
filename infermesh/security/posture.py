"""What protects one process: checked before it listens or connects, and said when it serves.

address                         beyond this machine only with
of a service, or of its peers   TLS, or security.allow=plaintext
the gateway's HTTP and gRPC     a key asked for, or allow=no-auth; and allow=plaintext
the gateway's admin port        allow=admin
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from infermesh.config import ConfigError, SecurityConfig
from infermesh.loopback import is_local
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.sockets import named
from infermesh.telemetry import logs

PLAINTEXT = "plaintext"
NO_AUTH = "no-auth"
ADMIN = "admin"
DANGERS = (PLAINTEXT, NO_AUTH, ADMIN)
_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Security:
    """The protection of one process.

    Attributes:
        certificates: of mutual TLS; None: plaintext.
        allow: the dangers that the operator means to run.
    """

    certificates: Certificates | None = None
    allow: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: SecurityConfig, identity: Identity) -> Self:
        """Raises ConfigError for a danger that does not exist, or certificates that can't serve."""
        for danger in config.allow:
            if danger not in DANGERS:
                raise ConfigError(
                    f"security.allow has {danger!r}; it must be of {', '.join(DANGERS)}"
                )
        certificates = None
        if config.tls_folder:
            certificates = Certificates(Path(config.tls_folder).expanduser(), identity)
        return cls(certificates, frozenset(config.allow))

    def check_service(self, setting: str, address: str) -> None:
        """Raises ConfigError for an address of the mesh's own where nothing hides what is said."""
        if self.certificates is None and not is_local(address):
            why = "what is said there would travel in the clear: set security.tls_folder"
            self._refuse(PLAINTEXT, setting, address, why)

    def check_peers(self, setting: str, addresses: Iterable[str]) -> None:
        """The same for addresses that it connects to."""
        for address in addresses:
            self.check_service(setting, address)

    def check_store(self, setting: str, address: str, encrypted: bool) -> None:
        """Raises ConfigError for a store beyond this machine that is spoken to in the clear: the
        mesh's own certificates don't protect what is said there.
        """
        if not encrypted and not is_local(address):
            why = "its password would travel in the clear: use rediss://"
            self._refuse(PLAINTEXT, setting, address, why)

    def check_public(self, setting: str, address: str, asks_for_keys: bool) -> None:
        """Raises ConfigError for a public address that anybody could use, or read along."""
        if is_local(address):
            return
        if not asks_for_keys:
            why = "no key would be asked for: set gateway.auth"
            self._refuse(NO_AUTH, setting, address, why)
        why = "keys would travel in the clear: put something that ends TLS before it"
        self._refuse(PLAINTEXT, setting, address, why)

    def check_admin(self, setting: str, address: str) -> None:
        """Raises ConfigError for an admin port that others can reach."""
        if not is_local(address):
            self._refuse(ADMIN, setting, address, "this port asks for no key")

    def _refuse(self, danger: str, setting: str, address: str, why: str) -> None:
        if danger not in self.allow:
            where = named(address)
            raise ConfigError(
                f"{setting} is {where}, which other machines can reach, and {why}; or keep to "
                f"127.0.0.1, [::1] or a unix socket; or allow it with security.allow={danger}"
            )

    def report(self, addresses: Mapping[str, str], **facts: Any) -> None:
        """One line when a process serves: what protects it."""
        tls = self.certificates
        _log.info(
            "security",
            extra={
                "mtls": "off" if tls is None else f"on, as {tls.identity.value}",
                "callers": "anybody on this machine" if tls is None else "by allow-list",
                "listens": dict(addresses),
                "allowed_dangers": sorted(self.allow),
                **facts,
            },
        )

    def sentence(self, addresses: Iterable[str], asks_for_keys: bool) -> str:
        """The same for a person: keys, TLS, who reaches the mesh."""
        keys = "asks for API keys" if asks_for_keys else "takes any API key"
        tls = "mutual TLS" if self.certificates else "plaintext on private sockets"
        reached = [address for address in addresses if not is_local(address)]
        where = f"other machines reach {', '.join(reached)}" if reached else "this machine alone"
        dangers = f" · allowed: {', '.join(sorted(self.allow))}" if self.allow else ""
        return f"{keys} · {tls} between services · {where}{dangers}"


LOCAL = Security()
