"""Certificates for tests: an authority of their own, whose certificates expire when they say."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infermesh.security import authority
from infermesh.security.certificates import Certificates, Material
from infermesh.security.identities import Identity

DAY = timedelta(days=1)


def make(folder: Path, life: timedelta = DAY, now: datetime | None = None) -> Path:
    """A folder as `infermesh certs` makes it."""
    authority.create(folder, {}, life, now or datetime.now(UTC))
    return folder


def renew(folder: Path) -> None:
    """New certificates and keys of the same authority."""
    authority.renew(folder, {}, DAY, datetime.now(UTC))


def replace_authority(folder: Path) -> None:
    """Another authority, all steps of it; who reads the folder at any moment can go on."""
    authority.begin_replacement(folder, datetime.now(UTC))
    renew(folder)
    authority.end_replacement(folder)


def of(folder: Path, identity: Identity) -> Certificates:
    """Those of one identity."""
    return Certificates(folder, identity)


def signed(folder: Path, into: Path, *uris: str) -> Path:
    """A folder with a certificate that the authority of `folder` has signed, of these URIs."""
    signer = serialization.load_pem_private_key(
        (folder / "authority" / "ca.key").read_bytes(), None
    )
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate((folder / "authority" / "ca.crt").read_bytes())
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
    if uris:
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    into.mkdir()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (into / "tls.crt").write_bytes(certificate.public_bytes(pem))
    (into / "tls.key").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    shutil.copy(folder / "gateway" / "ca.crt", into / "ca.crt")
    return into


def material(folder: Path) -> Material:
    """What is in a folder, whoever it is of."""
    return Material(*((folder / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key")))
