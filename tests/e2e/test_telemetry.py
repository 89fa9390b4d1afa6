"""One request, one trace across all processes; metrics to a collector; logs without secrets."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.mesh_process import Mesh, wait_until
from tests.otlp_receiver import OtlpReceiver, attributes

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
REQUEST_ID = "req-for-the-log"
FAILED_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
FAILED_ID = "req-that-fails"
SECRET = "xylophone"
# No output has it: the simulated engine says words of letters.
FAIL = 25
SERVICES = ("gateway", "auth", "cache", "scheduler-0", "shard-0")


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
def traced_mesh(
    tmp_path_factory: pytest.TempPathFactory, collector: OtlpReceiver
) -> Iterator[Mesh]:
    """A mesh with a collector and a cache that has answered one request, which was traced; its
    device fails at one token."""
    folder = tmp_path_factory.mktemp("traced")
    profile = folder / "profile.json"
    profile.write_text(json.dumps({"fixed_us": 20_000, "fail_token_id": FAIL}))
    settings = {
        "telemetry.trace_file": f"{folder}/spans.jsonl",
        "telemetry.otlp_endpoint": collector.endpoint,
        "telemetry.otlp_metrics_interval_s": "0.5",
        "gateway.principal_ttl_s": "0.1",  # so that auth is asked, who knows the key from before
        "gateway.cache_head_start_ms": "3000",
        "gateway.cache_timeout_ms": "3000",
        "shard.simulated_profile": str(profile),
    }
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    with Mesh(folder, "--engine", "simulated", *flags) as mesh:
        wait_until(lambda: mesh.metric("gateway", "cache_connected") == 1, 60)
        answer = httpx.post(
            f"{mesh.facts['url']}/v1/chat/completions",
            json={
                "model": mesh.model,
                "messages": [{"role": "user", "content": f"Hello, {SECRET}"}],
                "temperature": 0,
                "max_tokens": 5,
            },
            headers={
                "traceparent": f"00-{TRACE}-{PARENT}-01",
                "x-request-id": REQUEST_ID,
                **dict(mesh.bearer),
            },
            timeout=60,
        )
        assert answer.status_code == 200
        yield mesh


def all_spans(collector: OtlpReceiver, services: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The request's spans, once each of these services has sent one."""

    def have_come() -> bool:
        return set(services) <= {service for service, _ in collector.spans(TRACE)}

    wait_until(have_come, 20, f"spans of {services}")
    return collector.spans(TRACE)


def test_request_is_one_trace_over_all_processes(
    traced_mesh: Mesh, collector: OtlpReceiver
) -> None:
    found = all_spans(collector, SERVICES)
    ids = {span.span_id.hex() for _, span in found} | {PARENT}
    assert all(span.parent_span_id.hex() in ids for _, span in found)
    names = {span.name.rpartition(".")[2] for _, span in found}
    assert {"authenticate", "lookup", "queue", "prefill", "decode"} <= names
    file = traced_mesh.tmp_path / "spans.jsonl"
    filed = [json.loads(line) for line in file.read_text().splitlines()]
    assert {str(span["service"]) for span in filed if span["trace_id"] == TRACE} == set(SERVICES)


def test_spans_follow_the_conventions_for_generative_ai(
    traced_mesh: Mesh, collector: OtlpReceiver
) -> None:
    found = all_spans(collector, ("gateway", "scheduler-0"))
    (edge,) = [span for service, span in found if service == "gateway"]
    assert edge.name == f"chat {traced_mesh.model}"
    facts = attributes(edge.attributes)
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.request.model"] == facts["gen_ai.response.model"] == traced_mesh.model
    assert facts["gen_ai.response.id"] == REQUEST_ID
    assert (facts["gen_ai.usage.output_tokens"], facts["infermesh.status"]) == (5, "ok")
    assert facts["gen_ai.usage.input_tokens"] > 5
    for service, span in found:
        if service == "scheduler-0":
            own = attributes(span.attributes)
            assert own["gen_ai.response.finish_reasons"] == ["length"]
            assert own["gen_ai.usage.output_tokens"] == 5
    assert SECRET not in "".join(str(span) for _, span in found)


