"""The whole scheduler and the model shard, with the wire between them moved by hand."""

from __future__ import annotations

from infermesh.errors import MeshError
from infermesh.v1 import sampling_pb2
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import FinishReason, Request, Sampling
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from tests.model_of_tokens import EOS, VOCAB_SIZE, oracle, uses_penalties
from tests.model_shard import DeviceFault, ModelShard
from tests.unit.scheduler.scene import Recorder
from tests.unit.scheduler.scene import submission as plain_submission

MAX_LEN = 48


class World:
    """A batcher, a shard, and the wire between them, moved by hand."""

    def __init__(self, shard: ModelShard, **options: object) -> None:
        self.now_s = 0.0
        self.shard = shard
        self.settings = BatcherSettings(**{"window": shard.window, **options})
        assert self.settings.max_window == shard.window, "what the shard was told"
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
            message = encode(self.epoch, step, self.shard.packs_rows)
            self.shard.receive(message.SerializeToString())
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
    seed: int = 7,
    temperature: float = 0.0,
    presence_penalty: float = 0.0,
    domain: str = "tenant",
    **changes: object,
) -> Submission:
    wire = sampling_pb2.SamplingParams(
        seed=seed, temperature=temperature, presence_penalty=presence_penalty
    )
    return plain_submission(
        request_id=f"request-{stream_id}",
        stream_id=stream_id,
        prompt_token_ids=list(prompt),
        sampling=Sampling(wire, uses_penalties(wire)),
        sharing_domain=domain,
        **changes,
    )
