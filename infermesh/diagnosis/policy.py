"""What limits a mesh now, from two scrapes of it: a pure function, no clock and no I/O.

Causes are asked for in an order in which one explains those behind it: a replica that is away makes
others queue, a gateway that is late makes everything late, a queue may be for want of places, of
memory, or of the device itself.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from infermesh.diagnosis.scrape import Change, Scrape, changes

# Shares of what was observed between the scrapes, from which on something is the limit.
_REFUSED_SHARE = 0.05
_UNHEARD_SHARE = 0.05
_BLOCKED_SHARE = 0.3
_BUSY_SHARE = 0.85
_CPU_SHARE = 0.9
_PREEMPTED_SHARE = 0.02
_LATE_S = 0.02
_CACHE_WAIT_S = 0.1
# Reasons of cache lookups that say that the cache itself was in the way.
_CACHE_TROUBLES = ("timeout", "late", "deadline", "overloaded", "unavailable", "embedder_failed")


class Limit(enum.Enum):
    """What a mesh can be limited by."""

    SILENT_PROCESS = "silent_process"
    SILENT_REPLICA = "silent_replica"
    GATEWAY_CPU = "gateway_cpu"
    QUOTA = "quota"
    CACHE = "cache"
    PREEMPTIONS = "preemptions"
    KV_BLOCKS = "kv_blocks"
    SLOTS = "slots"
    STEP_TOKENS = "step_tokens"
    COMPUTE = "compute"
    IDLE = "idle"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Finding:
    """What limits the mesh, and what would move it: one sentence for a person.

    Attributes:
        process: where it was seen; empty: nowhere in particular.
    """

    limit: Limit
    sentence: str
    process: str = ""


@dataclass(frozen=True, slots=True)
class _Mesh:
    before: Scrape
    after: Scrape
    gateways: list[Change]
    schedulers: list[Change]


def diagnose(before: Scrape, after: Scrape) -> Finding:
    """The first cause that the difference between two scrapes shows."""
    mesh = _Mesh(
        before,
        after,
        changes(before, after, "gateway"),
        changes(before, after, "scheduler"),
    )
    for cause in _CAUSES:
        if (finding := cause(mesh)) is not None:
            return finding
    return _nothing(mesh)


def _silent_process(mesh: _Mesh) -> Finding | None:
    if not mesh.after.silent:
        return None
    names = ", ".join(mesh.after.silent)
    return Finding(
        Limit.SILENT_PROCESS,
        f"{names} did not answer: see its log, and whether its machine is overloaded; no setting "
        "moves this.",
        mesh.after.silent[0],
    )


def _silent_replica(mesh: _Mesh) -> Finding | None:
    for one in mesh.schedulers:
        is_stuck = one.lately("num_requests_running") > 0 and not one.grew("steps_total")
        if one.grew("shard_stalls_total") or (is_stuck and not one.after.value("replica_serving")):
            return _away(one.name, "its shard answers no step")
    for one in mesh.gateways:
        for replica, is_ready in one.after.values("replica_ready", "replica").items():
            if not is_ready:
                return _away(replica, "the gateway can send it nothing")
        if one.grew("replica_silences_total"):
            return _away(one.name, "it has given up sessions of a replica that said nothing")
    return None


def _away(name: str, why: str) -> Finding:
    return Finding(
        Limit.SILENT_REPLICA,
        f"A replica is away ({name}: {why}), so the others have its load: look at its shard's log; "
        "scheduler.stall_s says how long silence is borne.",
        name,
    )


def _gateway_cpu(mesh: _Mesh) -> Finding | None:
    for one in mesh.gateways:
        late_s = one.mean("event_loop_lag_seconds") or 0.0
        cpu = one.grew("process_cpu_seconds_total") / one.seconds
        if late_s > _LATE_S or cpu > _CPU_SHARE:
            return Finding(
                Limit.GATEWAY_CPU,
                f"The gateway's core is full ({one.name} uses {cpu:.0%} of one, its event loop is "
                f"{late_s * 1e3:.0f} ms late): run more gateways side by side; no setting of one "
                "makes it faster.",
                one.name,
            )
    return None


def _quota(mesh: _Mesh) -> Finding | None:
    results: dict[str, float] = {}
    for one in mesh.gateways:
        for result, count in one.grew_by("quota_admissions_total", "result").items():
            results[result] = results.get(result, 0.0) + count
    total = sum(results.values())
    admitted = ("admitted", "open")  # open: without a lease, while auth is away
    refused = {result: count for result, count in results.items() if result not in admitted}
    if not refused or sum(refused.values()) / total < _REFUSED_SHARE:
        return None
    worst = max(refused, key=lambda result: refused[result])
    share = sum(refused.values()) / total
    if worst == "auth_unavailable":
        remedy = "the auth service has to come back first: see its log and its database"
    else:
        remedy = "raise the tenant's limits (`infermesh tenants limit`)"
    return Finding(
        Limit.QUOTA,
        f"Quota refuses {share:.0%} of the requests of limited tenants, mostly {worst}: {remedy}.",
    )


def _cache(mesh: _Mesh) -> Finding | None:
    for one in mesh.gateways:
        asked = one.grew("cache_requests_total")
        if not asked:
            continue
        reasons = one.grew_by("cache_requests_total", "reason")
        troubled = sum(count for reason, count in reasons.items() if reason in _CACHE_TROUBLES)
        wait_s = one.mean("cache_wait_seconds") or 0.0
        if not one.after.value("cache_connected"):
            what = "does not answer, so every request is computed"
        elif troubled / asked > _UNHEARD_SHARE:
            what = f"has no word in time for {troubled / asked:.0%} of requests"
        elif wait_s > _CACHE_WAIT_S:
            what = f"adds {wait_s * 1e3:.0f} ms to a request"
        else:
            continue
        return Finding(
            Limit.CACHE,
            f"The semantic cache {what}: give its process a core of its own, or bound the wait "
            "with gateway.cache_timeout_ms and gateway.cache_head_start_ms.",
            one.name,
        )
    return None


def _preemptions(mesh: _Mesh) -> Finding | None:
    for one in mesh.schedulers:
        steps, preempted = one.grew("steps_total"), one.grew("preemptions_total")
        if steps and preempted / steps > _PREEMPTED_SHARE:
            return Finding(
                Limit.PREEMPTIONS,
                f"Running requests lose their places to others and are computed again "
                f"({one.name}: {preempted:.0f} in {one.seconds:.0f} s): KV memory is too small for "
                f"{one.lately('num_requests_running'):.0f} at once; raise scheduler.kv_cache_bytes "
                "(or num_blocks), or lower scheduler.max_num_seqs.",
                one.name,
            )
    return None


def _blocked(mesh: _Mesh) -> Finding | None:
    worst: tuple[float, str, Change] | None = None
    for one in mesh.schedulers:
        steps = one.grew("steps_total")
        for by, count in one.grew_by("admission_blocked_steps_total", "by").items():
            share = count / steps if steps else 0.0
            if share > _BLOCKED_SHARE and (worst is None or share > worst[0]):
                worst = (share, by, one)
    if worst is None:
        return None
    share, by, one = worst
    where = f"{one.name}: {one.lately('num_requests_waiting'):.0f} wait, in {share:.0%} of steps"
    if by == "kv_blocks":
        used = one.after.value("num_blocks_used") / max(1.0, one.after.value("kv_blocks"))
        sentence = (
            f"Requests wait for KV memory ({where}; {used:.0%} of it is held): raise "
            "scheduler.kv_cache_bytes (or num_blocks), or add a replica."
        )
        return Finding(Limit.KV_BLOCKS, sentence, one.name)
    if by == "slots":
        sentence = (
            f"Requests wait for a place ({where}; all {one.after.value('max_num_seqs'):.0f} are "
            "taken): raise scheduler.max_num_seqs, or add a replica."
        )
        return Finding(Limit.SLOTS, sentence, one.name)
    sentence = (
        f"Prompts wait for room in a step ({where}; a step holds "
        f"{one.after.value('step_budget_tokens'):.0f} tokens): raise scheduler.max_batch_tokens or "
        "scheduler.target_itl_ms, or add a replica."
    )
    return Finding(Limit.STEP_TOKENS, sentence, one.name)


def _compute(mesh: _Mesh) -> Finding | None:
    for one in mesh.schedulers:
        busy = one.grew("shard_busy_seconds_total") / one.seconds
        if busy <= _BUSY_SHARE:
            continue
        rate = one.grew("generation_tokens_total") / one.seconds
        rows = one.mean("step_batch_size") or 0.0
        return Finding(
            Limit.COMPUTE,
            f"The device computes all the time ({one.name}: busy {busy:.0%}, {rate:.0f} tokens/s "
            f"in steps of {rows:.1f} rows) and nobody waits for a place: a faster device, "
            "scheduler.quantize, or another replica gives more.",
            one.name,
        )
    return None


def _idle(mesh: _Mesh) -> Finding | None:
    worked = sum(one.grew("steps_total") for one in mesh.schedulers)
    asked = sum(one.grew("requests_total") for one in mesh.gateways)
    open_now = sum(one.lately("requests_inflight") for one in mesh.gateways)
    if worked or asked or open_now:
        return None
    return Finding(Limit.IDLE, "Nothing limits the mesh: nobody asks it anything.")


def _nothing(mesh: _Mesh) -> Finding:
    busy = [one.grew("shard_busy_seconds_total") / one.seconds for one in mesh.schedulers]
    share = f", the busiest device computes {max(busy):.0%} of the time" if busy else ""
    return Finding(Limit.NOTHING, f"Nothing limits the mesh: no queue, no refusals{share}.")


_CAUSES: tuple[Callable[[_Mesh], Finding | None], ...] = (
    _silent_process,
    _silent_replica,
    _gateway_cpu,
    _quota,
    _cache,
    _preemptions,
    _blocked,
    _compute,
    _idle,
)
