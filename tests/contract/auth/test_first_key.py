"""A key whose text an operator keeps is known from the first start on, and is a key like others."""

import asyncio
from pathlib import Path

import grpc
import pytest

from infermesh.config import ConfigError
from infermesh.errors import InvalidApiKey, from_rpc_error
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from services.auth import api_key, first_key
from services.auth.database import Database
from services.auth.migrate import migrate
from tests.auth_process import Auth, running_auth


async def verify(auth: Auth, text: str) -> pb.AuthenticateResponse:
    return await auth.stub.Authenticate(pb.AuthenticateRequest(api_key=text), timeout=10)  # type: ignore[no-any-return]


def keep(folder: Path, text: str) -> str:
    file = folder / "api-key"
    file.write_text(f"{text}\n")
    return str(file)


async def test_first_key_is_known_and_stays_as_it_is_when_auth_starts_again(
    tmp_path: Path, database_url: str
) -> None:
    key_id, text = api_key.draw()
    file = keep(tmp_path, text)

    async with running_auth(tmp_path, database_url, first_key_file=file) as auth:
        assert (await verify(auth, text)).principal.tenant_id == "local"
        limits = pb.TenantLimits(tokens_per_minute=7)
        await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="local", limits=limits))
    async with running_auth(tmp_path, database_url, first_key_file=file) as auth:
        assert (await verify(auth, text)).principal.limits.tokens_per_minute == 7
        await auth.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
    async with running_auth(tmp_path, database_url, first_key_file=file) as auth:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verify(auth, text)
        assert isinstance(from_rpc_error(caught.value), InvalidApiKey)


async def test_first_key_is_made_once_when_several_auths_start_at_once(
    tmp_path: Path, database_url: str
) -> None:
    file = Path(keep(tmp_path, api_key.draw()[1]))
    databases = [Database(database_url) for _ in range(4)]
    await migrate(databases[0])

    await asyncio.gather(*(first_key.ensure(one, file, lambda: 1.0) for one in databases))

    await asyncio.gather(*(one.close() for one in databases))
    async with running_auth(tmp_path, database_url) as auth:
        assert len((await auth.admin.ListKeys(admin_pb.ListKeysRequest())).keys) == 1


@pytest.mark.parametrize("text", ["", "secret", "im-abc", "im-aaaaaaaaaaaa-" + "1" * 52])
async def test_auth_does_not_start_with_a_file_that_holds_no_key(tmp_path: Path, text: str) -> None:
    url = f"sqlite:///{tmp_path / 'auth.sqlite3'}"

    with pytest.raises(ExceptionGroup) as caught:
        async with running_auth(tmp_path, url, first_key_file=keep(tmp_path, text)):
            pass
    assert caught.group_contains(ConfigError, match="first_key_file is .* holds no key")


async def test_auth_does_not_start_with_the_id_of_another_key(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'auth.sqlite3'}"
    key_id, text = api_key.draw()
    async with running_auth(tmp_path, url, first_key_file=keep(tmp_path, text)):
        pass
    other = f"im-{key_id}-{'a' * 52}"

    with pytest.raises(ExceptionGroup) as caught:
        async with running_auth(tmp_path, url, first_key_file=keep(tmp_path, other)):
            pass
    assert caught.group_contains(ConfigError, match="the id of another key")
