"""The whole scheduler against the model shard: whatever happens, each output is the oracle's."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from infermesh.errors import NumericalError, OutOfMemory, Poisoned
from services.scheduler.batcher import MAX_WINDOW
from services.scheduler.sequence import FinishReason
from tests.model_of_tokens import VOCAB_SIZE
from tests.model_shard import ModelShard
from tests.randomised import drawn
from tests.unit.scheduler.world import World, submission


def random_submit(world: World, rng: random.Random, suspects: bool) -> None:
    base = [2 + i % 9 for i in range(rng.randrange(0, 24))]  # prefixes are often shared
    if world.submissions and rng.random() < 0.4:  # and some go on from what was said
        key = rng.choice(list(world.recorder.outputs))
        said = world.submissions[key[0]].prompt_token_ids + world.recorder.outputs[key]
        base = said[: rng.choice([24, rng.randrange(25)])]
    prompt = base + [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(1, 10))]
    options: dict[str, object] = {
        "max_tokens": rng.choice([1, 2, 5, 12, None]),
        "min_tokens": rng.choice([0, 0, 4]),
        "ignore_eos": rng.random() < 0.3,
        "stop_token_ids": frozenset({5, 6}) if rng.random() < 0.2 else frozenset(),
        "priority": rng.choice([1, 2, 2, 3]),
        "temperature": rng.choice([0.0, 1.0]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5]),
        "seed": rng.randrange(3),
        "domain": rng.choice(["a", "a", "b"]),
        "num_crashes": rng.choice([0, 0, 0, 1000]) if suspects else 0,
        "tenant": rng.choice(["one", "one", "two", "three"]),
        "tenant_weight": rng.choice([0.5, 1.0, 1.0, 4.0]),
    }
    count = rng.choice([1, 1, 1, 2, 4])
    options["choices"] = [(index, []) for index in range(count)]
    if rng.random() < 0.2:  # resume what an earlier attempt delivered
        probe = submission(len(world.submissions) + 1, prompt, **options)
        world.submissions[probe.stream_id] = probe
        options["choices"] = [
            (i, out[: rng.randrange(len(out) + 1)])
            for i in range(count)
            for out in [world.expected(probe.stream_id, i)]
        ]
        del world.submissions[probe.stream_id]
    if len(prompt) + 1 <= world.shard.num_blocks * world.shard.block_size:
        world.submit(prompt, **options)


def check_accounts(world: World) -> None:
    """Who has something open is remembered, nobody else for long."""
    queue = world.batcher.roster.queue
    assert queue.num_accounts() <= 9  # three tenants, three classes
    assert queue.num_accounts() == 0 or len(world.batcher.roster.requests)


@drawn(30, 120, st.integers(0, 2**32), suppress=list(HealthCheck))
def test_scheduler_gives_the_oracles_output_when_anything_happens(seed: int) -> None:
    rng = random.Random(seed)
    lead_s = rng.choice([0.0, 0.0, 0.02, 1.0])
    shard = ModelShard(
        num_blocks=rng.choice([4, 10, 16, 64]),
        block_size=rng.choice([1, 2, 4, 4]),
        max_num_seqs=rng.choice([1, 2, 4, 8]),
        max_batch_tokens=rng.choice([1, 3, 8, 32]),
        window=MAX_WINDOW if lead_s else rng.choice([1, 2, 3]),
        rope_switch_len=rng.choice([0, 0, 5, 12, 30]),
        packs_rows=rng.random() < 0.75,
    )
    shard.step_us = lambda tokens: rng.choice([1, 1, 1, 40]) * (10 + sum(tokens))
    world = World(
        shard,
        enable_prefix_caching=rng.random() < 0.75,
        max_crashes_per_request=1000,
        window=rng.choice([1, 2, 3]) if lead_s else shard.window,
        lead_s=lead_s,
        target_itl_s=rng.choice([None, None, 1e-6, 2e-5]),
    )
    breaks, failures = rng.random() < 0.5, rng.random() < 0.5
    for _ in range(rng.randrange(10, 120)):
        action = rng.random()
        if action < 0.2:
            random_submit(world, rng, suspects=not breaks)
        elif action < 0.55:
            world.send()
        elif action < 0.92:
            world.answer()
        elif action < 0.94 and world.requests:
            world.batcher.cancel(rng.choice(list(world.requests.values())))
        elif breaks and action < 0.96:
            world.break_stream(crash=rng.random() < 0.5, executed_unseen=rng.randrange(3))
        elif failures and action > 0.96:
            shard.failing_slots.add(rng.randrange(shard.max_num_seqs))
        world.batcher.roster.check_integrity()
        check_accounts(world)
    shard.failing_slots.clear()
    world.run()
    check_accounts(world)
    world.check_outputs(allowed=(OutOfMemory, NumericalError))


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("prompt_len", [1, 4, 5, 8])
def test_choices_share_their_prompt_when_n_is_four(caching: bool, prompt_len: int) -> None:
    world = World(ModelShard(), enable_prefix_caching=caching)
    prompt = list(range(2, 2 + prompt_len))
    world.submit(prompt, choices=[(i, []) for i in range(4)], temperature=1.0, max_tokens=6)
    computed = 0
    while world.send():
        computed += sum(r.num_tokens for r in world.shard.queue[-1].rows if r.token_ids)
        world.answer()
    assert computed == prompt_len + 3  # each fork: the last token
    world.run()
    world.check_outputs()


@pytest.mark.parametrize("caching", [True, False])
def test_sequence_is_computed_anew_once_when_it_outgrows_its_rotary_tables(caching: bool) -> None:
    world = World(ModelShard(rope_switch_len=10), enable_prefix_caching=caching)
    prompt = [2, 3, 4, 5, 6, 7]
    short = world.submit(prompt, max_tokens=4, ignore_eos=True)
    grows = world.submit(prompt, max_tokens=16, ignore_eos=True)
    # Its first blocks hold the same tokens, and yet none of the others' contents.
    long = world.submit([*prompt, *prompt], max_tokens=4, ignore_eos=True)
    world.run()
    world.check_outputs()
    preempted = {
        stream_id: world.requests[stream_id].sequences[0].timeline.num_preemptions
        for stream_id in (short, grows, long)
    }
    assert preempted == {short: 0, grows: 1, long: 0}


def test_crashes_at_other_replicas_count_when_a_request_breaks_the_device() -> None:
    world = World(ModelShard(poison_token=0), max_crashes_per_request=2)
    others = [world.submit([2 + i, 3, 4], max_tokens=20, ignore_eos=True) for i in range(3)]
    for _ in range(3):
        world.send()
        world.answer()
    bad = world.submit([9, 0, 9], max_tokens=4, num_crashes=2)
    innocent = world.submit([9, 8, 9], max_tokens=4, num_crashes=2)
    assert not world.batcher.roster.ledger.running  # they make way
    world.run()
    assert isinstance(world.recorder.endings[bad, 0].error, Poisoned)
    world.check_outputs(allowed=(Poisoned,))
    replays = [world.requests[s].sequences[0].timeline.num_replays for s in (*others, innocent)]
    assert replays == [0, 0, 0, 0]  # it broke the device once, alone


def test_crashes_are_forgotten_when_a_token_comes() -> None:
    world = World(ModelShard(), max_crashes_per_request=2)
    stream = world.submit([2, 3, 4], max_tokens=20, ignore_eos=True)
    for _ in range(6):
        world.send()
        world.answer()
        world.send()
        world.break_stream(crash=True)
        assert world.requests[stream].num_crashes == 1
    world.run()
    world.check_outputs()


def test_poisonous_request_fails_alone_when_it_breaks_the_device() -> None:
    world = World(ModelShard(poison_token=0), max_crashes_per_request=2)
    for index in range(5):
        world.submit([2 + index, 3, 4, 5], max_tokens=20, ignore_eos=True)
    bad = world.submit([9, 0, 9], max_tokens=4)
    world.run()
    ending = world.recorder.endings[bad, 0]
    assert isinstance(ending.error, Poisoned)
    world.check_outputs(allowed=(Poisoned,))
    assert sum(e.reason is FinishReason.ERROR for e in world.recorder.endings.values()) == 1