def test_metrics_reach_the_collector_as_prometheus_shows_them(
    traced_mesh: Mesh, collector: OtlpReceiver
) -> None:
    name = "infermesh_steps"
    wait_until(
        lambda: (
            all(collector.metrics(service) for service in SERVICES)
            and collector.metrics("scheduler-0")[name].sum.data_points[0].as_double
            == traced_mesh.metric("scheduler-0", "steps_total")
        ),
        20,
        "the last step is exported",
    )
    assert collector.metrics("scheduler-0")[name].sum.is_monotonic
    points = collector.metrics("gateway")[
        "infermesh_time_to_first_token_seconds"
    ].histogram.data_points
    labels = {"route": "chat", "model": traced_mesh.model}
    (point,) = [one for one in points if attributes(one.attributes) == labels]
    assert point.count == sum(point.bucket_counts) == 1
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    assert point.sum == traced_mesh.metric("gateway", "time_to_first_token_seconds_sum", **labels)


def logs_of(mesh: Mesh) -> dict[str, str]:
    """What each process has logged."""
    paths = (mesh.tmp_path / "state").glob("infermesh/logs/*/*.log")
    return {path.stem: path.read_text() for path in paths}


def lines_of(mesh: Mesh, trace_id: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of one trace, of those processes that have any."""
    found = {}
    for name, text in logs_of(mesh).items():
        lines = [json.loads(line) for line in text.splitlines()]
        if own := [line for line in lines if line.get("trace_id") == trace_id]:
            found[name] = own
    return found


def test_log_lines_are_json_with_request_and_trace_and_without_secrets(traced_mesh: Mesh) -> None:
    logs = logs_of(traced_mesh)
    assert set(SERVICES) <= logs.keys()
    api_key = traced_mesh.facts["api_key"]
    for name, text in logs.items():
        assert SECRET not in text, name
        assert api_key not in text, name
        for line in text.splitlines():
            assert "token_ids" not in json.loads(line), name
    lines = [json.loads(line) for line in logs["gateway"].splitlines()]
    (own,) = [line for line in lines if line.get("request_id") == REQUEST_ID]
    assert (own["trace_id"], own["status"]) == (TRACE, "ok")


def test_log_lines_of_gateway_scheduler_and_shard_are_one_trace_when_a_request_fails(
    traced_mesh: Mesh,
) -> None:
    url = f"{traced_mesh.facts['url']}/v1/completions"
    headers = dict(traced_mesh.bearer)
    body = {"model": traced_mesh.model, "prompt": [400, 401], "max_tokens": 1000, "stream": True}
    # In the same step as another, whose row shows that the device is not to blame.
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as neighbour:
        stream = neighbour.iter_lines()  # the connection lives as long as this
        next(stream)
        failed = httpx.post(
            url,
            json={"model": traced_mesh.model, "prompt": [400, FAIL, 402]},
            headers={
                **headers,
                "traceparent": f"00-{FAILED_TRACE}-{PARENT}-01",
                "x-request-id": FAILED_ID,
            },
            timeout=60,
        )
    assert failed.status_code == 500
    services = {"gateway", "scheduler-0", "shard-0"}
    wait_until(lambda: lines_of(traced_mesh, FAILED_TRACE).keys() == services, 20, "their lines")
    lines = lines_of(traced_mesh, FAILED_TRACE)
    (edge,), (scheduler,), (shard,) = (lines[name] for name in sorted(services))
    assert (edge["message"], edge["request_id"]) == ("request", FAILED_ID)
    assert (scheduler["message"], scheduler["request_id"]) == ("request failed", FAILED_ID)
    assert edge["error"] == scheduler["error"] == "internal"
    assert shard["message"] == "a row's computation failed"


def test_response_carries_its_waterfall(demo_mesh: Mesh) -> None:
    body = {"model": demo_mesh.model, "messages": [{"role": "user", "content": "Hello"}]}
    url = f"{demo_mesh.facts['url']}/v1/chat/completions"
    whole = httpx.post(url, json=body, headers=dict(demo_mesh.bearer), timeout=60)
    waterfall = whole.headers["infermesh-waterfall"]
    for part in ("queue", "prefill", "decode"):
        assert f"{part};dur=" in waterfall
    by_id = httpx.get(
        f"{demo_mesh.facts['admin_url']}/debug/requests/{whole.headers['x-request-id']}"
    )
    assert by_id.status_code == 200
    streamed = httpx.post(
        url, json={**body, "stream": True}, headers=dict(demo_mesh.bearer), timeout=60
    )
    comments = [line for line in streamed.text.splitlines() if line.startswith(":")]
    assert any("prefill;dur=" in line for line in comments)


def test_every_service_exports_metrics(demo_mesh: Mesh) -> None:
    assert demo_mesh.metric("gateway", "requests_total") >= 0
    assert demo_mesh.metric("scheduler-0", "steps_total") >= 0
    assert demo_mesh.metric("shard-0", "shard_steps_total") >= 0
