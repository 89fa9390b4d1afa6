"""Classes of priority against each other, over many steps of a whole replica."""

from __future__ import annotations

import itertools
import random

from services.scheduler.sequence import Request
from tests.model_shard import ModelShard
from tests.unit.scheduler.desk import Desk


def step(desk: Desk) -> None:
    while desk.send():
        pass
    desk.answer()


def test_higher_class_preempts_also_where_a_slot_is_kept_for_other_tenants() -> None:
    desk = Desk(ModelShard(num_blocks=2000, max_num_seqs=16, max_batch_tokens=64))
    numbers = itertools.count(1)

    def ask(tenant: str, priority: int, max_tokens: int) -> Request:
        number = next(numbers)
        prompt = [number % 50 + 1, 2, 3, 4, 5]
        return desk.submit(number, prompt, priority=priority, tenant=tenant, max_tokens=max_tokens)

    ask("other", 3, 1)  # its class has had two tenants of late
    desk.run()
    for index in range(16):
        ask(f"low-{index % 3}", 1, 85)
    ask("busy", 3, 80)
    for _ in range(5):
        step(desk)
    second = ask("busy", 3, 2)
    for _ in range(10):
        step(desk)
    assert second.is_over


def test_higher_class_computes_a_prefix_itself_that_a_starved_lower_class_has_begun() -> None:
    desk = Desk(ModelShard(num_blocks=2000, max_num_seqs=8, max_batch_tokens=16))
    numbers, rng = itertools.count(1), random.Random(1)

    def ask(prompt: list[int], priority: int, tenant: str) -> Request:
        return desk.submit(next(numbers), prompt, priority=priority, tenant=tenant, max_tokens=1)

    def keep_the_middle_class_busy() -> None:
        while len(desk.batcher.roster.queue) < 4:
            ask([rng.randrange(1, 40) for _ in range(40)], 2, "middle")

    document = [(i * 7) % 23 + 1 for i in range(60)]
    ask(document, 1, "low")
    desk.send()
    keep_the_middle_class_busy()
    urgent = ask(list(document), 3, "high")
    for _ in range(20):
        keep_the_middle_class_busy()
        step(desk)
    assert urgent.is_over
