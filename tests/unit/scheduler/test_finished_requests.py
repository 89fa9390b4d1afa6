"""What is over is let go, whatever else is still open."""

from __future__ import annotations

import gc

from services.scheduler.sequence import Request
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk


def test_finished_requests_are_let_go_when_an_earlier_deadline_is_still_open() -> None:
    desk = Desk(ModelShard())
    desk.submit(1, [2, 3, 4], max_tokens=80, remaining_s=500.0)
    for stream_id in range(2, 40):
        desk.submit(stream_id, [2, 3, stream_id], max_tokens=1, remaining_s=1000.0 + stream_id)
        while (stream_id, 0) not in desk.listener.endings:
            desk.send()
            desk.answer()
    assert (1, 0) not in desk.listener.endings
    gc.collect()
    requests = [one for one in gc.get_objects() if type(one) is Request]
    assert sum(one.sink is desk.listener for one in requests) <= 3


def test_deadlines_are_kept_in_order_when_finished_requests_are_let_go() -> None:
    desk = Desk(ModelShard())
    left = {stream_id: 1000.0 - stream_id for stream_id in (1, 2, 3)}
    for stream_id, remaining_s in left.items():
        desk.submit(stream_id, [2, 3, stream_id], max_tokens=80, remaining_s=remaining_s)
    brief = [desk.submit(i, [2, 3, i], max_tokens=80, remaining_s=10.0) for i in range(4, 30)]
    for request in brief:
        desk.batcher.cancel(request)
    late = []
    while (due_s := desk.batcher.next_deadline_s()) is not None:
        desk.now_s = due_s
        ended_before = set(desk.listener.endings)
        desk.batcher.expire()
        late += [stream_id for stream_id, _ in set(desk.listener.endings) - ended_before]
    assert late == [3, 2, 1]
