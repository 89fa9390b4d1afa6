"""infermesh's engine without the mesh: planner and step runner called in turn, in one process.

The same batches by the same plans over the same engine as `infermesh up` runs, with nothing between
them: no gRPC, no gateway, no HTTP, no text. What is left of its rate in the mesh is the mesh's tax.
`python -m … MODEL_FOLDER DTYPE QUANTIZE`, QUANTIZE may be empty.
"""

import sys
import time
from collections.abc import Sequence

from benchmarks.peers.drivers.lines import ClosedLoop, Loaded, Timeline, answer_requests
from infermesh.config import SchedulerConfig, ShardConfig
from infermesh.errors import MeshError
from infermesh.v1 import sampling_pb2
from services.scheduler.batcher import Batcher, BatcherSettings
from services.scheduler.intake import ModelFacts, Submission
from services.scheduler.ledger import Capacity
from services.scheduler.sequence import Ending, FinishReason, MoveReason, Request, Sampling
from services.scheduler.sequence import Sequence as Running
from services.scheduler.stats import Stats
from services.scheduler.steps import encode
from services.shard import host, wire
from services.shard.domain import LoadSpec
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.stepping import StepRunner

_EPOCH = 1


def load() -> Loaded:
    """Loads as a shard does what the arguments say."""
    host.prepare_process()
    folder, dtype, quantize = sys.argv[1:]
    config = SchedulerConfig()
    spec = LoadSpec(
        folder,
        dtype=dtype,
        quantize=quantize,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
    )
    loaded = load_model(spec, ShardConfig(), lambda _: None)
    manifest = loaded.manifest
    facts = {
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "weight_bytes": manifest.weight_bytes,
    }
    return facts, EngineLoop(loaded).run


class Answers:
    """The sink of all requests: tokens as they come, by stream id."""

    def __init__(self, loop: ClosedLoop) -> None:
        self._loop = loop
        self.timelines: dict[int, Timeline] = {}

    def accepted(self, stream_id: int, queued_tokens: int) -> None: ...
    def moved(self, request: Request, reason: MoveReason) -> None: ...
    def taken_over(self, request: Request) -> None: ...
    def flush(self) -> None: ...

    def refused(self, stream_id: int, error: MeshError) -> None:
        raise error

    def delta(
        self, sequence: Running, start: int, tokens: Sequence[int], logprobs: Sequence[object]
    ) -> bool:
        timeline = self.timelines[sequence.request.stream_id]
        timeline.chunks_s += [time.perf_counter()] * len(tokens)
        return True

    def finished(self, sequence: Running, end: Ending) -> None:
        if end.reason is not FinishReason.LENGTH:
            raise RuntimeError(f"a request ended with {end.reason}: {end.error}")
        self._loop.end(self.timelines.pop(sequence.request.stream_id))


class EngineLoop:
    """One engine and its batcher."""

    def __init__(self, loaded: LoadedModel) -> None:
        manifest, sized = loaded.manifest, loaded.capacity
        model = ModelFacts(
            manifest.model_id,
            manifest.model_fingerprint,
            manifest.max_model_len,
            manifest.vocab_size,
            frozenset(manifest.eos_token_ids),
            manifest.rope_switch_len,
        )
        capacity = Capacity(
            sized.num_blocks, sized.block_size, sized.max_num_seqs, sized.max_batch_tokens
        )
        self._runner = StepRunner(loaded)
        self._batcher = Batcher(BatcherSettings(), model, capacity, Stats(), time.monotonic)
        self._batcher.open_epoch(capacity, contents_survive=False)
        self._num_begun = 0

    def run(self, loop: ClosedLoop) -> None:
        """Steps until every prompt is answered."""
        answers, batcher = Answers(loop), self._batcher
        while not loop.is_over:
            for prompt, timeline in loop.begin_due():
                self._num_begun += 1
                answers.timelines[self._num_begun] = timeline
                batcher.submit(self._submission(prompt, loop.output_tokens), answers)
            step = batcher.next_step()
            assert step is not None, "there is work and nothing in flight"
            request = encode(_EPOCH, step, packs_rows=True)
            outcome = self._runner.execute(wire.step(request), idle_s=0.0)
            batcher.commit(wire.step_result(outcome, packs_rows=True).result)

    def _submission(self, prompt: list[int], output_tokens: int) -> Submission:
        return Submission(
            request_id=str(self._num_begun),
            stream_id=self._num_begun,
            prompt_token_ids=prompt,
            choices=[(0, [])],
            sampling=Sampling(sampling_pb2.SamplingParams(temperature=0), needs_history=False),
            max_tokens=output_tokens,
            min_tokens=0,
            stop_token_ids=frozenset(),
            ignore_eos=True,
            priority=2,
            tenant="tenant",
            tenant_weight=1.0,
            remaining_s=None,
            sharing_domain="tenant",
            traceparent="",
        )


if __name__ == "__main__":
    answer_requests(load)
