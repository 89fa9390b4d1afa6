"""The certificate authority in a folder: what it makes, refuses, and replaces."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from infermesh.config import ConfigError
from infermesh.security import authority
from infermesh.security.identities import Identity
from tests import certificates

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LIFE = timedelta(days=90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return certificates.make(tmp_path / "tls", LIFE, NOW)


def load(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


def believed(folder: Path, believer: Identity, shower: Identity) -> bool:
    """Whether one of the authorities that `believer` has signed the certificate of `shower`."""
    (certificate,) = load(folder / shower.value / "tls.crt")
    for one in load(folder / believer.value / "ca.crt"):
        if one.subject == certificate.issuer:
            certificate.verify_directly_issued_by(one)
            return True
    return False


@pytest.mark.parametrize("identity", Identity)
def test_certificate_names_its_identity_and_nothing_else(folder: Path, identity: Identity) -> None:
    (made,) = load(folder / identity.value / "tls.crt")
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        f"spiffe://infermesh/{identity.value}"
    ]
    assert names.get_values_for_type(x509.DNSName) == [f"{identity.value}.infermesh.internal"]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.not_valid_after_utc == NOW + LIFE
    assert believed(folder, Identity.SHARD, identity)


def test_keys_are_their_owners_alone(folder: Path) -> None:
    keys = [*folder.glob("*/*.key")]
    assert len(keys) == len(Identity) + 1
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((folder / "authority").stat().st_mode) == 0o700


def test_create_overwrites_no_authority(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    with pytest.raises(ConfigError, match="there is a certificate authority"):
        authority.create(folder, {}, LIFE, NOW)
    assert {path: path.read_bytes() for path in folder.glob("*/*")} == before


def test_renew_makes_new_keys_and_keeps_names(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    authority.create(folder, {Identity.GATEWAY: ["api.example.org"]}, LIFE, NOW)
    key = (folder / "gateway" / "tls.key").read_bytes()
    authority.renew(folder, {}, LIFE, NOW + LIFE)
    gateway = next(i for i in authority.issued_in(folder) if i.identity is Identity.GATEWAY)
    assert gateway.dns_names == ("api.example.org",)
    assert gateway.expires == NOW + 2 * LIFE
    assert (folder / "gateway" / "tls.key").read_bytes() != key
    assert believed(folder, Identity.AUTH, Identity.GATEWAY)


def test_names_that_say_which_service_it_is_are_refused(tmp_path: Path) -> None:
    names = {Identity.GATEWAY: ["shard.infermesh.internal"]}
    with pytest.raises(ConfigError, match=r"names below infermesh\.internal"):
        authority.create(tmp_path / "tls", names, LIFE, NOW)


def test_everybody_is_believed_at_each_step_of_a_replacement(folder: Path) -> None:
    (old,) = load(folder / "authority" / "ca.crt")

    def all_believed() -> bool:
        return all(believed(folder, a, b) for a in Identity for b in Identity)

    authority.begin_replacement(folder, NOW)
    assert all_believed()
    with pytest.raises(ConfigError, match="--renew first"):
        authority.end_replacement(folder)
    with pytest.raises(ConfigError, match="being replaced"):
        authority.begin_replacement(folder, NOW)
    authority.renew(folder, {}, LIFE, NOW)
    assert all_believed()
    assert old in load(folder / "gateway" / "ca.crt")
    authority.end_replacement(folder)
    assert all_believed()
    assert old not in load(folder / "gateway" / "ca.crt")


def test_half_a_replaced_authority_signs_nothing(folder: Path, tmp_path: Path) -> None:
    other = certificates.make(tmp_path / "other", LIFE, NOW)
    (folder / "authority" / "ca.crt").write_bytes((other / "authority" / "ca.crt").read_bytes())
    with pytest.raises(ConfigError, match="do not belong together"):
        authority.renew(folder, {}, LIFE, NOW)


def test_ensure_renews_in_the_last_third_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tls"

    def expiry() -> datetime:
        return authority.issued_in(folder)[0].expires

    authority.ensure(folder, LIFE, NOW)
    authority.ensure(folder, LIFE, NOW + LIFE / 2)
    assert expiry() == NOW + LIFE
    authority.ensure(folder, LIFE, NOW + LIFE * 3 / 4)
    assert expiry() == NOW + LIFE * 7 / 4
