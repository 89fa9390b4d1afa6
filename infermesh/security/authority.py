"""A certificate authority in a folder, and one certificate per identity made by it.

    FOLDER/authority/ca.key, ca.crt    makes certificates; old.crt beside it while it is replaced
    FOLDER/<identity>/ca.crt, tls.crt, tls.key

Every function leaves a folder that a running mesh can read. To replace the authority under load:
`begin_replacement` (both are believed, the new one makes certificates from now on), `renew`,
`end_replacement` (the new one alone is believed).
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infermesh.config_fields import ConfigError
from infermesh.lifecycle import write_whole
from infermesh.security.certificates import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from infermesh.security.identities import SERVER_DOMAIN, Identity

AUTHORITY_LIFE = timedelta(days=3650)
_AUTHORITY = "authority"
_AUTHORITY_KEY_FILE = "ca.key"
_OLD_FILE = "old.crt"
_PRIVATE = 0o600
# Clocks of other machines may be behind.
_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate in the folder.

    Attributes:
        dns_names: beside the one by which the mesh knows it.
    """

    identity: Identity
    expires: datetime
    dns_names: tuple[str, ...]


def exists(folder: Path) -> bool:
    """Whether there is an authority in the folder."""
    return (folder / _AUTHORITY / _AUTHORITY_KEY_FILE).exists()


def create(
    folder: Path, dns_names: Mapping[Identity, Sequence[str]], life: timedelta, now: datetime
) -> None:
    """Makes an authority, and a certificate of it for every identity.

    Args:
        dns_names: more names for some of the certificates.

    Raises:
        ConfigError: there is one already, or a name is the mesh's own.
    """
    if exists(folder):
        raise ConfigError(
            f"there is a certificate authority in {folder}; --renew makes new certificates with "
            "it, --new-authority begins to replace it"
        )
    _check_names(dns_names)
    (folder / _AUTHORITY).mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_authority(folder, now)
    _issue(folder, dns_names, life, now)
    _believe(folder)


def ensure(folder: Path, life: timedelta, now: datetime) -> None:
    """What is not there is made, and what has less than a third of its life left made anew."""
    with _alone(folder):
        if not exists(folder):
            create(folder, {}, life, now)
        issued = issued_in(folder)
        if len(issued) < len(Identity) or any(one.expires - now < life / 3 for one in issued):
            renew(folder, {}, life, now)


def renew(
    folder: Path, dns_names: Mapping[Identity, Sequence[str]], life: timedelta, now: datetime
) -> None:
    """Makes every certificate and key anew; who gets no names in `dns_names` keeps those it has.

    Raises:
        ConfigError: there is no authority, or a name is the mesh's own.
    """
    _need_authority(folder)
    _check_names(dns_names)
    kept = {issued.identity: issued.dns_names for issued in issued_in(folder)}
    _issue(folder, {**kept, **dns_names}, life, now)
    _believe(folder)


def begin_replacement(folder: Path, now: datetime) -> None:
    """Makes another authority; from now on both are believed, and the new one signs.

    Raises:
        ConfigError: there is none yet, or it is being replaced already.
    """
    _need_authority(folder)
    authority = folder / _AUTHORITY
    if (authority / _OLD_FILE).exists():
        raise ConfigError(
            f"the authority in {folder} is being replaced: --renew if you have not, then "
            "--forget-old-authority"
        )
    write_whole(authority / _OLD_FILE, (authority / CA_FILE).read_text())
    _make_authority(folder, now)
    _believe(folder)


def end_replacement(folder: Path) -> None:
    """The old authority is believed no longer.

    Raises:
        ConfigError: there is no old one, or a certificate of it is still in use.
    """
    _need_authority(folder)
    old = folder / _AUTHORITY / _OLD_FILE
    if not old.exists():
        raise ConfigError(f"no authority is being replaced in {folder}")
    newest = _load(folder / _AUTHORITY / CA_FILE)
    for issued in issued_in(folder):
        if _load(folder / issued.identity.value / CERTIFICATE_FILE).issuer != newest.subject:
            raise ConfigError(
                f"the certificate of {issued.identity.value} is the old authority's; --renew first"
            )
    old.unlink()
    _believe(folder)


def issued_in(folder: Path) -> list[Issued]:
    """The certificates in the folder."""
    found = []
    for identity in Identity:
        path = folder / identity.value / CERTIFICATE_FILE
        if path.exists():
            certificate = _load(path)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            more = [
                name
                for name in names.value.get_values_for_type(x509.DNSName)
                if name != identity.server_name
            ]
            found.append(Issued(identity, certificate.not_valid_after_utc, tuple(more)))
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two meshes that start at once must not make two authorities."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _need_authority(folder: Path) -> None:
    if not exists(folder):
        raise ConfigError(f"there is no certificate authority in {folder}; make one without flags")


def _check_names(dns_names: Mapping[Identity, Sequence[str]]) -> None:
    for name in (name for names in dns_names.values() for name in names):
        if name == SERVER_DOMAIN or name.endswith(f".{SERVER_DOMAIN}"):
            raise ConfigError(f"{name}: names below {SERVER_DOMAIN} say which service it is")


def _make_authority(folder: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    # told apart from the one that it replaces
    name = _named(f"infermesh authority {now:%Y-%m-%d} {secrets.token_hex(4)}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = (
        _builder(name, key.public_key(), now, AUTHORITY_LIFE)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    certificate = builder.sign(key, hashes.SHA256())
    write_whole(folder / _AUTHORITY / CA_FILE, _pem(certificate))
    write_whole(folder / _AUTHORITY / _AUTHORITY_KEY_FILE, _pem_of_key(key), _PRIVATE)


def _issue(
    folder: Path, dns_names: Mapping[Identity, Sequence[str]], life: timedelta, now: datetime
) -> None:
    key_file = folder / _AUTHORITY / _AUTHORITY_KEY_FILE
    signer = serialization.load_pem_private_key(key_file.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)  # we made it
    authority = _load(folder / _AUTHORITY / CA_FILE)
    if authority.public_key() != signer.public_key():  # half replaced: somebody pulled the plug
        raise ConfigError(f"ca.key and ca.crt in {folder / _AUTHORITY} do not belong together")
    for identity in Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(identity.spiffe_id),
            *map(x509.DNSName, (identity.server_name, *dns_names.get(identity, ()))),
        ]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        certificate = (
            _builder(_named(identity.value), key.public_key(), now, life)
            .issuer_name(authority.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(signer, hashes.SHA256())
        )
        own = folder / identity.value
        own.mkdir(mode=0o700, exist_ok=True)
        write_whole(own / KEY_FILE, _pem_of_key(key), _PRIVATE)
        write_whole(own / CERTIFICATE_FILE, _pem(certificate))


def _believe(folder: Path) -> None:
    """Gives every identity the authorities as they are now."""
    authority = folder / _AUTHORITY
    texts = [
        path.read_text() for path in (authority / CA_FILE, authority / _OLD_FILE) if path.exists()
    ]
    for identity in Identity:
        write_whole(folder / identity.value / CA_FILE, "".join(texts))


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=key_cert_sign,
        crl_sign=crl_sign, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
