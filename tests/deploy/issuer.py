"""What cert-manager does with the chart's Certificates: the Secrets that they ask for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.deploy import chart

_USAGES = {
    "server auth": ExtendedKeyUsageOID.SERVER_AUTH,
    "client auth": ExtendedKeyUsageOID.CLIENT_AUTH,
}
_Key = ec.EllipticCurvePrivateKey


def issue(objects: list[chart.Manifest]) -> dict[str, dict[str, str]]:
    """Secret name to its files, of every Certificate whose issuer chain is among the objects."""
    certificates = chart.of_kind(objects, "Certificate")
    issuers = chart.of_kind(objects, "Issuer")
    authorities: dict[str, tuple[x509.Certificate, _Key]] = {}
    for one in certificates.values():
        if one["spec"].get("isCA"):
            assert "selfSigned" in issuers[one["spec"]["issuerRef"]["name"]]["spec"]
            authorities[one["spec"]["secretName"]] = _sign(one["spec"], None)
    secrets = {}
    for one in certificates.values():
        spec = one["spec"]
        if not spec.get("isCA"):
            authority = authorities[issuers[spec["issuerRef"]["name"]]["spec"]["ca"]["secretName"]]
            certificate, key = _sign(spec, authority)
            secrets[spec["secretName"]] = {
                "ca.crt": _pem(authority[0]),
                "tls.crt": _pem(certificate),
                "tls.key": key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                ).decode(),
            }
    return secrets


def _sign(
    spec: chart.Manifest, authority: tuple[x509.Certificate, _Key] | None
) -> tuple[x509.Certificate, _Key]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec.get("commonName", "none"))])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(authority[0].subject if authority else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=int(spec["duration"].removesuffix("h"))))
        .add_extension(x509.BasicConstraints(ca=bool(spec.get("isCA")), path_length=None), True)
    )
    names = [
        *(x509.UniformResourceIdentifier(uri) for uri in spec.get("uris", ())),
        *(x509.DNSName(dns) for dns in spec.get("dnsNames", ())),
    ]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    usages = [_USAGES[usage] for usage in spec.get("usages", ()) if usage in _USAGES]
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    return builder.sign(authority[1] if authority else key, hashes.SHA256()), key


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
