"""What goes on while the auth service, or a gateway, is gone."""

import asyncio
import zlib
from pathlib import Path

import openai
import pytest

from gateway.auth.metrics import KEY_CHECKS
from infermesh.errors import Unavailable
from tests.auth_process import Auth, start_auth
from tests.gateway_process import Edge
from tests.keyed_gateway import ask, keyed_gateway, settled


async def test_known_keys_go_on_and_unknown_ones_get_503_when_auth_is_gone(
    auth: Auth, keyed: Edge, tmp_path: Path
) -> None:
    await auth.tenant("limited", tokens_per_minute=1000)
    free, _ = await auth.key("acme")
    limited, _ = await auth.key("limited")
    unknown, _ = await auth.key("acme")
    for _ in range(4):
        await ask(keyed, free)
        await ask(keyed, limited)
    await auth.stop()
    await ask(keyed, free)
    # within the lease: what was asked for ahead is there, what goes beyond is not
    await ask(keyed, limited)
    num_more, error = await used_up(keyed, limited)
    assert error.status_code == 503
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(keyed, unknown)
    assert caught.value.status_code == 503
    assert caught.value.code == "auth_unavailable"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    again = await start_auth(tmp_path, auth.config.database_url)
    async with asyncio.timeout(20):
        while True:
            try:
                await ask(keyed, unknown)
                break
            except openai.InternalServerError:
                await asyncio.sleep(0.05)  # a poll: the gateway reconnects in its own time
    totals = await settled(again, 11 + num_more)
    assert sum(total.num_requests for total in totals) == 11 + num_more
    await again.stop()


async def used_up(edge: Edge, api_key: str) -> tuple[int, openai.APIStatusError]:
    """How many large requests a lease had room for, and how the next one was refused."""
    for count in range(1000 // 200 + 1):  # how much it holds depends on how busy it was
        try:
            await ask(edge, api_key, max_tokens=200)
        except openai.APIStatusError as error:
            return count, error
    raise AssertionError("more was admitted than the tenant may use")


def leave(usage_dir: Path, number: int, *bodies: bytes) -> Path:
    """What a gateway that was killed leaves in the spool."""
    path = usage_dir / f"{number:020}-1-1.usage"
    path.write_bytes(b"".join(b"%08x %b\n" % (zlib.crc32(body), body) for body in bodies))
    return path


async def test_usage_that_the_ledger_refuses_does_not_hold_up_the_rest(
    auth: Auth, tmp_path: Path
) -> None:
    usage_dir = tmp_path / "usage"
    usage_dir.mkdir()
    refused = [leave(usage_dir, 1, b'{"tenant_id":"acme"}'), leave(usage_dir, 2, b'{"no":1}')]
    leave(usage_dir, 3, b'{"record_id":"left","tenant_id":"acme","prompt_tokens":7}')
    async with keyed_gateway(tmp_path / "one", auth, usage_dir=str(usage_dir)):
        assert (await settled(auth, 1))[0].prompt_tokens == 7
    for path in refused:
        assert not path.exists()
        assert path.with_name(f"{path.name}.refused").exists()


async def test_usage_of_a_killed_gateway_is_sent_by_the_next_one(
    auth: Auth, tmp_path: Path
) -> None:
    text, _ = await auth.key("acme")
    usage_dir = tmp_path / "usage"
    async with keyed_gateway(tmp_path / "one", auth, usage_dir=str(usage_dir)) as keyed:
        await ask(keyed, text)
        await settled(auth, 1)
    left = leave(usage_dir, 1, b'{"record_id":"left","tenant_id":"acme","prompt_tokens":7}')
    async with keyed_gateway(tmp_path / "two", auth, usage_dir=str(usage_dir)):
        totals = await settled(auth, 2)
    assert sum(total.prompt_tokens for total in totals if not total.key_id) == 7
    assert not left.exists()


async def test_an_unknown_key_waits_while_auth_restarts(
    auth: Auth, keyed: Edge, tmp_path: Path
) -> None:
    free, _ = await auth.key("acme")
    await auth.tenant("limited", tokens_per_minute=1000)
    limited, _ = await auth.key("limited")
    await auth.stop()
    failed = KEY_CHECKS.labels(Unavailable("").code)
    before = failed._value.get()
    asked = [asyncio.create_task(ask(keyed, key)) for key in (free, free, limited)]
    async with asyncio.timeout(20):
        while True:
            if failed._value.get() >= before + 4:
                break
            await asyncio.sleep(0.02)  # a poll: each key was asked for, in vain, and again
    again = await start_auth(tmp_path, auth.config.database_url)
    assert all(answer.choices for answer in await asyncio.gather(*asked))
    await again.stop()
