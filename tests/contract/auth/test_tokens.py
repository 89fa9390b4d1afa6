"""JSON Web Tokens as credentials: signed by a configured key, for this mesh, within their time."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm

from infermesh.config import AuthConfig, ConfigError
from infermesh.errors import InvalidApiKey, from_rpc_error
from infermesh.v1 import auth_service_pb2 as pb
from services.auth.tokens import Tokens
from tests.auth_process import Auth, TurnedClock, running_auth
from tests.migrated import MigratedDatabases

EC = generate_private_key(SECP256R1())
ED = Ed25519PrivateKey.generate()
STRANGER = generate_private_key(SECP256R1())


@pytest.fixture
def clock() -> TurnedClock:
    return TurnedClock()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    public = [
        {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "ec", "alg": "ES256"},
        {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "ed", "alg": "EdDSA"},
    ]
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": public}))
    return path


@pytest.fixture
async def auth(
    tmp_path: Path, migrated: MigratedDatabases, keys_file: Path, clock: TurnedClock
) -> AsyncIterator[Auth]:
    settings = {"jwt_keys_file": str(keys_file), "jwt_issuer": "https://issuer", "clock": clock}
    async with running_auth(
        tmp_path, migrated.sqlite(tmp_path / "auth.sqlite3"), **settings
    ) as running:
        await running.tenant("acme", tokens_per_minute=1000)
        yield running


def signed(clock: TurnedClock, private: Any = EC, kid: str = "ec", **changes: Any) -> str:
    claims = {
        "iss": "https://issuer",
        "aud": "infermesh",
        "sub": "ann",
        "exp": clock.now + 300,
        "tenant": "acme",
        **changes,
    }
    given = {name: value for name, value in claims.items() if value is not None}
    algorithm = "EdDSA" if kid == "ed" else "ES256"
    return jwt.encode(given, private, algorithm=algorithm, headers={"kid": kid})


async def verify(auth: Auth, token: str) -> pb.Principal:
    answer = await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=token), timeout=10)
    principal: pb.Principal = answer.principal
    return principal


async def test_token_is_its_tenant_until_it_expires(auth: Auth, clock: TurnedClock) -> None:
    for token in (signed(clock), signed(clock, ED, "ed")):
        principal = await verify(auth, token)
        assert (principal.tenant_id, principal.key_id) == ("acme", "jwt:ann")
        assert principal.limits.tokens_per_minute == 1000
        assert principal.valid_for.seconds == 300
        assert principal.scopes == ["inference", "embeddings", "models"]


async def test_token_narrows_itself(auth: Auth, clock: TurnedClock) -> None:
    principal = await verify(auth, signed(clock, scope="models openid", models=["tiny"]))
    assert (principal.scopes, principal.models) == (["models"], ["tiny"])


@pytest.mark.parametrize(
    "changes",
    [
        {"private": STRANGER},
        {"kid": "nobody"},
        {"iss": "https://other"},
        {"aud": "other"},
        {"exp": 1.0},
        {"exp": None},
        {"sub": None},
        {"nbf": 4e9},
        {"tenant": None},
        {"tenant": "globex"},
        {"models": "tiny"},
        {"scope": ["models"]},
        {"exp": float("inf")},
    ],
    ids=lambda changes: ",".join(changes),
)
async def test_token_is_refused_when_one_thing_is_wrong(
    auth: Auth, clock: TurnedClock, changes: dict[str, Any]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await verify(auth, signed(clock, **changes))
    assert isinstance(from_rpc_error(caught.value), InvalidApiKey)


async def test_subjects_that_begin_alike_are_told_apart(auth: Auth, clock: TurnedClock) -> None:
    ids = {(await verify(auth, signed(clock, sub="u" * 40 + end))).key_id for end in "ab"}
    assert len(ids) == 2
    assert all(len(key_id) <= 32 for key_id in ids)


async def test_unsigned_and_altered_tokens_are_refused(auth: Auth, clock: TurnedClock) -> None:
    good = signed(clock)
    head, body, signature = good.split(".")
    unsigned = jwt.encode({"tenant": "acme"}, None, algorithm="none", headers={"kid": "ec"})
    altered = f"{head}.{body[:-2]}AA.{signature}"
    for token in (unsigned, altered, "a.b.c", f"{head}.{body}."):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verify(auth, token)
        assert isinstance(from_rpc_error(caught.value), InvalidApiKey)


@pytest.mark.parametrize("text", ["", "{}", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "x"}]}'])
def test_key_file_without_public_keys_is_refused(
    tmp_path: Path, clock: TurnedClock, text: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    config = AuthConfig(jwt_keys_file=str(path), jwt_issuer="https://issuer")
    with pytest.raises(ConfigError, match=r"auth\.jwt_keys_file"):
        Tokens(config, clock)


def test_issuer_must_be_named(keys_file: Path, clock: TurnedClock) -> None:
    with pytest.raises(ConfigError, match=r"auth\.jwt_issuer"):
        Tokens(AuthConfig(jwt_keys_file=str(keys_file)), clock)
