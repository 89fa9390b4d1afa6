"""The scheduler on the torch engine: random schedules give the tokens of one request at a time.

Both run in this process with the wire's bytes between them. What differs is everything that a
schedule may be: arrivals, cancels, preemptions, chunk sizes, shared prefixes, the window. float32
sums depend on the shape of a batch, so prompts are those whose likeliest token leads the second by
more than such a sum can move it, all the way.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from infermesh.config import ShardConfig
from infermesh.v1 import sampling_pb2
from infermesh.v1 import shard_service_pb2 as pb
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import FinishReason, Request, Sampling
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from services.shard import wire
from services.shard.domain import LoadSpec
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.stepping import StepRunner
from tests.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.unit.scheduler.scene import Recorder
from tests.unit.scheduler.scene import submission as plain_submission

BLOCK_SIZE = 4
NUM_BLOCKS = 64
OUTPUT = 14
# Fifty times what the parity tests let logits differ by.
MARGIN = 1e-2
NUM_PROMPTS = 32
NUM_SCHEDULES = 200
SHARE_IN_MAKE_TEST = 40


class World:
    """A batcher and the engine, and the bytes between them moved by hand."""

    def __init__(self, model: LoadedModel, capacity: Capacity, window: int) -> None:
        facts = ModelFacts("model", "print", 128, VOCAB_SIZE, frozenset())
        self.now_s = 0.0
        settings = BatcherSettings(window=window)
        self.batcher = Batcher(settings, facts, capacity, Stats(self._clock), self._clock)
        self.batcher.open_epoch(capacity, contents_survive=False)
        self.runner = StepRunner(model)
        self.recorder = Recorder()
        self.requests: list[Request] = []
        self.logprobs: list[sampling_pb2.TokenLogprobs] = []
        self.num_chunks = 0
        self._queue: deque[bytes] = deque()

    def submit(self, prompt: Sequence[int], **options: object) -> Request:
        request = self.batcher.submit(
            greedy(len(self.requests) + 1, prompt, **options), self.recorder
        )
        self.requests.append(request)
        return request

    def send(self) -> bool:
        step = self.batcher.next_step()
        if step is not None:
            self.num_chunks += sum(not row.samples for row in step.rows)
            self._queue.append(encode(1, step, packs_rows=True).SerializeToString())
        return step is not None

    def answer(self) -> bool:
        if not self._queue:
            return False
        step = wire.step(pb.StepRequest.FromString(self._queue.popleft()))
        response = wire.step_result(self.runner.execute(step, 0.0), packs_rows=True)
        result = pb.ExecuteResponse.FromString(response.SerializeToString()).result
        self.logprobs += [one for row in result.rows for one in row.logprobs]
        self.now_s += 0.01
        self.batcher.commit(result)
        return True

    def run(self) -> None:
        while self.send() or self.answer():
            pass
        assert self.batcher.is_idle

    def output(self, request: Request) -> list[int]:
        return self.recorder.outputs.get((request.stream_id, 0), [])

    def _clock(self) -> float:
        return self.now_s


def greedy(
    stream_id: int, prompt: Sequence[int], top_logprobs: int | None = None, **options: object
) -> Submission:
    params = sampling_pb2.SamplingParams(seed=1, temperature=0.0, top_logprobs=top_logprobs)
    return plain_submission(
        stream_id=stream_id,
        prompt_token_ids=list(prompt),
        sampling=Sampling(params, needs_history=False),
        ignore_eos=True,
        **{"max_tokens": OUTPUT, **options},
    )


@dataclass(frozen=True)
class Oracle:
    """Prompts, and what each of them gets when it is the only one there is."""

    model: LoadedModel
    answers: dict[tuple[int, ...], list[int]]


def alone(model: LoadedModel, prompt: Sequence[int]) -> list[int] | None:
    """The output of one request on an empty replica; None where a token of it is a near-tie."""
    world = World(model, Capacity(NUM_BLOCKS, BLOCK_SIZE, 1, 512), window=1)
    request = world.submit(prompt, top_logprobs=2)
    world.run()
    leads = [first - second for first, second in (one.top_logprobs for one in world.logprobs)]
    assert len(leads) == OUTPUT
    return world.output(request) if min(leads) > MARGIN else None


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    spec = LoadSpec(
        str(folder),
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=8,
        max_batch_tokens=512,
    )
    model = load_model(spec, ShardConfig(device="cpu", num_threads=1), lambda progress: None)
    answers: dict[tuple[int, ...], list[int]] = {}
    rng = random.Random(0)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(17)]
    while len(answers) < NUM_PROMPTS:
        prompt = shared[: rng.choice([0, 5, 12, 17])]
        if answers and rng.random() < 0.4:  # a chat goes on
            said = rng.choice(list(answers))
            prompt = [*said, *answers[said]][: rng.randrange(8, 33)]
        prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 9))]
        output = alone(model, prompt)
        if output is not None:
            answers[tuple(prompt)] = output
    return Oracle(model, answers)


def run_schedule(oracle: Oracle, seed: int) -> Counter[str]:
    """One random schedule; fails where a token differs. What happened in it."""
    rng = random.Random(seed)
    capacity = Capacity(
        num_blocks=rng.choice([14, 18, 24, NUM_BLOCKS]),
        block_size=BLOCK_SIZE,
        max_num_seqs=rng.choice([2, 4, 8]),
        max_batch_tokens=rng.choice([3, 8, 24, 512]),
    )
    world = World(oracle.model, capacity, window=rng.choice([1, 2, 2, 3]))
    prompts = list(oracle.answers)
    left = rng.randrange(3, 9)
    while left:
        action = rng.random()
        if action < 0.2:
            left -= 1
            world.submit(
                rng.choice(prompts),
                max_tokens=rng.choice([3, OUTPUT, OUTPUT]),
                priority=rng.choice([1, 2, 2, 3]),
                tenant=rng.choice(["one", "two"]),
            )
        elif action < 0.25 and world.requests:
            world.batcher.cancel(rng.choice(world.requests))
        elif action < 0.6:
            world.send()
        else:
            world.answer()
    world.run()
    return check(world, oracle)


def check(world: World, oracle: Oracle) -> Counter[str]:
    happened = Counter(chunks=world.num_chunks)
    for request in world.requests:
        (sequence,) = request.sequences
        wanted = oracle.answers[tuple(sequence.token_ids[: request.prompt_len])]
        output, ending = world.output(request), world.recorder.endings[request.stream_id, 0]
        assert output == wanted[: len(output)]
        if ending.reason is FinishReason.CANCELLED:
            happened["cancels"] += 1
        else:
            assert ending.reason is FinishReason.LENGTH
            assert len(output) == request.stop.max_len - request.prompt_len
        happened["preemptions"] += sequence.timeline.num_preemptions
        happened["cached tokens"] += sequence.cached_prompt_tokens or 0
        happened["tokens"] += len(output)
    return happened


@pytest.mark.parametrize(
    "seeds",
    [
        range(SHARE_IN_MAKE_TEST),
        pytest.param(range(SHARE_IN_MAKE_TEST, NUM_SCHEDULES), marks=pytest.mark.slow),
    ],
)
def test_random_schedules_give_the_tokens_of_one_request_at_a_time(
    oracle: Oracle, seeds: range
) -> None:
    happened = sum((run_schedule(oracle, seed) for seed in seeds), Counter[str]())
    print(dict(happened))
    for what in ("chunks", "cancels", "preemptions", "cached tokens", "tokens"):
        assert happened[what] >= len(seeds) / 4, happened
