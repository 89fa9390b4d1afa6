"""Keys at the public edge: who is let in, and what is billed to whom."""

from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.protobuf.duration_pb2 import Duration

from infermesh import rpc
from infermesh.errors import InvalidApiKey, from_rpc_error
from infermesh.v1 import auth_admin_service_pb2 as admin_pb
from infermesh.v1 import auth_service_pb2 as pb
from infermesh.v1 import inference_service_pb2 as inference_pb
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.auth_process import Auth
from tests.gateway_process import Edge
from tests.keyed_gateway import ask, client, keyed_gateway, refused, settled


async def test_two_tenants_with_three_keys_are_billed_what_they_received(
    auth: Auth, keyed: Edge
) -> None:
    await auth.tenant("globex")
    keys = [await auth.key("acme"), await auth.key("acme"), await auth.key("globex")]
    received: dict[str, list[int]] = {key_id: [0, 0, 0] for _, key_id in keys}
    for index, (text, key_id) in enumerate(keys * 3):
        answer = await ask(keyed, text, max_tokens=index + 1, n=1 + index % 2)
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


async def test_stream_is_billed_as_its_usage_chunk_says(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme")
    stream = await ask(keyed, text, stream=True, stream_options={"include_usage": True})
    usage = [chunk.usage async for chunk in stream][-1]
    total = (await settled(auth, 1))[0]
    assert total.completion_tokens == usage.completion_tokens == 4
    assert total.prompt_tokens == usage.prompt_tokens


async def test_same_request_id_is_billed_twice_when_sent_twice(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme")
    for _ in range(2):
        await ask(keyed, text, extra_headers={"x-request-id": "mine"})
    assert (await settled(auth, 2))[0].num_requests == 2


@pytest.mark.parametrize("api_key", ["local", "im-aaaaaaaaaaaa-" + "a" * 52, "x" * 9000])
async def test_wrong_key_is_invalid_api_key(keyed: Edge, api_key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await ask(keyed, api_key)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"
    assert keyed.replica.submits == []


async def test_expired_key_is_refused_when_it_was_cached(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme", valid_for=Duration(seconds=2))
    await ask(keyed, text)
    refusal = await refused(keyed, text, 10.0)
    assert "expired" in refusal.message


async def test_revoked_key_is_refused_within_a_second(auth: Auth, keyed: Edge) -> None:
    text, key_id = await auth.key("acme")
    other, _ = await auth.key("acme")
    await ask(keyed, text)
    await auth.admin.RevokeKey(admin_pb.RevokeKeyRequest(key_id=key_id))
    refusal = await refused(keyed, text, 1.0)
    assert "revoked" in refusal.message
    await ask(keyed, other)


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
    keyed: Edge, method: str, path: str, body: dict[str, Any] | None
) -> None:
    response = await keyed.http.request(method, path, json=body)
    assert response.status_code == 401
    assert "API key" in response.json()["error"]["message"]


async def test_probes_need_no_key(keyed: Edge) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert (await keyed.http.get(path)).status_code == 200


async def test_key_without_the_scope_is_forbidden(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme", scopes=["models"])
    assert [model.id async for model in client(keyed, text).models.list()] == ["tiny"]
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await ask(keyed, text)
    assert caught.value.code == "permission_denied"
    assert "inference" in caught.value.message


async def test_key_sees_and_uses_only_its_models(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme", models=["other"])
    assert [model.id async for model in client(keyed, text).models.list()] == []
    with pytest.raises(openai.PermissionDeniedError, match="tiny"):
        await ask(keyed, text)


async def test_scheduler_hears_tenant_weight_and_sharing_domain(auth: Auth, keyed: Edge) -> None:
    await auth.tenant("heavy", policy=pb.TenantPolicy(weight=3.0))
    text, _ = await auth.key("heavy")
    await ask(keyed, text, user="ann")
    submit = keyed.replica.submits[0]
    assert (submit.tenant, submit.tenant_weight, submit.sharing_domain) == (
        "heavy",
        3.0,
        "heavy/ann",
    )


async def test_grpc_asks_for_keys_as_http_does(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme")
    async with rpc.channel(keyed.grpc_address) as channel:
        stub: Any = InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(inference_pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert isinstance(from_rpc_error(caught.value), InvalidApiKey)
        bearer = (("authorization", f"Bearer {text}"),)
        models = await stub.ListModels(inference_pb.ListModelsRequest(), metadata=bearer)
        assert [model.id for model in models.models] == ["tiny"]


async def test_row_says_who_used_what_for_what_and_how_it_ended(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme")
    await ask(keyed, text, user="ann", metadata={"team": "a"})
    await ask(keyed, text, user="ann", safety_identifier="bob", metadata={"team": "b"})
    by_user = admin_pb.QueryUsageRequest(
        group_by=[admin_pb.USAGE_DIMENSION_USER, admin_pb.USAGE_DIMENSION_LABEL], label="team"
    )
    await settled(auth, 2)
    totals = (await auth.admin.QueryUsage(by_user)).totals
    assert [(one.end_user, one.label_value, one.num_requests) for one in totals] == [
        ("ann", "a", 1),
        ("bob", "b", 1),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metadata": {f"n{i}": "x" for i in range(17)}}, "metadata has 17 entries"),
        ({"metadata": {"n" * 65: "x"}}, "metadata has a name that has 65 characters"),
        ({"metadata": {"n": "x" * 513}}, "metadata.n has 513 characters"),
        ({"metadata": {"n": "a\0"}}, "metadata.n has a character that can't be stored"),
        ({"extra_body": {"metadata": {"n": 1}}}, "metadata.n is 1"),
        ({"user": "u" * 257}, "user has 257 characters"),
        ({"safety_identifier": "u" * 257}, "user has 257 characters"),
    ],
)
async def test_name_or_label_that_the_ledger_can_not_keep_is_refused(
    auth: Auth, keyed: Edge, options: dict[str, Any], said: str
) -> None:
    text, _ = await auth.key("acme")
    with pytest.raises(openai.BadRequestError, match=said):
        await ask(keyed, text, **options)


async def test_end_users_are_hashed_or_left_out_where_the_operator_says_so(
    auth: Auth, tmp_path: Path
) -> None:
    text, _ = await auth.key("acme")
    found = []
    for how in ("hashed", "none"):
        async with keyed_gateway(tmp_path / how, auth, usage_end_user=how) as edge:
            await ask(edge, text, user="ann@example.org")
            await settled(auth, len(found) + 1)
        query = admin_pb.QueryUsageRequest(group_by=[admin_pb.USAGE_DIMENSION_USER])
        found = sorted(one.end_user for one in (await auth.admin.QueryUsage(query)).totals)
    assert found[0] == ""
    assert len(found[1]) == 32
    assert "ann" not in found[1]


async def test_shared_generation_is_reused_by_who_joins_it(auth: Auth, keyed: Edge) -> None:
    text, _ = await auth.key("acme")
    keyed.replica.gated = True
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    streams = [await ask(keyed, text, **options) for _ in range(2)]
    keyed.replica.gated = False
    keyed.replica._wake.set()
    usages = [[chunk.usage async for chunk in stream][-1] for stream in streams]
    prompt_tokens = usages[0].prompt_tokens
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [3, prompt_tokens]
    (total,) = await settled(auth, 2)
    assert (total.num_requests, total.cached_prompt_tokens) == (2, 3 + prompt_tokens)
    assert len(keyed.replica.submits) == 1
