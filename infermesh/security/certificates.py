"""One service's certificate, key and authorities, read from files and again when these change.

The names are those of a Kubernetes secret: ca.crt, tls.crt, tls.key. Makes none; see `authority`.
"""

import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from infermesh.config_fields import ConfigError
from infermesh.security.identities import Identity
from infermesh.telemetry import logs, metrics

try:
    from cryptography import x509
except ImportError:  # a bare compute host: TLS itself refuses what is wrong
    x509 = None  # type: ignore[assignment]

CA_FILE = "ca.crt"
CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"

# Of each file: inode, time, size.
_Signature = list[tuple[int, int, int]]
_log = logs.get(__name__)
_EXPIRES = metrics.gauge(
    "tls_certificate_expires_timestamp_seconds", "When this process's certificate expires."
)


@dataclass(frozen=True, slots=True)
class Material:
    """PEM texts that belong together.

    Attributes:
        authorities: whose certificates are believed.
    """

    authorities: bytes
    certificate: bytes
    key: bytes


class Certificates:
    """Those of one identity; any thread may ask.

    Args:
        folder: with the three files, or with a folder of them named as the identity.

    Raises:
        ConfigError: they can't be used.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        own = folder / identity.value
        self.folder = own if own.is_dir() else folder
        self.identity = identity
        self._lock = threading.Lock()
        self._seen = _signature(self.folder)
        self._unusable: _Signature | None = None
        self._material = _read(self.folder, identity)

    def current(self) -> Material:
        """What to use for the next connection; the same object until the files have changed.

        Files that can't be used, because somebody is just writing them, change nothing.
        """
        with self._lock:
            seen = None
            try:
                seen = _signature(self.folder)
                if seen not in (self._seen, self._unusable):
                    self._material, self._seen = _read(self.folder, self.identity), seen
                    _log.info("certificates read", extra={"folder": str(self.folder)})
            except ConfigError as exc:
                if seen is None or seen != self._unusable:
                    _log.warning("certificates not read", extra={"why": str(exc)})
                self._unusable = seen
            return self._material

    def server_credentials(self) -> grpc.ServerCredentials:
        """For one port; each handshake uses what is current, and wants a certificate."""
        served: Material | None = None

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            material = self.current()
            if material is served:
                return None
            served = material
            return _server_configuration(material)

        initial = _server_configuration(self.current())
        return grpc.dynamic_ssl_server_credentials(initial, renewed, True)


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """For channels: what a caller shows, and whom it believes."""
    return grpc.ssl_channel_credentials(material.authorities, material.key, material.certificate)


def _server_configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, material.authorities)


def _paths(folder: Path) -> Sequence[Path]:
    return [folder / name for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE)]


def _signature(folder: Path) -> _Signature:
    """Raises ConfigError where a file is not there."""
    try:
        facts = [path.stat() for path in _paths(folder)]
    except OSError as exc:
        raise ConfigError(f"security.tls_folder: {exc.filename}: {exc.strerror}") from None
    return [(one.st_ino, one.st_mtime_ns, one.st_size) for one in facts]


def _read(folder: Path, identity: Identity) -> Material:
    """The files, if they belong together. Raises ConfigError."""
    authorities, certificate, key = _paths(folder)
    before = _signature(folder)
    try:
        material = Material(authorities.read_bytes(), certificate.read_bytes(), key.read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(cadata=material.authorities.decode("ascii"))
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as exc:  # ssl's errors are OSErrors
        why = getattr(exc, "reason", None) or exc
        raise ConfigError(f"security.tls_folder: the files in {folder}: {why}") from None
    if _signature(folder) != before:
        raise ConfigError(f"security.tls_folder: the files in {folder} are changing just now")
    _check(material, folder, identity)
    return material


def _check(material: Material, folder: Path, identity: Identity) -> None:
    """Raises ConfigError for another identity's certificate, or one that has expired."""
    if x509 is None:
        return
    certificate = x509.load_pem_x509_certificate(material.certificate)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if uris != [identity.spiffe_id]:
        found = ", ".join(uris) or "none"
        raise ConfigError(
            f"security.tls_folder: the certificate in {folder} must have the one URI "
            f"{identity.spiffe_id}; it has {found}"
        )
    expires = certificate.not_valid_after_utc
    if expires.timestamp() < time.time():
        raise ConfigError(
            f"security.tls_folder: the certificate in {folder} expired at {expires:%Y-%m-%d %H:%M} "
            "UTC; `infermesh certs --renew` makes another"
        )
    _EXPIRES.set(expires.timestamp())
