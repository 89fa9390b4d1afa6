"""A service's files: which are taken, when they are read again, what is refused."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infermesh.config import ConfigError
from infermesh.security.identities import Identity
from tests import certificates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return certificates.make(tmp_path / "tls")


def test_files_are_found_in_the_folder_or_below_it(folder: Path) -> None:
    above = certificates.of(folder, Identity.SHARD)
    inside = certificates.of(folder / "shard", Identity.SHARD)
    assert above.current() == inside.current()


def test_unchanged_files_are_the_same_object(folder: Path) -> None:
    found = certificates.of(folder, Identity.SHARD)
    assert found.current() is found.current()


def test_changed_files_are_read_again(folder: Path) -> None:
    found = certificates.of(folder, Identity.SHARD)
    before = found.current()
    certificates.renew(folder)
    assert found.current().key == (folder / "shard" / "tls.key").read_bytes() != before.key


def test_a_key_without_its_certificate_changes_nothing(folder: Path, tmp_path: Path) -> None:
    found = certificates.of(folder, Identity.SHARD)
    before = found.current()
    other = certificates.make(tmp_path / "other")
    shutil.copy(other / "shard" / "tls.key", folder / "shard" / "tls.key")
    assert found.current() is before
    shutil.copy(other / "shard" / "tls.crt", folder / "shard" / "tls.crt")
    assert found.current().certificate == (other / "shard" / "tls.crt").read_bytes()


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key"])
@pytest.mark.parametrize("text", [None, "", "no certificate"])
def test_what_cannot_be_used_is_refused_at_the_start_and_ignored_later(
    folder: Path, name: str, text: str | None
) -> None:
    path = folder / "shard" / name
    found = certificates.of(folder, Identity.SHARD)
    before = found.current()
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert found.current() is before
    with pytest.raises(ConfigError, match=r"security\.tls_folder: .*shard"):
        certificates.of(folder, Identity.SHARD)


def test_certificate_of_another_identity_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"spiffe://infermesh/shard; it has .*/cache"):
        certificates.of(folder / "cache", Identity.SHARD)


def test_bare_host_reads_them_without_the_library_that_looks_inside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infermesh.security.certificates.x509", None)
    found = certificates.of(folder, Identity.SHARD)
    assert found.current().key == (folder / "shard" / "tls.key").read_bytes()
    other = certificates.make(tmp_path / "other")
    shutil.copy(other / "shard" / "tls.key", folder / "shard" / "tls.key")
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        certificates.of(folder, Identity.SHARD)


def test_expired_certificate_is_refused(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=9)
    folder = certificates.make(tmp_path / "tls", timedelta(days=1), long_ago)
    with pytest.raises(ConfigError, match=r"expired at .*--renew"):
        certificates.of(folder, Identity.SHARD)
