"""The shard's own values: what a step asks, what a row answers, what was loaded.

Plain data without protobuf, torch or numpy, so that the process can import it before any model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType

from infermesh.errors import MeshError

Slot = NewType("Slot", int)
BlockId = NewType("BlockId", int)
Epoch = NewType("Epoch", int)
StepId = NewType("StepId", int)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a scheduler may use: blocks 0 to num_blocks - 1, slots 0 to max_num_seqs - 1."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Resolved sampling parameters; the defaults are those of sampling.proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are cut off before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalizes(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot; see NewSequence in shard_service.proto."""

    slot: Slot
    block_ids: Sequence[BlockId]
    num_computed_tokens: int
    prompt_len: int
    choice: int
    sampling: Sampling
    min_tokens: int = 0
    suppressed_token_ids: Sequence[int] = ()
    penalty_token_ids: Sequence[int] = ()
    traceparent: str = ""
    long_rope: bool = False


class RowSource(enum.Enum):
    """Where a row's tokens come from."""

    LITERAL = "literal"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Row:
    """`num_tokens` query tokens of the sequence in `slot`."""

    slot: Slot
    num_tokens: int
    source: RowSource
    token_ids: Sequence[int] = ()
    new_block_ids: Sequence[BlockId] = ()
    sample: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the stream, applied as: finished, block_copies, new_sequences, rows."""

    epoch: Epoch
    step_id: StepId
    finished: Sequence[Slot] = ()
    block_copies: Sequence[tuple[BlockId, BlockId]] = ()
    new_sequences: Sequence[NewSequence] = ()
    rows: Sequence[Row] = ()
    # The first of its rows that came as slots alone.
    num_decodes: int = 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one sampled token, natural log; `top` is most likely first."""

    logprob: float
    top_token_ids: Sequence[int]
    top_logprobs: Sequence[float]


class RowStatus(enum.Enum):
    """What became of a row."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """A row's answer; `token_id` is None where it sampled none."""

    slot: Slot
    status: RowStatus
    token_id: int | None = None
    logprobs: Logprobs | None = None
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Microseconds on the shard: waiting for the step, executing it, of which sampling."""

    idle_us: int
    execute_us: int
    sample_us: int


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One outcome per row, in the order of the rows."""

    epoch: Epoch
    step_id: StepId
    rows: Sequence[RowOutcome]
    timings: Timings
    # The step's.
    num_decodes: int = 0


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load and how large; zeros mean "choose"."""

    model: str
    model_id: str = ""
    dtype: str = "auto"
    load_format: str = "safetensors"
    max_model_len: int = 0
    kv_cache_bytes: int = 0
    block_size: int = 16
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    num_blocks: int = 0
    quantize: str = ""
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What gateway and scheduler need to know of the model; see ModelManifest in model.proto."""

    model_id: str
    model_fingerprint: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: Sequence[int]
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str
    generation_config_json: str
    tokenizer_config_json: str
    num_parameters: int
    weight_bytes: int
    source: str
    created_unix_s: int
    # Sequences of more tokens use other rotary tables; 0: one for all lengths.
    rope_switch_len: int = 0
    # "int8", "int4-g32"; empty: weights are as stored, or cast
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is, for a person."""

    stage: str
    bytes_done: int = 0
    bytes_total: int = 0
