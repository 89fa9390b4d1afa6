"""Which texts run together, and who goes first."""

from __future__ import annotations

from services.cache.batching import BatchQueue, Lane, LaneLimits

LIMITS = {
    Lane.LOOKUP: LaneLimits(max_batch=4, max_wait_s=0.002, max_queued=6),
    Lane.EMBED: LaneLimits(max_batch=8, max_wait_s=0.010, max_queued=100),
    Lane.INDEX: LaneLimits(max_batch=2, max_wait_s=0.0, max_queued=4),
}


def queue(**items: int) -> BatchQueue[str]:
    made: BatchQueue[str] = BatchQueue(LIMITS)
    for lane, count in items.items():
        for number in range(count):
            assert made.push(Lane[lane], f"{lane}{number}", 0.0)
    return made


def test_take_waits_for_company_until_the_window_is_over() -> None:
    waiting = queue(LOOKUP=2)
    assert waiting.take(0.0019) is None
    assert waiting.wait_s(0.0015) == 0.0005
    assert waiting.take(0.002) == (Lane.LOOKUP, ["LOOKUP0", "LOOKUP1"])
    assert waiting.wait_s(0.002) is None


def test_take_does_not_wait_when_the_batch_is_full() -> None:
    waiting = queue(LOOKUP=5)
    assert waiting.take(0.0) == (Lane.LOOKUP, ["LOOKUP0", "LOOKUP1", "LOOKUP2", "LOOKUP3"])
    assert waiting.take(0.0) is None


def test_take_puts_lookups_ahead_when_bulk_work_is_due() -> None:
    waiting = queue(EMBED=8, LOOKUP=1)
    assert waiting.take(0.0) == (Lane.LOOKUP, ["LOOKUP0"])
    taken = waiting.take(0.0)
    assert taken is not None
    assert taken[0] is Lane.EMBED


def test_take_puts_clients_ahead_of_the_index() -> None:
    waiting = queue(INDEX=2, EMBED=8)
    assert [waiting.take(0.0), waiting.take(0.0)] == [
        (Lane.EMBED, [f"EMBED{i}" for i in range(8)]),
        (Lane.INDEX, ["INDEX0", "INDEX1"]),
    ]


def test_push_refuses_when_the_lane_is_full() -> None:
    waiting = queue(LOOKUP=6)
    assert not waiting.push(Lane.LOOKUP, "late", 0.0)
    assert waiting.push(Lane.EMBED, "other lane", 0.0)
