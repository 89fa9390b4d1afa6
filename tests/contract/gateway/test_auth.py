"""Keys, limits and usage at the public edge: the real gateway and the real auth service."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.protobuf.duration_pb2 import Duration

from infermesh import rpc
from infermesh.errors import InvalidApiKey, RateLimitExceeded, from_rpc_error
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1 import inference_service_pb2 as inference_pb
from infermesh.v1 import sampling_pb2
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.auth_process import Auth, TurnedClock, running_auth, start_auth
from tests.gateway_process import Edge, make_replicas, running_gateway

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def keyed_gateway(folder: Path, auth: Auth, **settings: Any) -> AsyncIterator[Edge]:
    """A gateway in front of one fake replica that asks `auth`."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    settings.setdefault("usage_dir", str(folder / "usage"))
    address = auth.config.address
    async with running_gateway(folder, make_replicas(folder), auth=address, **settings) as edge:
        yield edge


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[Auth]:
    async with running_auth(tmp_path, f"sqlite:///{tmp_path}/auth.sqlite3") as running:
        await running.tenant("acme")
        yield running


@pytest.fixture
async def edge(tmp_path: Path, auth: Auth) -> AsyncIterator[Edge]:
    async with keyed_gateway(tmp_path / "gateway", auth) as running:
        yield running


def client(edge: Edge, api_key: str) -> openai.AsyncOpenAI:
    return edge.openai.with_options(api_key=api_key)


async def ask(edge: Edge, api_key: str, **options: Any) -> Any:
    """One whole answer; 4 tokens of output unless told otherwise."""
    return await client(edge, api_key).chat.completions.create(
        **{**CHAT, "max_tokens": 4, "temperature": 1.0, **options}
    )


