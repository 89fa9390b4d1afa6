"""New certificates without a restart: what listens, what is connected, and what streams."""

import asyncio
import shutil
import weakref
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from infermesh import rpc
from infermesh.security.certificates import Certificates, Material, channel_credentials
from infermesh.security.identities import Identity
from infermesh.security.renewing_channel import RenewingChannel
from tests import certificates
from tests.contract.security.harness import CALL_S, SERVER, Rpc, guarded_server, showing

UNARY = Rpc("/infermesh.v1.SchedulerService/WatchReplica", "unary_stream")
STREAM = "/infermesh.v1.SchedulerService/Session"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return certificates.make(tmp_path / "tls")


@pytest.fixture
async def address(folder: Path) -> AsyncIterator[str]:
    async with guarded_server(folder) as found:
        yield found


def shown(folder: Path) -> bytes:
    """The gateway's certificate of now."""
    return (folder / "gateway" / "tls.crt").read_bytes()


async def test_new_calls_show_the_new_certificate_when_it_was_renewed(
    folder: Path, address: str
) -> None:
    async with rpc.channel(address, SERVER, certificates.of(folder, Identity.GATEWAY)) as channel:
        old = shown(folder)
        assert await UNARY.call(channel) == old
        certificates.renew(folder)
        assert await UNARY.call(channel) == shown(folder) != old


async def test_server_believes_the_new_authority_alone_when_it_was_replaced(
    folder: Path, address: str, tmp_path: Path
) -> None:
    kept = Path(shutil.copytree(folder / "gateway", tmp_path / "kept"))
    async with showing(address, kept) as channel:
        assert await UNARY.call(channel)
    certificates.replace_authority(folder)
    async with showing(address, folder / "gateway") as channel:
        assert await UNARY.call(channel) == shown(folder)
    # it trusts the server's new authority: what fails is that it is not believed itself
    shutil.copy(folder / "gateway" / "ca.crt", kept / "ca.crt")
    async with showing(address, kept) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await UNARY.call(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_stream_goes_on_where_it_began_and_its_channel_ends_with_it(
    folder: Path, address: str
) -> None:
    made: list[weakref.ref[grpc.aio.Channel]] = []

    def make(material: Material) -> grpc.aio.Channel:
        options = rpc.as_server(SERVER)
        channel = grpc.aio.secure_channel(address, channel_credentials(material), options=options)
        made.append(weakref.ref(channel))
        return channel

    own = certificates.of(folder, Identity.GATEWAY)
    async with RenewingChannel(own, make) as channel:
        stream = channel.stream_stream(STREAM)(timeout=CALL_S)
        old = await stream.read()
        certificates.replace_authority(folder)
        assert await UNARY.call(channel) == shown(folder) != old
        await stream.write(b"")
        assert await stream.read() == old
        assert [one() is not None for one in made] == [True, True]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        del stream
        assert [one() is not None for one in made] == [False, True]


async def test_calls_of_older_channels_end_when_it_is_closed(folder: Path, address: str) -> None:
    channel = rpc.channel(address, SERVER, certificates.of(folder, Identity.GATEWAY))
    stream = channel.stream_stream(STREAM)(timeout=CALL_S)
    await stream.read()
    reading = asyncio.create_task(stream.read())
    certificates.renew(folder)
    await UNARY.call(channel)
    await channel.close()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_renewed_in_time_nothing_fails_when_the_old_certificates_expire(
    tmp_path: Path,
) -> None:
    folder = certificates.make(tmp_path / "tls", timedelta(seconds=2))
    expires = datetime.now(UTC) + timedelta(seconds=2)
    old = Path(shutil.copytree(folder / "gateway", tmp_path / "old"))
    own = Certificates(folder, Identity.GATEWAY)
    async with guarded_server(folder) as address, rpc.channel(address, SERVER, own) as channel:
        assert await UNARY.call(channel)
        certificates.renew(folder)
        while datetime.now(UTC) < expires + timedelta(seconds=1):
            assert await UNARY.call(channel) == shown(folder)
            await asyncio.sleep(0.05)  # paces the load: time itself is what is waited for
        async with showing(address, old) as expired:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await UNARY.call(expired)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await UNARY.call(channel) == shown(folder)
