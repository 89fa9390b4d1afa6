"""The metrics port says whether a process is alive and ready."""

import asyncio
import socket
import urllib.error
import urllib.request

import grpc
import pytest

from infermesh import rpc
from infermesh.telemetry import endpoint, metrics, vitals
from infermesh.telemetry.vitals import Vitals


class TurnedClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_vitals_are_alive_while_the_event_loop_turns() -> None:
    clock = TurnedClock()
    own = Vitals(clock)
    clock.now += 19
    assert own.is_alive
    clock.now += 2
    assert not own.is_alive
    own.beat()
    assert own.is_alive


def test_vitals_are_ready_while_every_service_serves() -> None:
    clock = TurnedClock()
    own = Vitals(clock)
    assert not own.is_ready
    own.report("a", True)
    assert own.is_ready
    own.report("b", False)
    assert not own.is_ready
    own.report("b", True)
    assert own.is_ready
    clock.now += 60
    assert not own.is_ready


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_endpoint_answers_probes_by_status(host: str) -> None:
    clock = TurnedClock()
    own = Vitals(clock)
    address = endpoint.serve(f"{host}:0", own)

    assert get(address, "/healthz") == (200, "ok\n")
    assert get(address, "/readyz") == (503, "not ready\n")
    own.report("a", True)
    assert get(address, "/readyz?verbose") == (200, "ready\n")
    clock.now += 60
    assert get(address, "/healthz") == (503, "not ok\n")
    assert get(address, "/debug")[0] == 404


def test_endpoint_serves_metrics_while_a_client_says_nothing() -> None:
    metrics.counter("probe_test_total", "Of this test.").inc()
    address = endpoint.serve("127.0.0.1:0")
    host, _, port = address.partition(":")

    with socket.create_connection((host, int(port))):
        status, text = get(address, "/metrics")

    assert status == 200
    assert "infermesh_probe_test_total 1.0" in text


def test_endpoint_is_none_where_no_address_is_set() -> None:
    assert endpoint.serve("") == ""


async def test_health_of_a_grpc_server_is_what_readiness_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Vitals()
    monkeypatch.setattr(rpc, "PROCESS", own)
    server = grpc.aio.server()
    health = rpc.add_standard_services(server, ["infermesh.v1.AuthService"])

    await health.set_serving(True)
    assert own.is_ready
    await health.set_serving(False)
    assert not own.is_ready


async def test_the_event_loop_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "_BEAT_S", 0)
    clock = TurnedClock()
    own = Vitals(clock)
    clock.now += 60
    task = asyncio.create_task(vitals.keep_beating(own))
    await asyncio.sleep(0)
    task.cancel()

    assert own.is_alive
