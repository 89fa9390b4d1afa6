"""What `infermesh doctor` makes of two scrapes: recorded from meshes, some with one thing changed.

The recordings are of a simulated mesh that was idle, lightly asked, had as many streams as places,
more streams than places, and too few KV blocks.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from infermesh.diagnosis import Finding, Limit, Scrape, diagnose, parse

RECORDED = Path(__file__).parent / "recorded"
Changes = dict[str, dict[str, float]]


def recorded(name: str, changes: Changes | None = None, silent: tuple[str, ...] = ()) -> Finding:
    """What is said of a recording.

    Args:
        changes: by process, samples of its second scrape with other values, or new ones.
        silent: processes that did not answer the second time.
    """
    facts: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    after = {process: list(lines) for process, lines in facts["after"].items()}
    for process, samples in (changes or {}).items():
        kept = [one for one in after[process] if one.rpartition(" ")[0] not in samples]
        after[process] = kept + [f"{sample} {value}" for sample, value in samples.items()]
    for process in silent:
        del after[process]
    return diagnose(
        _scrape(0.0, facts["before"], ()), _scrape(float(facts["seconds"]), after, silent)
    )


def _scrape(at_s: float, processes: dict[str, list[str]], silent: tuple[str, ...]) -> Scrape:
    return Scrape(at_s, {name: parse("\n".join(p)) for name, p in processes.items()}, silent)


@pytest.mark.parametrize(
    ("name", "limit", "words"),
    [
        ("idle", Limit.IDLE, "nobody asks it anything"),
        ("light", Limit.NOTHING, "no queue, no refusals"),
        ("compute", Limit.COMPUTE, "steps of 4.0 rows"),
        ("slots", Limit.SLOTS, "raise scheduler.max_num_seqs"),
        ("preemptions", Limit.PREEMPTIONS, "raise scheduler.kv_cache_bytes"),
    ],
)
def test_recording_shows_its_limit(name: str, limit: Limit, words: str) -> None:
    found = recorded(name)
    assert found.limit is limit
    assert words in found.sentence


REPLICA = 'infermesh_replica_ready{replica="unix:replica-0"}'
ADMISSIONS = "infermesh_quota_admissions_total"
CACHE = "infermesh_cache_requests_total"


@pytest.mark.parametrize(
    ("name", "changes", "limit", "words"),
    [
        ("compute", {"gateway": {REPLICA: 0}}, Limit.SILENT_REPLICA, "unix:replica-0"),
        (
            "compute",
            {"scheduler-0": {"infermesh_shard_stalls_total": 1}},
            Limit.SILENT_REPLICA,
            "answers no step",
        ),
        (
            "slots",
            {"gateway": {"infermesh_event_loop_lag_seconds_sum": 90}},
            Limit.GATEWAY_CPU,
            "more gateways",
        ),
        (
            "slots",
            {"gateway": {"process_cpu_seconds_total": 1e3}},
            Limit.GATEWAY_CPU,
            "core is full",
        ),
        (
            "light",
            {
                "gateway": {
                    ADMISSIONS + '{result="admitted"}': 15,
                    ADMISSIONS + '{result="rate_limit_exceeded"}': 5,
                }
            },
            Limit.QUOTA,
            "25% of the requests of limited tenants, mostly rate_limit_exceeded",
        ),
        (
            "light",
            {"gateway": {ADMISSIONS + '{result="auth_unavailable"}': 5}},
            Limit.QUOTA,
            "auth service has to come back",
        ),
        (
            "light",
            {"gateway": {CACHE + '{outcome="miss",reason="unavailable"}': 5}},
            Limit.CACHE,
            "does not answer",
        ),
        (
            "light",
            {
                "gateway": {
                    "infermesh_cache_connected": 1,
                    CACHE + '{outcome="miss",reason="no_candidate"}': 8,
                    CACHE + '{outcome="miss",reason="timeout"}': 2,
                }
            },
            Limit.CACHE,
            "no word in time for 20% of requests",
        ),
        (
            "light",
            {
                "gateway": {
                    "infermesh_cache_connected": 1,
                    CACHE + '{outcome="miss",reason="no_candidate"}': 10,
                    'infermesh_cache_wait_seconds_count{outcome="miss"}': 10,
                    'infermesh_cache_wait_seconds_sum{outcome="miss"}': 2,
                }
            },
            Limit.CACHE,
            "adds 200 ms to a request",
        ),
        (
            "slots",
            {
                "scheduler-0": {
                    'infermesh_admission_blocked_steps_total{by="slots"}': 0,
                    'infermesh_admission_blocked_steps_total{by="kv_blocks"}': 40,
                }
            },
            Limit.KV_BLOCKS,
            "wait for KV memory",
        ),
        (
            "compute",
            {"scheduler-0": {'infermesh_admission_blocked_steps_total{by="tokens"}': 500}},
            Limit.STEP_TOKENS,
            "raise scheduler.max_batch_tokens",
        ),
    ],
    ids=[
        *("replica not ready", "shard stalls", "loop late", "core full", "quota", "auth away"),
        *("cache away", "cache unheard", "cache slow", "kv blocks", "step full"),
    ],
)
def test_changed_recording_shows_the_change(
    name: str, changes: Changes, limit: Limit, words: str
) -> None:
    found = recorded(name, changes)
    assert found.limit is limit, found.sentence
    assert words in found.sentence


def test_requests_that_were_admitted_without_a_lease_are_not_refused() -> None:
    opened = {ADMISSIONS + '{result="admitted"}': 5, ADMISSIONS + '{result="open"}': 95}
    assert recorded("light", {"gateway": opened}).limit is not Limit.QUOTA


def test_process_that_does_not_answer_comes_first() -> None:
    found = recorded("slots", silent=("shard-0",))
    assert (found.limit, found.process) == (Limit.SILENT_PROCESS, "shard-0")


def test_counters_of_a_restarted_process_begin_anew() -> None:
    zeroed = {
        "infermesh_steps_total": 0.0,
        "infermesh_preemptions_total": 0.0,
        'infermesh_admission_blocked_steps_total{by="slots"}': 0.0,
        "infermesh_shard_busy_seconds_total": 0.0,
    }
    assert recorded("slots", {"scheduler-0": zeroed}).limit is Limit.NOTHING


def test_every_sentence_is_one() -> None:
    for name in ("idle", "light", "compute", "slots", "preemptions"):
        sentence = recorded(name).sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
