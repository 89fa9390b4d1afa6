"""Peers as processes: servers that have to become ready and end, and loops asked in lines."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers.driven_process import driven
from benchmarks.peers.server_process import free_port, serving
from benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
DEMO_MODEL = ROOT / "demo" / "model"
GREEDY = Workload(prompt_tokens=20, output_tokens=5, vocab=(300, 1900), temperature=0.0)
LOOP = """
from benchmarks.peers.drivers.lines import answer_requests
def run(loop):
    print("noise of a library")
    while begun := loop.begin_due():
        assert len(begun) <= loop.streams
        for prompt, timeline in begun:
            timeline.chunks_s = [timeline.due_s + i for i in range(1, loop.output_tokens + {more})]
            loop.end(timeline)
def load():
    print("noise while loading")
    return {{"version": "1"}}, run
answer_requests(load)
"""


def test_server_is_ready_in_the_block_and_gone_after_it() -> None:
    port = free_port()
    command = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    with serving(command, f"http://127.0.0.1:{port}/", timeout_s=60) as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_server_that_ends_at_once_says_why() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such model')")
    with (
        pytest.raises(RuntimeError, match="no such model"),
        serving(command, f"http://127.0.0.1:{free_port()}/", timeout_s=60),
    ):
        pass


def test_server_that_is_never_ready_is_ended() -> None:
    command = ("sh", "-c", "echo loading; exec sleep 60")
    with (
        pytest.raises(RuntimeError, match="loading"),
        serving(command, f"http://127.0.0.1:{free_port()}/", timeout_s=3),
    ):
        pass


def test_loop_reports_by_the_same_arithmetic() -> None:
    with driven((sys.executable, "-c", LOOP.format(more=1)), ROOT) as loop:
        assert loop.facts() == {"version": "1"}
        for requests in (6, 3):
            report = loop.measure(GREEDY, streams=2, requests=requests)
            assert (report.requests, report.output_tokens) == (requests, 5 * requests)
            assert report.itl_p50_ms == pytest.approx(1000, rel=1e-6)


def test_loop_is_refused_when_an_answer_lacks_a_token() -> None:
    with (
        driven((sys.executable, "-c", LOOP.format(more=0)), ROOT) as loop,
        pytest.raises(RuntimeError, match="4 tokens where 5 were asked for"),
    ):
        loop.measure(GREEDY, streams=1, requests=1)


def test_loop_that_fails_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match="no weights here"),
        driven((sys.executable, "-c", "raise SystemExit('no weights here')"), ROOT),
    ):
        pass


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("engine_loop", ("float32", "")), ("transformers_loop", ("float32",))],
)
def test_every_prompt_is_answered_in_full_when_streams_share_a_model(
    module: str, arguments: tuple[str, ...]
) -> None:
    program = ("-m", f"benchmarks.peers.drivers.{module}", str(DEMO_MODEL))
    with driven((sys.executable, *program, *arguments), ROOT) as loop:
        assert loop.facts()["dtype"] == "float32"
        report = loop.measure(GREEDY, streams=3, requests=7)
    assert (report.requests, report.output_tokens) == (7, 35)
    assert report.ttft_p50_ms is not None
    assert report.e2e_p50_ms is not None
    assert report.ttft_p50_ms < report.e2e_p50_ms
