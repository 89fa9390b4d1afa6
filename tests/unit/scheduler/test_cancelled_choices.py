"""Choices that nobody reads any more end alone; their siblings' outputs don't change."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from services.scheduler.sequence import FinishReason
from tests.model_shard import ModelShard
from tests.randomised import drawn
from tests.unit.scheduler.desk import Desk, expected, submission


def test_siblings_go_on_when_a_choice_is_cancelled() -> None:
    desk = Desk(ModelShard())
    request = desk.submit(1, [2, 3, 4, 5, 6], n=3, max_tokens=20)
    while len(desk.listener.outputs.get((1, 1), [])) < 4:
        desk.send()
        desk.answer()
    desk.batcher.cancel(request, [1, 9])
    assert set(desk.listener.endings) == {(1, 1)}
    assert desk.listener.endings[1, 1].reason is FinishReason.CANCELLED
    desk.run()
    assert len(desk.listener.outputs[1, 1]) < 20
    sub = submission(1, [2, 3, 4, 5, 6], n=3, max_tokens=20)
    for choice in (0, 2):
        assert desk.listener.outputs[1, choice] == expected(sub, choice)


def test_request_is_over_when_its_choices_were_cancelled_one_by_one() -> None:
    desk = Desk(ModelShard())
    request = desk.submit(1, [2, 3, 4], n=2, max_tokens=20)
    desk.send()
    for choice in (0, 1):
        desk.batcher.cancel(request, [choice])
    assert request.is_over
    desk.answer()
    assert desk.batcher.is_idle
    desk.batcher.roster.ledger.check_idle()


@drawn(20, 60, st.integers(0, 2**32))
def test_siblings_give_the_oracles_output_when_choices_are_cancelled_anywhere(seed: int) -> None:
    """The one whose prompt the others share may be cancelled at any step of it, too."""
    rng = random.Random(seed)
    desk = Desk(
        ModelShard(
            num_blocks=rng.choice([16, 24, 64]),
            block_size=rng.choice([1, 2, 4]),
            max_num_seqs=rng.choice([1, 3, 8]),
            max_batch_tokens=rng.choice([2, 5, 16]),
            window=rng.choice([1, 2, 3]),
        )
    )
    subs, requests = {}, {}
    for _ in range(80):
        action = rng.random()
        if action < 0.1:
            stream_id, prompt = len(subs) + 1, [2 + i for i in range(rng.randrange(1, 9))]
            options = {"n": rng.randrange(1, 5), "max_tokens": 6, "ignore_eos": rng.random() < 0.5}
            subs[stream_id] = submission(stream_id, prompt, **options)
            requests[stream_id] = desk.submit(stream_id, prompt, **options)
        elif action < 0.2 and requests:
            request = requests[rng.choice(list(requests))]
            desk.batcher.cancel(request, [rng.randrange(4)])
        elif action < 0.6:
            desk.send()
        else:
            desk.answer()
        desk.batcher.roster.check_integrity()
    desk.run()
    for (stream_id, choice), ending in desk.listener.endings.items():
        whole = expected(subs[stream_id], choice)
        output = desk.listener.outputs.get((stream_id, choice), [])
        cancelled = ending.reason is FinishReason.CANCELLED
        assert output == (whole[: len(output)] if cancelled else whole)
    assert len(desk.listener.endings) == sum(len(sub.choices) for sub in subs.values())
