"""Clients that leave, wait, share or read slowly; deadlines; drain; what the admin port knows."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway import metrics
from gateway.server import GatewayService
from infermesh.config import ConfigError, GatewayConfig
from infermesh.errors import Draining
from infermesh.sockets import bind
from infermesh.v1 import scheduler_service_pb2 as pb
from tests.fake_stream import saying
from tests.gateway_process import Edge, make_replicas, running_gateway
from tests.tiny_tokenizer import byte_level

MESSAGES = [{"role": "user", "content": "Hello"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60}
GREEDY = {**ASK, "temperature": 0}


def headers(request_id: str) -> dict[str, str]:
    return {"x-request-id": request_id}


async def text_of(stream: Any) -> str:
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


async def test_client_leaving_in_mid_stream_cancels_at_the_scheduler(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(
        **ASK, stream=True, extra_headers=headers("leaver")
    )
    await edge.replica.step(3)
    await anext(aiter(stream))
    await stream.close()
    await edge.replica.wait(lambda: edge.replica.cancelled == ["leaver"])
    assert edge.replica.num_streams == 0
    assert edge.service.pipeline.admission.num_inflight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaving_while_queued_cancels_at_the_scheduler(
    edge: Edge, stream: bool
) -> None:
    edge.replica.hold_accept = True
    asking = asyncio.create_task(
        edge.http.post(
            "/v1/chat/completions", json={**ASK, "stream": stream}, headers=headers("queued")
        )
    )
    await edge.replica.wait(lambda: len(edge.replica.submits) == 1)
    asking.cancel()
    await edge.replica.wait(lambda: edge.replica.cancelled == ["queued"])
    await edge.service.pipeline.admission.idle()


async def test_client_leaving_a_whole_answer_cancels_at_the_scheduler(edge: Edge) -> None:
    edge.replica.gated = True
    asking = asyncio.create_task(edge.http.post("/v1/chat/completions", json=ASK))
    await edge.replica.wait(lambda: edge.replica.num_streams == 1)
    await edge.replica.step(2)
    asking.cancel()
    await edge.replica.wait(lambda: edge.replica.num_streams == 0)


async def test_headers_go_out_at_admission_before_the_first_token(edge: Edge) -> None:
    edge.replica.gated = True
    body = {**ASK, "stream": True}
    async with edge.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200  # though not one token was made
        assert response.headers["content-type"].startswith("text/event-stream")


async def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, make_replicas(tmp_path), keepalive_s=0.02) as edge:
        edge.replica.gated = True
        body = {**ASK, "stream": True}
        comments = 0
        async with edge.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                comments += line == ": keep-alive"
                if comments == 3:
                    break
        assert comments == 3


async def test_identical_greedy_requests_share_one_generation(edge: Edge) -> None:
    hits = metrics.SINGLE_FLIGHT_HITS._value.get()  # type: ignore[attr-defined]
    edge.replica.gated = True
    first = await edge.openai.chat.completions.create(**GREEDY, stream=True)
    await edge.replica.step(10)
    late = await edge.openai.chat.completions.create(
        **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    edge.replica.gated = False
    edge.replica._wake.set()
    texts = await asyncio.gather(text_of(first), text_of(late))
    assert texts[0] == texts[1]
    assert len(texts[0]) > 50
    assert len(edge.replica.submits) == 1
    assert metrics.SINGLE_FLIGHT_HITS._value.get() == hits + 1  # type: ignore[attr-defined]


async def test_shared_generation_ends_with_its_last_reader(edge: Edge) -> None:
    edge.replica.gated = True
    streams = [
        await edge.openai.chat.completions.create(
            **GREEDY, stream=True, extra_headers=headers(f"reader-{i}")
        )
        for i in range(2)
    ]
    await streams[0].close()
    await edge.replica.step(5)
    assert (await anext(aiter(streams[1]))).choices
    assert edge.replica.num_streams == 1
    await streams[1].close()
    await edge.replica.wait(lambda: edge.replica.cancelled == ["reader-0"])


@pytest.mark.parametrize(
    "difference",
    [{"user": "b"}, {"max_tokens": 59}, {"temperature": 0.5}, {"n": 2}, {"logprobs": True}],
)
async def test_requests_that_differ_do_not_share(edge: Edge, difference: dict[str, Any]) -> None:
    edge.replica.gated = True
    one = await edge.openai.chat.completions.create(**GREEDY, stream=True)
    two = await edge.openai.chat.completions.create(**{**GREEDY, **difference}, stream=True)
    assert len(edge.replica.submits) == 2
    await one.close()
    await two.close()


async def test_sharers_with_different_stop_strings_each_get_their_own_text(edge: Edge) -> None:
    edge.replica.gated = True
    plain = await edge.openai.chat.completions.create(**GREEDY, stream=True)
    stopped = await edge.openai.chat.completions.create(**GREEDY, stream=True, stop="word 2")
    edge.replica.gated = False
    edge.replica._wake.set()
    whole, cut = await asyncio.gather(text_of(plain), text_of(stopped))
    assert len(edge.replica.submits) == 1
    assert cut == whole[: whole.index("word 2")]


async def test_slow_client_is_cut_off_and_others_are_not(tmp_path: Path) -> None:
    """The server's buffers fill up; what was read before is followed by the error."""
    async with running_gateway(
        tmp_path, make_replicas(tmp_path), slow_consumer_buffer_tokens=8
    ) as edge:
        edge.replica.gated = True
        reader, writer = await asyncio.open_connection(
            *edge.service.announce()["http_address"].split(":")
        )
        body = json.dumps({**ASK, "stream": True, "n": 8}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await edge.replica.wait(lambda: edge.replica.num_streams == 1)
        edge.replica.script = lambda submit, choice: byte_level().encode("x" * 60).ids
        session, stream_id = next(iter(edge.replica._streams))
        # one message with more than the buffer holds is more than any client can have read
        delta = pb.TokenDelta(stream_id=stream_id, choice=0, start=0, token_ids=[50] * 9)
        edge.replica._send(session, deltas=[delta])
        await edge.replica.wait(lambda: edge.replica.cancelled == ["slow"])
        received = await reader.readuntil(b"slow_consumer")
        assert b"200 OK" in received
        writer.close()
        edge.replica.gated = False
        edge.replica.script = saying("fine")
        answer = await edge.openai.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "fine"


async def test_deadline_of_the_client_travels_and_is_kept(edge: Edge) -> None:
    edge.replica.gated = True
    response = await edge.http.post(
        "/v1/chat/completions", json=ASK, headers={"x-request-timeout-s": "0.2"}
    )
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    remaining = edge.replica.submits[0].remaining_deadline.ToMicroseconds()
    assert 0 < remaining <= 200_000
    await edge.replica.wait(lambda: edge.replica.num_streams == 0)


async def test_deadline_of_the_gateway_travels_unless_the_generation_is_shared(
    edge: Edge,
) -> None:
    await edge.openai.chat.completions.create(**ASK, temperature=0.5)
    await edge.openai.chat.completions.create(**GREEDY)
    sampled, greedy = edge.replica.submits
    assert 590 < sampled.remaining_deadline.ToTimedelta().total_seconds() <= 600
    assert not greedy.HasField("remaining_deadline")


async def test_stop_string_loses_neither_times_nor_cached_tokens(edge: Edge) -> None:
    response = await edge.http.post("/v1/chat/completions", json={**ASK, "stop": "word 2"})
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    waterfall = response.headers["infermesh-waterfall"]
    assert "queue;dur=1.000, prefill;dur=2.000, decode;dur=" in waterfall


async def test_record_is_up_to_date_when_the_request_still_runs(edge: Edge) -> None:
    edge.replica.gated = True
    body = {**ASK, "stream": True}
    url = "/v1/chat/completions"
    async with edge.http.stream("POST", url, json=body, headers=headers("live")) as response:
        events = response.aiter_lines()
        for number in (1, 2, 3):
            await edge.replica.step()
            async for line in events:
                if '"content":"' in line and '"content":""' not in line:  # a token's text
                    break
            record = (await edge.http.get(f"{edge.admin_url}/debug/requests/live")).json()
            assert record["status"] == "running"
            assert record["usage"]["completion_tokens"] == number
            assert "decode" in record["waterfall_ms"]
        await edge.replica.step(60)  # to its end
        async for _ in events:
            pass


async def test_request_id_and_waterfall_are_told_and_kept(edge: Edge) -> None:
    response = await edge.http.post("/v1/chat/completions", json=ASK, headers=headers("mine"))
    assert response.headers["x-request-id"] == "mine"
    waterfall = response.headers["infermesh-waterfall"]
    for phase in ("auth", "queue", "prefill", "decode", "network", "total"):
        assert f"{phase};dur=" in waterfall
    assert "queue;dur=1.000" in waterfall
    record = (await edge.http.get(f"{edge.admin_url}/debug/requests/mine")).json()
    assert (record["status"], record["usage"]["completion_tokens"]) == ("ok", 60)
    assert record["replicas"] == [edge.replica.address]
    missing = await edge.http.get(f"{edge.admin_url}/debug/requests/none")
    assert missing.status_code == 404
    streamed = await edge.http.post("/v1/chat/completions", json={**ASK, "stream": True})
    tail = streamed.text.split("\n\n")[-3:]
    assert tail[0].startswith(": infermesh-waterfall auth;dur=")
    assert tail[1] == "data: [DONE]"
    assert len(streamed.headers["x-request-id"]) == 32


async def test_trace_context_reaches_the_scheduler(edge: Edge) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await edge.http.post("/v1/chat/completions", json=ASK, headers={"traceparent": parent})
    assert "0af7651916cd43dd8448eb211c80319c" in edge.replica.submits[0].traceparent


async def test_admin_port_tells_metrics_and_replicas(edge: Edge) -> None:
    await edge.openai.chat.completions.create(**ASK)
    text = (await edge.http.get(f"{edge.admin_url}/metrics")).text
    assert 'infermesh_requests_total{endpoint="chat",model="tiny",status="200"}' in text
    assert "infermesh_time_to_first_token_seconds_bucket" in text
    (replica,) = (await edge.http.get(f"{edge.admin_url}/debug/replicas")).json()
    assert (replica["state"], replica["routable"], replica["model"]) == ("serving", True, "tiny")


async def test_cors_answers_the_configured_origin_alone(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, make_replicas(tmp_path), cors_allow_origins=("https://app.example",)
    ) as edge:
        for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
            response = await edge.http.get("/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in response.headers) is allowed


async def drain_begun(edge: Edge) -> None:
    """Until nobody can connect any more."""
    host, _, port = edge.service.announce()["http_address"].rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            await writer.wait_closed()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # closed with the listener
            continue


async def test_drain_finishes_streams_and_takes_no_new_connection(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    draining = asyncio.create_task(edge.service.drain(10.0))
    await drain_begun(edge)
    with pytest.raises(httpx.ConnectError):  # the client's one connection has the stream
        await edge.http.get("/readyz")
    assert not draining.done()
    edge.replica.gated = False
    edge.replica._wake.set()
    assert await text_of(stream)
    await draining


async def test_connections_that_are_open_get_a_last_answer_in_a_drain(tmp_path: Path) -> None:
    replicas = make_replicas(tmp_path)
    async with running_gateway(tmp_path, replicas, hand_over_s=60.0) as edge:
        assert (await edge.http.get("/readyz")).status_code == 200
        draining = asyncio.create_task(edge.service.drain(60.0))
        await drain_begun(edge)
        answer = await edge.http.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        await draining  # no connection is left to wait for
        with pytest.raises(Draining):
            edge.service.pipeline.admission.enter("tenant")


async def test_drain_tells_streams_that_outlast_the_grace(edge: Edge) -> None:
    edge.replica.gated = True
    stream = await edge.openai.chat.completions.create(**ASK, stream=True)
    await edge.service.drain(0.01)
    with pytest.raises(openai.APIError) as caught:
        await text_of(stream)
    assert caught.value.code == "draining"
    await edge.replica.wait(lambda: edge.replica.num_streams == 0)


@pytest.mark.parametrize("setting", ["http_address", "admin_address", "grpc_address"])
def test_bind_beyond_this_machine_is_refused(setting: str) -> None:
    config = GatewayConfig(**{setting: "0.0.0.0:8000"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"gateway.{setting} is 0.0.0.0:8000"):
        GatewayService(config)


async def test_address_in_use_is_one_sentence(edge: Edge) -> None:
    taken = edge.service.announce()["http_address"]
    with pytest.raises(ConfigError, match=r"gateway\.http_address: port \d+ .* is in use"):
        bind("gateway.http_address", taken)
