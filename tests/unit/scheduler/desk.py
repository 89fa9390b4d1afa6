"""A batcher on the model shard, moved by hand, and what its requests were told."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from infermesh.errors import MeshError
from infermesh.v1 import sampling_pb2
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import Ending, MoveReason, Request, Sampling, Sequence
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from tests.model_of_tokens import EOS, VOCAB_SIZE, oracle
from tests.model_shard import ModelShard

MAX_LEN = 96


class Listener:
    """A sink that keeps tokens and endings by stream and choice, and no request."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.endings: dict[tuple[int, int], Ending] = {}

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None: ...

    def delta(
        self, sequence: Sequence, start: int, tokens: Seq[int], logprobs: Seq[object]
    ) -> bool:
        key = (sequence.request.stream_id, sequence.choice)
        assert key not in self.endings, "a token after the end"
        self.outputs.setdefault(key, []).extend(tokens)
        return True

    def finished(self, sequence: Sequence, end: Ending) -> None:
        key = (sequence.request.stream_id, sequence.choice)
        assert key not in self.endings, "finished twice"
        self.endings[key] = end

    def moved(self, request: Request, reason: MoveReason) -> None: ...

    def flush(self) -> None: ...


class Desk:
    """Submits, steps and a clock that only `step_s` moves."""

    def __init__(self, shard: ModelShard, **options: Any) -> None:
        self.now_s = 0.0
        self.shard = shard
        self.listener = Listener()
        capacity = Capacity(
            shard.num_blocks, shard.block_size, shard.max_num_seqs, shard.max_batch_tokens
        )
        model = ModelFacts("model", "print", MAX_LEN, VOCAB_SIZE, frozenset({EOS}))
        settings = BatcherSettings(window=shard.window, **options)
        self.batcher = Batcher(settings, model, capacity, Stats(self._clock), self._clock)
        shard.open(1)
        self.batcher.open_epoch(capacity, contents_survive=True)

    def submit(self, stream_id: int, prompt: Seq[int], **changes: Any) -> Request:
        return self.batcher.submit(submission(stream_id, prompt, **changes), self.listener)

    def send(self) -> bool:
        """Plans a step and sends it; False where none can be."""
        step = self.batcher.next_step()
        if step is not None:
            self.shard.receive(encode(1, step, self.shard.packs_rows).SerializeToString())
        return step is not None

    def answer(self, step_s: float = 0.01) -> bool:
        """Runs the oldest step; False where none is in flight."""
        if not self.shard.queue:
            return False
        result = self.shard.execute()
        self.shard.delivered()
        self.now_s += step_s
        self.batcher.commit(result)
        self.batcher.roster.check_integrity()
        return True

    def run(self, max_steps: int = 3000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            while self.send():
                self.batcher.roster.check_integrity()
            if not self.answer():
                break
        assert self.batcher.is_idle, "somebody starves"
        self.batcher.roster.ledger.check_idle()

    def _clock(self) -> float:
        return self.now_s


def submission(
    stream_id: int,
    prompt: Seq[int],
    *,
    n: int = 1,
    outputs: Seq[Seq[int]] = (),
    max_tokens: int | None = 8,
    ignore_eos: bool = True,
    min_tokens: int = 0,
    priority: int = 2,
    tenant: str = "tenant",
    tenant_weight: float = 1.0,
    remaining_s: float | None = None,
    traceparent: str = "",
) -> Submission:
    """`outputs`: what was delivered of each choice before."""
    delivered = [list(output) for output in outputs] or [[] for _ in range(n)]
    wire = sampling_pb2.SamplingParams(seed=7, temperature=1.0)
    return Submission(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=list(prompt),
        choices=list(enumerate(delivered)),
        sampling=Sampling(wire, needs_history=False),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=frozenset(),
        ignore_eos=ignore_eos,
        priority=priority,
        tenant=tenant,
        tenant_weight=tenant_weight,
        remaining_s=remaining_s,
        sharing_domain="tenant",
        traceparent=traceparent,
    )


def expected(sub: Submission, choice: int) -> list[int]:
    """What the choice would say undisturbed."""
    assert sub.max_tokens is not None
    return oracle(
        sub.prompt_token_ids,
        choice,
        sub.sampling.wire,
        max_tokens=sub.max_tokens,
        max_model_len=MAX_LEN,
        stop_token_ids=frozenset() if sub.ignore_eos else frozenset({EOS}),
    )
