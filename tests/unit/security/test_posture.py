"""What a process refuses to listen on or to connect to, and by which word it is allowed."""

import pytest

from gateway.server import check_addresses
from infermesh.config import ConfigError, GatewayConfig, SecurityConfig, load
from infermesh.loopback import is_local
from infermesh.security.identities import Identity
from infermesh.security.posture import DANGERS, Security

PUBLIC = "0.0.0.0:8000"


def allowing(*dangers: str) -> Security:
    return Security(allow=frozenset(dangers))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "localhost:0", "[::1]:1", "127.9.9.9:1", "unix:/run/x.sock"]
)
def test_addresses_of_this_machine_are_local(address: str) -> None:
    assert is_local(address)


@pytest.mark.parametrize("address", [PUBLIC, ":1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_addresses_beyond_this_machine_are_not(address: str) -> None:
    assert not is_local(address)
    with pytest.raises(ConfigError, match="other machines can reach"):
        allowing().check_service("shard.address", address)


# setting, gateway.auth, what has to be allowed
CASES = [
    ("http_address", "", {"no-auth", "plaintext"}),
    ("grpc_address", "", {"no-auth", "plaintext"}),
    ("http_address", "unix:/a", {"plaintext"}),
    ("grpc_address", "unix:/a", {"plaintext"}),
    ("admin_address", "unix:/a", {"admin"}),
]


@pytest.mark.parametrize(("setting", "auth", "needed"), CASES)
def test_public_address_is_refused_until_each_of_its_dangers_is_allowed(
    setting: str, auth: str, needed: set[str]
) -> None:
    config = GatewayConfig(**{setting: PUBLIC, "auth": (auth,) if auth else ()})  # type: ignore[arg-type]
    check_addresses(config, allowing(*needed))
    for danger in needed:
        with pytest.raises(ConfigError, match=f"gateway.{setting} .*security.allow={danger}"):
            check_addresses(config, allowing(*set(DANGERS) - {danger}))


@pytest.mark.parametrize("setting", ["auth", "cache"])
def test_peer_beyond_this_machine_is_refused_in_plaintext(setting: str) -> None:
    peer = "auth.example.org:8030"
    config = GatewayConfig(auth=(peer,)) if setting == "auth" else GatewayConfig(cache=peer)
    with pytest.raises(ConfigError, match=f"gateway.{setting} .*security.tls_folder"):
        check_addresses(config, allowing())
    check_addresses(config, allowing("plaintext"))


def test_unknown_danger_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"security\.allow has 'everything'"):
        Security.of(SecurityConfig(allow=("everything",)), Identity.GATEWAY)


def test_dangers_come_from_the_settings() -> None:
    settings = load(["--security.allow=admin,plaintext"], {})
    assert Security.of(settings.security, Identity.GATEWAY).allow == {"admin", "plaintext"}


def test_sentence_names_who_reaches_the_mesh_and_what_was_allowed() -> None:
    said = allowing("no-auth", "plaintext").sentence([PUBLIC, "127.0.0.1:8001"], False)
    assert "takes any API key" in said
    assert f"other machines reach {PUBLIC} · allowed: no-auth, plaintext" in said
    assert "this machine alone" in allowing().sentence(["127.0.0.1:8000"], True)
