"""One request, one trace across all processes; its waterfall; metrics on every service."""

import json
from pathlib import Path

import httpx

from tests.e2e.mesh_process import Mesh, wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def spans(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [span for span in found if span["trace_id"] == TRACE]


def test_request_is_one_trace_over_gateway_scheduler_and_shard(tmp_path: Path) -> None:
    trace_file = tmp_path / "spans.jsonl"
    with Mesh(tmp_path, "--set", f"telemetry.trace_file={trace_file}") as mesh:
        response = httpx.post(
            f"{mesh.facts['url']}/v1/chat/completions",
            json={"model": mesh.model, "messages": [{"role": "user", "content": "Hello"}]},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", **dict(mesh.bearer)},
            timeout=60,
        )
        assert response.status_code == 200
        services = {"gateway", "scheduler-0", "shard-0"}
        wait_until(lambda: services <= {str(s["service"]) for s in spans(trace_file)}, 20)
    found = spans(trace_file)
    ids = {span["span_id"] for span in found} | {PARENT}
    assert all(span["parent_id"] in ids for span in found)
    names = {str(span["name"]) for span in found}
    assert {"queue", "prefill", "decode"} <= {name.rpartition(".")[2] for name in names}


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


def test_log_lines_are_json_with_the_request_id(tmp_path: Path) -> None:
    with Mesh(tmp_path, "--engine", "simulated", "--no-cache") as mesh:
        httpx.post(
            f"{mesh.facts['url']}/v1/chat/completions",
            json={"model": mesh.model, "messages": [{"role": "user", "content": "Hello"}]},
            headers={"x-request-id": "req-for-the-log", **dict(mesh.bearer)},
            timeout=60,
        )
        log = next((tmp_path / "state").glob("infermesh/logs/*/gateway.log"))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line.get("request_id") == "req-for-the-log" for line in lines)
