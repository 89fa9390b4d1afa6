"""The load generator against a whole mesh whose step time is known."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import shared_prefix_ttft
from benchmarks.load import Target, run_load, send
from benchmarks.workload import Workload
from tests.e2e.mesh_process import Mesh, environment

STEP_S = 0.1
WINDOW = 2  # steps in flight
WORKLOAD = Workload(prompt_tokens=8, output_tokens=20)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Its steps take 100 ms whatever they hold."""
    folder = tmp_path_factory.mktemp("load")
    profile = folder / "profile.json"
    nothing = dict.fromkeys(
        ("per_prefill_token_us", "per_decode_row_us", "per_context_token_us"), 0
    )
    profile.write_text(json.dumps({"fixed_us": STEP_S * 1e6, **nothing}))
    flags = ("--no-cache", "--engine", "simulated", "--set", f"shard.simulated_profile={profile}")
    with Mesh(folder, *flags, "--set", "scheduler.max_batch_tokens=256") as mesh:
        yield mesh


def test_measured_latencies_agree_with_the_engines_step_time(mesh: Mesh) -> None:
    names = ("steps_total", "generation_tokens_total", "prompt_tokens_total")
    before = {name: mesh.metric("scheduler-0", name) for name in names}
    figures = run_load(Target.of_mesh(mesh.facts), WORKLOAD, streams=4, requests=8)
    steps, tokens, prompts = (mesh.metric("scheduler-0", n) - before[n] for n in names)
    assert (figures.requests, figures.errors) == (8, {})
    assert figures.output_tokens == tokens == 8 * 20
    assert prompts == 8 * 8
    assert figures.itl_p50_ms is not None
    assert figures.tpot_p50_ms is not None
    assert figures.ttft_p50_ms is not None
    assert 0.95 < figures.itl_p50_ms / 1000 / STEP_S < 1.25
    assert 0.95 < figures.tpot_p50_ms / 1000 / STEP_S < 1.25
    # a prompt's own step, and those that were in flight before it
    assert 0.95 < figures.ttft_p50_ms / 1000 / STEP_S < 1.25 * (1 + WINDOW)
    assert 0.95 < figures.wall_s / (steps * STEP_S) < 1.25


async def test_open_loop_overlaps_what_a_single_stream_would_send_in_turn(mesh: Mesh) -> None:
    target = Target.of_mesh(mesh.facts)
    done, wall_s = await send(target, WORKLOAD, requests=10, per_second=20)
    assert [one.error for one in done] == [None] * 10
    assert all(one.output_tokens == 20 for one in done)
    assert wall_s < 0.5 * sum(one.e2e_s for one in done)


async def test_refusal_is_counted_by_the_servers_code(mesh: Mesh) -> None:
    target = Target.of_mesh(mesh.facts)
    endless = Workload(prompt_tokens=8, output_tokens=10**6)
    done, _ = await send(target, endless, requests=3, streams=1)
    assert [one.error for one in done] == ["context_length_exceeded"] * 3


@pytest.mark.parametrize(
    ("shared", "computed", "steps"),
    [(320, 60, 1), (0, 380, 2)],
)
async def test_prefix_that_is_warm_costs_no_time_and_one_that_is_new_does(
    mesh: Mesh, shared: int, computed: int, steps: int
) -> None:
    new = Workload(prompt_tokens=60, output_tokens=1, seed=shared + 1)
    long = Workload(
        prompt_tokens=380, output_tokens=1, shared_prefix_tokens=shared, seed=shared + 2
    )
    found = await shared_prefix_ttft.measure(mesh.facts, 6, new, long)
    # two prompts may begin alike by chance, for a token or two
    assert all(computed - 2 <= count <= computed for count in found["computed_behind_prefix"])
    assert all(60 - 2 <= count <= 60 for count in found["computed_alone"])
    assert 0.9 * steps < found["ratio"]["median"] < 1.2 * steps


def test_command_measures_a_url_and_keeps_every_timeline(mesh: Mesh, tmp_path: Path) -> None:
    kept = tmp_path / "result.json"
    address = ("--url", mesh.facts["url"], "--model", mesh.model)
    lengths = ("--prompt-tokens", "6", "--output-tokens", "5", "--text")
    levels = ("--streams", "1", "3", "--requests-per-stream", "2")
    rest = ("--api-key", mesh.facts["api_key"], "--json", str(kept))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", *address, *lengths, *levels, *rest],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(kept.read_text())["runs"]
    assert [run["streams"] for run in runs] == [1, 3]
    assert [len(run["requests"]) for run in runs] == [2, 6]
    for run in runs:
        assert all(len(one["chunks_s"]) == 5 for one in run["requests"])
        assert run["report"]["output_tokens"] == 5 * len(run["requests"])
    assert f"{runs[1]['report']['tokens_per_s']}" in done.stdout
