"""What the gateway's metrics say of requests, and that clients can't make series up."""

from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.gateway_process import Edge
from tests.metric_rules import problems, series

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
Ask = Callable[[httpx.AsyncClient, int], Awaitable[httpx.Response]]


async def scrape(edge: Edge) -> str:
    return (await edge.http.get(f"{edge.admin_url}/metrics")).text


def total(text: str, name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(f"infermesh_{name}") and all(one in line for one in wanted)
    )


@pytest.mark.parametrize(
    "ask",
    [
        lambda http, i: http.get(f"/v1/nothing/{i}"),
        lambda http, i: http.get(f"/v1/models/no-model-{i}"),
        lambda http, i: http.post("/v1/chat/completions", json={**ASK, "model": f"no-model-{i}"}),
        lambda http, i: http.post("/v1/embeddings", json={"model": f"no-{i}", "input": "a"}),
        lambda http, i: http.request(f"VERB{i}", "/v1/models"),
        lambda http, i: http.post("/v1/chat/completions", content=b"{" * i),
        lambda http, i: http.post(
            "/v1/chat/completions", json=ASK, headers={"x-request-id": f"mine-{i}"}
        ),
    ],
    ids=["path", "model in path", "model", "embedder", "verb", "body", "request id"],
)
async def test_what_clients_make_up_makes_no_series(edge: Edge, ask: Ask) -> None:
    await ask(edge.http, 1)
    before = series(await scrape(edge))
    for number in range(2, 8):
        await ask(edge.http, number)
    text = await scrape(edge)
    assert series(text) == before
    assert problems(text) == []


async def test_http_requests_count_by_route_and_status(edge: Edge) -> None:
    before = await scrape(edge)
    await edge.http.get("/v1/models/tiny")
    await edge.http.get("/somewhere")
    after = await scrape(edge)

    def counted(**labels: str) -> float:
        name = "http_requests_total"
        return total(after, name, **labels) - total(before, name, **labels)

    assert counted(route="/v1/models/{model:path}", method="GET", status="200") == 1
    assert counted(route="other", method="GET", status="404") == 1


async def test_refused_request_names_the_model_that_it_meant(edge: Edge) -> None:
    await edge.http.post("/v1/chat/completions", json={**ASK, "max_tokens": 100_000})
    text = await scrape(edge)
    assert total(text, "requests_total", endpoint="chat", model="tiny", status="400") >= 1


async def test_time_between_tokens_counts_each_token(edge: Edge) -> None:
    before = await scrape(edge)
    reply = await edge.openai.chat.completions.create(**ASK)
    after = await scrape(edge)
    name = "inter_token_latency_seconds_count"
    counted = total(after, name, model="tiny") - total(before, name, model="tiny")
    assert reply.usage is not None
    assert counted == reply.usage.completion_tokens - 1


async def test_series_of_a_replica_go_when_it_leaves(edge: Edge) -> None:
    address = edge.replica.address
    assert total(await scrape(edge), "replica_ready", replica=address) == 1
    (client,) = edge.service.fleet.clients
    edge.service.fleet.update([])
    while address in await scrape(edge):
        await client.leaving.wait()
    assert total(await scrape(edge), "replicas_known") == 0
