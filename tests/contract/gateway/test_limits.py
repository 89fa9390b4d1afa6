"""Limits at the public edge: what is admitted, and how a refusal is told."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from infermesh import rpc
from infermesh.errors import RateLimitExceeded, from_rpc_error
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1 import inference_service_pb2 as inference_pb
from infermesh.v1 import sampling_pb2
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.auth import metrics
from tests.auth_process import Auth, TurnedClock, running_auth
from tests.gateway_process import Edge
from tests.keyed_gateway import CHAT, ask, client, keyed_gateway, refused, settled


async def test_limit_is_told_in_headers_and_by_429_when_reached(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("small", requests_per_minute=3, tokens_per_minute=500)
    text, _ = await auth.key("small")
    remaining = []
    for _ in range(3):
        raw = await client(keyed, text).chat.completions.with_raw_response.create(
            **CHAT, max_tokens=4
        )
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-limit-tokens"] == "500"
        remaining.append(int(raw.headers["x-ratelimit-remaining-requests"]))
    assert remaining == [2, 1, 0]
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(keyed, text)
    headers = caught.value.response.headers
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(headers["retry-after"]) <= 61
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")


def count(counter: Any) -> float:
    """A counter over all of its labels."""
    samples = counter.collect()[0].samples
    return float(sum(s.value for s in samples if s.name.endswith("_total")))


async def test_requests_of_a_busy_tenant_are_admitted_without_a_call_each(
    auth: Auth, keyed: Edge
) -> None:
    await auth.tenant("busy", tokens_per_minute=1_000_000, requests_per_minute=1000)
    text, _ = await auth.key("busy")
    checks, reports = count(metrics.AUTHENTICATIONS), count(metrics.LEASE_REPORTS)
    for _ in range(60):
        await ask(keyed, text)
    assert count(metrics.AUTHENTICATIONS) - checks == 1
    # what is held doubles with use; and one report each second
    assert count(metrics.LEASE_REPORTS) - reports <= 20


async def test_budget_is_insufficient_quota_when_it_is_used_up(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("poor", daily_tokens=40)
    text, _ = await auth.key("poor")
    refusal = await refused(keyed, text, 10.0)
    assert (refusal.status_code, refusal.code) == (429, "insufficient_quota")
    assert refusal.type == "insufficient_quota"
    total = (await settled(auth, 1, "poor"))[0]
    assert total.prompt_tokens + total.completion_tokens <= 40


async def test_request_above_the_limit_itself_is_refused_at_once(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("tiny-limit", tokens_per_minute=20)
    text, _ = await auth.key("tiny-limit")
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        await ask(keyed, text, max_tokens=100)
    assert "retry-after" not in caught.value.response.headers
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_request_above_the_budget_itself_is_insufficient_quota(
    auth: Auth, keyed: Edge
) -> None:
    await auth.tenant("poor", daily_tokens=20)
    text, _ = await auth.key("poor")
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        await ask(keyed, text, max_tokens=100)
    assert caught.value.code == "insufficient_quota"


@pytest.mark.parametrize("limit", ["tokens_per_minute", "daily_tokens", "monthly_tokens"])
async def test_open_end_is_held_to_what_is_left_now(auth: Auth, keyed: Edge, limit: str) -> None:
    await auth.tenant("modest", **{limit: 200})
    text, _ = await auth.key("modest")
    await ask(keyed, text, max_tokens=30)
    answer = await client(keyed, text).chat.completions.create(**CHAT)
    assert answer.usage.completion_tokens >= 100
    totals = await settled(auth, 2, "modest")
    assert sum(total.prompt_tokens + total.completion_tokens for total in totals) <= 200


async def test_slots_are_free_again_when_a_gateway_has_stopped(auth: Auth, tmp_path: Path) -> None:
    await auth.tenant("narrow", max_concurrency=1)
    text, _ = await auth.key("narrow")
    async with keyed_gateway(tmp_path / "one", auth) as edge:
        await ask(edge, text)
        await edge.service.drain(1.0)
    async with keyed_gateway(tmp_path / "two", auth) as edge:
        await ask(edge, text)


async def test_requests_at_once_are_counted_until_they_end(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("narrow", max_concurrency=2)
    text, _ = await auth.key("narrow")
    keyed.replica.gated = True
    running = [asyncio.create_task(ask(keyed, text)) for _ in range(2)]
    await keyed.replica.wait(lambda: keyed.replica.num_streams == 2)
    with pytest.raises(openai.RateLimitError, match="requests at once"):
        await ask(keyed, text)
    keyed.replica.gated = False
    await keyed.replica.step(8)
    await asyncio.gather(*running)
    await ask(keyed, text)


async def test_place_is_free_again_when_the_client_goes_away(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("narrow", max_concurrency=1, tokens_per_minute=200)
    text, _ = await auth.key("narrow")
    keyed.replica.gated = True
    # its headers are here, so it was admitted, and will have a row
    stream = await ask(keyed, text, max_tokens=150, stream=True)
    await stream.close()
    await keyed.replica.wait(lambda: keyed.replica.num_streams == 0)
    keyed.replica.gated = False
    async with asyncio.timeout(10):
        await keyed.service.pipeline.admission.idle()
    await ask(keyed, text, max_tokens=100)
    statuses = await settled(auth, 2, "narrow")
    assert statuses[0].completion_tokens == 100


async def test_changed_limit_reaches_gateways_within_a_second(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("moving", requests_per_minute=1)
    text, _ = await auth.key("moving")
    await ask(keyed, text)
    limits = pb.TenantLimits(requests_per_minute=5)
    await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="moving", limits=limits))
    async with asyncio.timeout(1.0):
        while True:
            try:
                await ask(keyed, text)
                break
            except openai.RateLimitError:
                pass


async def test_grpc_refusal_names_the_tenants_quota(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("small", requests_per_minute=0)
    text, _ = await auth.key("small")
    options = inference_pb.GenerationOptions(stop=sampling_pb2.StopConditions(max_tokens=2))
    request = inference_pb.GenerateRequest(model="tiny", text="x", options=options)
    async with rpc.channel(keyed.grpc_address) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.Generate(request, metadata=(("authorization", f"Bearer {text}"),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = from_rpc_error(caught.value)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert isinstance(error, RateLimitExceeded)
    assert error.metadata["tenant"] == "small"


@pytest.mark.parametrize("num_gateways", [1, 3])
async def test_sixty_four_clients_are_admitted_for_no_more_than_the_limit(
    tmp_path: Path, lease_store: dict[str, str], num_gateways: int
) -> None:
    """1,000 tokens per minute; the clock of the window stands still, so that none can come back."""
    async with AsyncExitStack() as stack:
        auth = await stack.enter_async_context(
            running_auth(tmp_path, **lease_store, clock=TurnedClock())
        )
        await auth.tenant("acme", tokens_per_minute=1000)
        text, _ = await auth.key("acme")
        edges = [
            await stack.enter_async_context(keyed_gateway(tmp_path / f"g{index}", auth))
            for index in range(num_gateways)
        ]
        used: list[int] = []
        refusals: list[openai.RateLimitError] = []

        async def one(index: int) -> None:
            for turn in range(6):
                try:
                    answer = await ask(
                        edges[(index + turn) % num_gateways], text, max_tokens=8 + index % 9
                    )
                    used.append(answer.usage.total_tokens)
                except openai.RateLimitError as error:
                    refusals.append(error)

        await asyncio.gather(*(one(index) for index in range(64)))
        assert refusals
        assert all("retry-after" in error.response.headers for error in refusals)
        # over-admission: none; and what was left is less than a request or two per gateway
        assert 1000 - 60 * num_gateways <= sum(used) <= 1000
        totals = await settled(auth, len(used))
        assert sum(t.prompt_tokens + t.completion_tokens for t in totals) == sum(used)
