"""The whole scheduler against the model shard: whatever happens, each output is the oracle's."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infermesh.errors import MeshError, NumericalError, OutOfMemory, Poisoned
from infermesh.v1 import sampling_pb2
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import Ending, FinishReason, Request, Sampling, Sequence
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from tests.model_shard import EOS, VOCAB_SIZE, DeviceFault, ModelShard, oracle, uses_penalties

MAX_LEN = 48


class Recorder:
    """A sink that keeps all it is told."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.endings: dict[tuple[int, int], Ending] = {}
        self.num_flushes = 0

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None: ...

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        key = (sequence.request.stream_id, sequence.choice)
        output = self.outputs[key]
        assert key not in self.endings, "a token after the end"
        assert start == len(output), "a token lost or doubled"
        output.extend(tokens)
        return True

    def finished(self, sequence: Sequence, end: Ending) -> None:
        key = (sequence.request.stream_id, sequence.choice)
        assert key not in self.endings, "finished twice"
        self.endings[key] = end

    def flush(self) -> None:
        self.num_flushes += 1


class World:
    """A batcher, a shard, and the wire between them, moved by hand."""

    def __init__(self, shard: ModelShard, **options: object) -> None:
        self.now_s = 0.0
        self.shard = shard
        self.settings = BatcherSettings(window=shard.window, **options)
        model = ModelFacts(
            "model", "print", MAX_LEN, VOCAB_SIZE, frozenset({EOS}), shard.rope_switch_len
        )
        self.batcher = Batcher(self.settings, model, self.capacity, Stats(self.clock), self.clock)
        self.recorder = Recorder()
        self.requests: dict[int, Request] = {}
        self.submissions: dict[int, Submission] = {}
        self.epoch = 0
        self.connect(survive=True)

    @property
    def capacity(self) -> Capacity:
        shard = self.shard
        return Capacity(
            shard.num_blocks, shard.block_size, shard.max_num_seqs, shard.max_batch_tokens
        )

    def clock(self) -> float:
        return self.now_s

    def connect(self, survive: bool) -> None:
        self.epoch = max(self.epoch, self.shard.epoch) + 1
        self.shard.open(self.epoch)
        self.batcher.open_epoch(self.capacity, survive)

    def submit(self, prompt: list[int], **options: object) -> int:
        stream_id = len(self.submissions) + 1
        sub = submission(stream_id, prompt, **options)
        self.submissions[stream_id] = sub
        for index, output in sub.choices:
            self.recorder.outputs[stream_id, index] = list(output)
        self.requests[stream_id] = self.batcher.submit(sub, self.recorder)
        return stream_id

    def send(self) -> bool:
        step = self.batcher.next_step()
        if step is not None:
            self.shard.receive(encode(self.epoch, step).SerializeToString())
        return step is not None

    def answer(self) -> bool:
        """Runs the oldest step; a device fault breaks the epoch."""
        self.now_s += 0.01
        if not self.shard.queue:
            return False
        try:
            result = self.shard.execute()
        except DeviceFault:
            self.break_stream(crash=False)
            return True
        self.shard.delivered()
        self.batcher.commit(result)
        return True

    def break_stream(self, crash: bool, executed_unseen: int = 0, by_a_step: bool = True) -> None:
        for _ in range(min(executed_unseen, len(self.shard.queue))):
            try:
                self.shard.execute()
            except DeviceFault:
                break
        if crash:
            self.shard.crash()
        self.batcher.break_epoch(by_a_step)
        self.batcher.roster.check_integrity()
        self.connect(survive=not crash)

    def run(self, max_rounds: int = 3000) -> None:
        for _ in range(max_rounds):
            while self.send():
                self.batcher.roster.check_integrity()
            if not self.answer():
                break
            self.batcher.roster.check_integrity()
        assert self.batcher.is_idle, "somebody starves"
        self.batcher.roster.ledger.check_idle()

    def expected(self, stream_id: int, choice: int) -> list[int]:
        sub = self.submissions[stream_id]
        max_tokens = MAX_LEN if sub.max_tokens is None else sub.max_tokens
        eos = set() if sub.ignore_eos else {EOS}
        return oracle(
            sub.prompt_token_ids,
            choice,
            sub.sampling.wire,
            max_tokens=max_tokens,
            max_model_len=MAX_LEN,
            min_tokens=sub.min_tokens,
            stop_token_ids=frozenset(eos | sub.stop_token_ids),
            rope_switch_len=self.shard.rope_switch_len,
        )

    def check_outputs(self, *, allowed: tuple[type[MeshError], ...] = ()) -> None:
        for (stream_id, choice), output in self.recorder.outputs.items():
            ending = self.recorder.endings[stream_id, choice]
            expected = self.expected(stream_id, choice)
            if ending.reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert output == expected
            else:
                assert output == expected[: len(output)]
                if ending.reason is FinishReason.ERROR:
                    assert isinstance(ending.error, allowed), ending.error


def submission(
    stream_id: int,
    prompt: list[int],
    *,
    choices: list[tuple[int, list[int]]] | None = None,
    max_tokens: int | None = 8,
    min_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
    ignore_eos: bool = False,
    priority: int = 2,
    seed: int = 7,
    temperature: float = 0.0,
    presence_penalty: float = 0.0,
    remaining_s: float | None = None,
    domain: str = "tenant",
) -> Submission:
    wire = sampling_pb2.SamplingParams(
        seed=seed, temperature=temperature, presence_penalty=presence_penalty
    )
    return Submission(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=list(prompt),
        choices=choices if choices is not None else [(0, [])],
        sampling=Sampling(wire, uses_penalties(wire)),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        priority=priority,
        tenant="tenant",
        tenant_weight=1.0,
        remaining_s=remaining_s,
        sharing_domain=domain,
        traceparent="",
    )


def random_submit(world: World, rng: random.Random) -> None:
    base = [2 + i % 9 for i in range(rng.randrange(0, 24))]  # prefixes are often shared
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


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_scheduler_gives_the_oracles_output_when_anything_happens(seed: int) -> None:
    rng = random.Random(seed)
    shard = ModelShard(
        num_blocks=rng.choice([4, 10, 16, 64]),
        block_size=rng.choice([1, 2, 4, 4]),
        max_num_seqs=rng.choice([1, 2, 4, 8]),
        max_batch_tokens=rng.choice([1, 3, 8, 32]),
        window=rng.choice([1, 2, 3]),
        rope_switch_len=rng.choice([0, 0, 5, 12, 30]),
    )
    world = World(shard, enable_prefix_caching=rng.random() < 0.75, max_crashes_per_request=1000)
    breaks, failures = rng.random() < 0.5, rng.random() < 0.5
    for _ in range(rng.randrange(10, 120)):
        action = rng.random()
        if action < 0.2:
            random_submit(world, rng)
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
    shard.failing_slots.clear()
    world.run()
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
