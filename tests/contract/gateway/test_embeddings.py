"""Embeddings through the official client and gRPC, in front of a cache without an embedder."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from infermesh import Client
from infermesh.errors import ContextLengthExceeded, ModelLoading, ModelNotFound
from infermesh.v1 import semantic_cache_service_pb2 as cache_pb
from tests.fake_cache import DIMENSIONS, FakeCache, vector_of
from tests.gateway_process import Edge, make_replicas, running_gateway


@pytest.fixture
async def embedding(tmp_path: Path) -> AsyncIterator[Edge]:
    cache = FakeCache(f"unix:{tmp_path}/cache.sock")
    async with running_gateway(tmp_path, make_replicas(tmp_path), cache=cache) as edge:
        yield edge


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
async def test_embeddings_come_in_order_in_either_encoding(embedding: Edge, encoding: Any) -> None:
    texts = ["one", "two or more", "x", "four four", "fifth of all of them"]
    answer = await embedding.openai.embeddings.create(
        model="mini", input=texts, encoding_format=encoding
    )
    assert [item.index for item in answer.data] == list(range(5))
    found = [item.embedding for item in answer.data]
    if encoding == "base64":  # the client decodes only what it asked for by itself
        assert all(isinstance(value, str) for value in found)
    else:
        assert found == [vector_of(text) for text in texts]
    tokens = sum(len(text.split()) + 2 for text in texts)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert embedding.cache is not None
    assert [len(batch) for batch in embedding.cache.embedded] == [3, 2]  # its own limit per call


async def test_one_string_is_one_embedding(embedding: Edge) -> None:
    answer = await embedding.openai.embeddings.create(model="mini", input="Hello")
    assert len(answer.data) == 1
    assert answer.model == "mini"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": [1, 2]}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": 5}, "input"),
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
    ids=str,
)
async def test_bad_input_is_refused_by_name(
    embedding: Edge, change: dict[str, Any], param: str
) -> None:
    body = {"model": "mini", "input": "Hello", **change}
    response = await embedding.http.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]
    assert embedding.cache is not None
    assert embedding.cache.embedded == []


async def test_own_number_of_dimensions_may_be_named(embedding: Edge) -> None:
    answer = await embedding.openai.embeddings.create(
        model="mini", input="Hello", dimensions=DIMENSIONS
    )
    assert len(answer.data[0].embedding) == DIMENSIONS


async def test_too_long_text_is_refused_with_the_limit(embedding: Edge) -> None:
    assert embedding.cache is not None
    embedding.cache.embed_error = ContextLengthExceeded("text 1 is long", param="texts[1]")
    for texts, param in ((["a", "long"], "input[1]"), ("long", "input")):
        with pytest.raises(openai.BadRequestError) as caught:
            await embedding.openai.embeddings.create(model="mini", input=texts)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == param
        assert "256 tokens" in caught.value.message


async def test_embedder_that_loads_is_unavailable_with_a_time(embedding: Edge) -> None:
    assert embedding.cache is not None
    embedding.cache.embed_error = ModelLoading("the embedder is being loaded", retry_after_s=2.0)
    response = await embedding.http.post("/v1/embeddings", json={"model": "mini", "input": "a"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("name", ["tiny", "nothing"])
async def test_model_that_does_not_embed_is_not_found(embedding: Edge, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=name):
        await embedding.openai.embeddings.create(model=name, input="a")


async def test_gateway_without_a_cache_has_no_embedder(edge: Edge) -> None:
    with pytest.raises(openai.NotFoundError):
        await edge.openai.embeddings.create(model="mini", input="a")
    assert [model.id for model in (await edge.openai.models.list()).data] == ["tiny"]


async def test_models_are_listed_by_kind_those_that_generate_first(embedding: Edge) -> None:
    listed = (await embedding.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["kind"]) for model in listed] == [
        ("tiny", "generate"), ("mini", "embed"),
    ]  # fmt: skip
    one = (await embedding.http.get("/v1/models/mini")).json()
    assert (one["dimensions"], one["max_model_len"]) == (DIMENSIONS, 256)


async def test_embedder_is_listed_once_it_is_ready(tmp_path: Path) -> None:
    cache = FakeCache(f"unix:{tmp_path}/cache.sock")
    cache.embedder_state = cache_pb.EMBEDDER_STATE_LOADING
    async with running_gateway(tmp_path, make_replicas(tmp_path), cache=cache) as edge:
        assert len((await edge.http.get("/v1/models")).json()["data"]) == 1
        cache.embedder_state = cache_pb.EMBEDDER_STATE_READY
        assert edge.service.cache is not None
        async with asyncio.timeout(10):
            await edge.service.cache.changed()
        assert len((await edge.http.get("/v1/models")).json()["data"]) == 2


async def test_request_is_recorded_and_counted(embedding: Edge) -> None:
    headers = {"x-request-id": "mine"}
    body = {"model": "mini", "input": "a b"}
    await embedding.http.post("/v1/embeddings", json=body, headers=headers)
    record = (await embedding.http.get(f"{embedding.admin_url}/debug/requests/mine")).json()
    assert (record["status"], record["usage"]["prompt_tokens"]) == ("ok", 4)
    assert embedding.service.pipeline.admission.num_inflight == 0
    text = (await embedding.http.get(f"{embedding.admin_url}/metrics")).text
    assert 'infermesh_requests_total{endpoint="embeddings",model="mini",status="200"}' in text


async def test_python_client_embeds_over_grpc(embedding: Edge) -> None:
    def ask() -> None:
        with Client(embedding.grpc_address) as client:
            assert client.models() == ["tiny", "mini"]
            assert client.embed(["a", "bc"]) == [tuple(vector_of("a")), tuple(vector_of("bc"))]
            assert client.usage is not None
            assert client.usage.prompt_tokens == 6
            assert client.embed("one") == [tuple(vector_of("one"))]
            with pytest.raises(ModelNotFound):
                client.embed("a", model="tiny")
            assert next(client.chat("Hello", temperature=0)).text

    await asyncio.to_thread(ask)
