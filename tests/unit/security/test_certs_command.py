"""`infermesh certs`: what it makes, shows, and refuses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from infermesh.cli import app
from infermesh.config import ConfigError
from infermesh.security.identities import Identity


def certs(folder: Path, *arguments: str) -> str:
    """Its output. Raises what it raises."""
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(app, ["certs", "--folder", str(folder), *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_certs_shows_every_identity_its_expiry_and_its_names(tmp_path: Path) -> None:
    made = certs(tmp_path / "tls", "--days", "30", "--dns", "gateway=api.example.org")
    for identity in Identity:
        assert identity.spiffe_id in made
    assert "api.example.org" in made
    assert "security.tls_folder=" in made
    assert certs(tmp_path / "tls", "--show").splitlines()[:4] == made.splitlines()[:4]


def test_certs_overwrites_nothing_unless_told_to(tmp_path: Path) -> None:
    certs(tmp_path / "tls")
    key = (tmp_path / "tls" / "shard" / "tls.key").read_bytes()
    with pytest.raises(ConfigError, match="--renew"):
        certs(tmp_path / "tls")
    assert (tmp_path / "tls" / "shard" / "tls.key").read_bytes() == key
    certs(tmp_path / "tls", "--renew")
    assert (tmp_path / "tls" / "shard" / "tls.key").read_bytes() != key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dns", "api.example.org"), "SERVICE=NAME"),
        (("--dns", "console=api.example.org"), "SERVICE=NAME"),
        (("--renew", "--show"), "give one of"),
        (("--renew",), "there is no certificate authority"),
        (("--new-authority",), "there is no certificate authority"),
        (("--forget-old-authority",), "there is no certificate authority"),
    ],
)
def test_certs_names_the_mistake(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        certs(tmp_path / "tls", *arguments)
    assert not (tmp_path / "tls").exists()