async def refused(edge: Edge, api_key: str, within_s: float) -> openai.APIStatusError:
    """Asks until that is refused."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await ask(edge, api_key)
            except openai.APIStatusError as error:
                return error


async def settled(auth: Auth, num_requests: int, tenant: str = "") -> list[Any]:
    """The ledger, once it has so many rows."""
    async with asyncio.timeout(20):
        while True:
            totals = await auth.usage(tenant)
            if sum(total.num_requests for total in totals) >= num_requests:
                return totals
            await asyncio.sleep(0.05)


# who


async def test_two_tenants_with_three_keys_are_billed_what_they_received(
    auth: Auth, edge: Edge
) -> None:
    await auth.tenant("globex")
    keys = [await auth.key("acme"), await auth.key("acme"), await auth.key("globex")]
    received: dict[str, list[int]] = {key_id: [0, 0, 0] for _, key_id in keys}
    for index, (text, key_id) in enumerate(keys * 3):
        answer = await ask(edge, text, max_tokens=index + 1, n=1 + index % 2)
        for slot, value in enumerate(
            (1, answer.usage.prompt_tokens, answer.usage.completion_tokens)
        ):
            received[key_id][slot] += value
    totals = await settled(auth, 9)
    assert {
        total.key_id: [total.num_requests, total.prompt_tokens, total.completion_tokens]
        for total in totals
    } == received
    assert {total.tenant_id for total in totals} == {"acme", "globex"}


async def test_stream_is_billed_as_its_usage_chunk_says(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme")
    stream = await ask(edge, text, stream=True, stream_options={"include_usage": True})
    usage = [chunk.usage async for chunk in stream][-1]
    total = (await settled(auth, 1))[0]
    assert total.completion_tokens == usage.completion_tokens == 4
    assert total.prompt_tokens == usage.prompt_tokens


async def test_same_request_id_is_billed_twice_when_sent_twice(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme")
    for _ in range(2):
        await ask(edge, text, extra_headers={"x-request-id": "mine"})
    assert (await settled(auth, 2))[0].num_requests == 2


@pytest.mark.parametrize("api_key", ["local", "im-aaaaaaaaaaaa-" + "a" * 52, "x" * 9000])
async def test_wrong_key_is_invalid_api_key(edge: Edge, api_key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await ask(edge, api_key)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"
    assert edge.replica.submits == []


async def test_expired_key_is_refused_when_it_was_cached(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme", valid_for=Duration(seconds=2))
    await ask(edge, text)
    refusal = await refused(edge, text, 10.0)
    assert "expired" in refusal.message


async def test_revoked_key_is_refused_within_a_second(auth: Auth, edge: Edge) -> None:
    text, key_id = await auth.key("acme")
    other, _ = await auth.key("acme")
    await ask(edge, text)
    await auth.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
    refusal = await refused(edge, text, 1.0)
    assert "revoked" in refusal.message
    await ask(edge, other)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/tiny", None),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "x"}),
    ],
)
async def test_every_endpoint_needs_a_key(
    edge: Edge, method: str, path: str, body: dict[str, Any] | None
) -> None:
    response = await edge.http.request(method, path, json=body)
    assert response.status_code == 401
    assert "API key" in response.json()["error"]["message"]


async def test_probes_need_no_key(edge: Edge) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert (await edge.http.get(path)).status_code == 200


async def test_key_without_the_scope_is_forbidden(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme", scopes=["models"])
    assert [model.id async for model in client(edge, text).models.list()] == ["tiny"]
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await ask(edge, text)
    assert caught.value.code == "permission_denied"
    assert "inference" in caught.value.message


async def test_key_sees_and_uses_only_its_models(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme", models=["other"])
    assert [model.id async for model in client(edge, text).models.list()] == []
    with pytest.raises(openai.PermissionDeniedError, match="tiny"):
        await ask(edge, text)


async def test_scheduler_hears_tenant_weight_and_sharing_domain(auth: Auth, edge: Edge) -> None:
    await auth.tenant("heavy", policy=pb.TenantPolicy(weight=3.0))
    text, _ = await auth.key("heavy")
    await ask(edge, text, user="ann")
    submit = edge.replica.submits[0]
    assert (submit.tenant, submit.tenant_weight, submit.sharing_domain) == (
        "heavy",
        3.0,
        "heavy/ann",
    )


async def test_grpc_asks_for_keys_as_http_does(auth: Auth, edge: Edge) -> None:
    text, _ = await auth.key("acme")
    async with rpc.channel(edge.grpc_address) as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(inference_pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert isinstance(from_rpc_error(caught.value), InvalidApiKey)
        bearer = (("authorization", f"Bearer {text}"),)
        models = await stub.ListModels(inference_pb.ListModelsRequest(), metadata=bearer)
        assert [model.id for model in models.models] == ["tiny"]


# how much


async def test_limit_is_told_in_headers_and_by_429_when_reached(auth: Auth, edge: Edge) -> None:
    await auth.tenant("small", requests_per_minute=3, tokens_per_minute=500)
    text, _ = await auth.key("small")
    remaining = []
    for _ in range(3):
        raw = await client(edge, text).chat.completions.with_raw_response.create(
            **CHAT, max_tokens=4
        )
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-limit-tokens"] == "500"
        remaining.append(int(raw.headers["x-ratelimit-remaining-requests"]))
    assert remaining == [2, 1, 0]
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(edge, text)
    headers = caught.value.response.headers
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(headers["retry-after"]) <= 61
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")


async def test_budget_is_insufficient_quota_when_it_is_used_up(auth: Auth, edge: Edge) -> None:
    await auth.tenant("poor", daily_tokens=40)
    text, _ = await auth.key("poor")
    refusal = await refused(edge, text, 10.0)
    assert (refusal.status_code, refusal.code) == (429, "insufficient_quota")
    assert refusal.type == "insufficient_quota"
    total = (await settled(auth, 1, "poor"))[0]
    assert total.prompt_tokens + total.completion_tokens <= 40


async def test_request_above_the_limit_itself_is_refused_at_once(auth: Auth, edge: Edge) -> None:
    await auth.tenant("tiny-limit", tokens_per_minute=20)
    text, _ = await auth.key("tiny-limit")
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        await ask(edge, text, max_tokens=100)
    assert "retry-after" not in caught.value.response.headers
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_request_above_the_budget_itself_is_insufficient_quota(
    auth: Auth, edge: Edge
) -> None:
    await auth.tenant("poor", daily_tokens=20)
    text, _ = await auth.key("poor")
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        await ask(edge, text, max_tokens=100)
    assert caught.value.code == "insufficient_quota"


@pytest.mark.parametrize("limit", ["tokens_per_minute", "daily_tokens", "monthly_tokens"])
async def test_open_end_is_held_to_what_is_left_now(auth: Auth, edge: Edge, limit: str) -> None:
    await auth.tenant("modest", **{limit: 200})
    text, _ = await auth.key("modest")
    await ask(edge, text, max_tokens=30)
    answer = await client(edge, text).chat.completions.create(**CHAT)
    assert answer.usage.completion_tokens >= 100
    totals = await settled(auth, 2, "modest")
    assert sum(total.prompt_tokens + total.completion_tokens for total in totals) <= 200


async def test_requests_at_once_are_counted_until_they_end(auth: Auth, edge: Edge) -> None:
    await auth.tenant("narrow", max_concurrency=2)
    text, _ = await auth.key("narrow")
    edge.replica.gated = True
    running = [asyncio.create_task(ask(edge, text)) for _ in range(2)]
    await edge.replica.wait(lambda: edge.replica.num_streams == 2)
    with pytest.raises(openai.RateLimitError, match="requests at once"):
        await ask(edge, text)
    edge.replica.gated = False
    await edge.replica.step(8)
    await asyncio.gather(*running)
    await ask(edge, text)


async def test_slots_are_free_again_when_a_gateway_has_stopped(auth: Auth, tmp_path: Path) -> None:
    await auth.tenant("narrow", max_concurrency=1)
    text, _ = await auth.key("narrow")
    async with keyed_gateway(tmp_path / "one", auth) as edge:
        await ask(edge, text)
        await edge.service.drain(1.0)
    async with keyed_gateway(tmp_path / "two", auth) as edge:
        await ask(edge, text)


async def test_place_is_free_again_when_the_client_goes_away(auth: Auth, edge: Edge) -> None:
    await auth.tenant("narrow", max_concurrency=1, tokens_per_minute=200)
    text, _ = await auth.key("narrow")
    edge.replica.gated = True
    gone = asyncio.create_task(ask(edge, text, max_tokens=150))
    await edge.replica.wait(lambda: edge.replica.num_streams == 1)
    gone.cancel()
    await edge.replica.wait(lambda: edge.replica.num_streams == 0)
    edge.replica.gated = False
    async with asyncio.timeout(10):
        while True:
            try:
                await ask(edge, text, max_tokens=100)
                break
            except openai.RateLimitError:
                await asyncio.sleep(0.05)
    statuses = await settled(auth, 2, "narrow")
    assert statuses[0].completion_tokens == 100


async def test_changed_limit_reaches_gateways_within_a_second(auth: Auth, edge: Edge) -> None:
    await auth.tenant("moving", requests_per_minute=1)
    text, _ = await auth.key("moving")
    await ask(edge, text)
    limits = pb.TenantLimits(requests_per_minute=5)
    await auth.admin.UpdateTenant(admin_pb.UpdateTenantRequest(id="moving", limits=limits))
    async with asyncio.timeout(1.0):
        while True:
            try:
                await ask(edge, text)
                break
            except openai.RateLimitError:
                pass


async def test_grpc_refusal_names_the_tenants_quota(auth: Auth, edge: Edge) -> None:
    await auth.tenant("small", requests_per_minute=0)
    text, _ = await auth.key("small")
    options = inference_pb.GenerationOptions(stop=sampling_pb2.StopConditions(max_tokens=2))
    request = inference_pb.GenerateRequest(model="tiny", text="x", options=options)
    async with rpc.channel(edge.grpc_address) as channel:
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
    tmp_path: Path, database_url: str, num_gateways: int
) -> None:
    """1,000 tokens per minute; the clock of the window stands still, so that none can come back."""
    async with AsyncExitStack() as stack:
        auth = await stack.enter_async_context(
            running_auth(tmp_path, database_url, clock=TurnedClock())
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


# when auth is away


async def test_known_keys_go_on_and_unknown_ones_get_503_when_auth_is_gone(
    auth: Auth, edge: Edge, tmp_path: Path
) -> None:
    await auth.tenant("limited", tokens_per_minute=1000)
    free, _ = await auth.key("acme")
    limited, _ = await auth.key("limited")
    unknown, _ = await auth.key("acme")
    for _ in range(4):
        await ask(edge, free)
        await ask(edge, limited)
    await auth.stop()
    await ask(edge, free)
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(edge, unknown)
    assert caught.value.status_code == 503
    assert caught.value.code == "auth_unavailable"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    # within the lease: what was asked for ahead is there, what goes beyond is not
    await ask(edge, limited)
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(edge, limited, max_tokens=200)
    assert caught.value.status_code == 503
    again = await start_auth(tmp_path, auth.config.database_url)
    async with asyncio.timeout(20):
        while True:
            try:
                await ask(edge, unknown)
                break
            except openai.InternalServerError:
                await asyncio.sleep(0.05)
    totals = await settled(again, 11)
    assert sum(total.num_requests for total in totals) == 11
    await again.stop()


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
    async with keyed_gateway(tmp_path / "one", auth, usage_dir=str(usage_dir)) as edge:
        await ask(edge, text)
        await settled(auth, 1)
    left = leave(usage_dir, 1, b'{"record_id":"left","tenant_id":"acme","prompt_tokens":7}')
    async with keyed_gateway(tmp_path / "two", auth, usage_dir=str(usage_dir)):
        totals = await settled(auth, 2)
    assert sum(total.prompt_tokens for total in totals if not total.key_id) == 7
    assert not left.exists()
