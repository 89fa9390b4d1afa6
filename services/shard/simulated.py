"""The engine that computes nothing: tokens from noise, time from a profile. No torch.

Its "device time" passes in the worker thread, so that queues and windows behave as with a model.
Its profile can also rehearse failures of a device, so that operators and tests see what a mesh
makes of them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infermesh.errors import ModelLoadFailed, NumericalError
from services.shard.domain import BlockId, Logprobs
from services.shard.engine import Computed, Draw
from services.shard.model_files import ModelFiles
from services.shard.noise import Purpose, uniforms
from services.shard.slots import ActiveRow

# Letters only, perhaps after a space as BPE (Ġ) and SentencePiece (▁) write it.
_PRINTABLE = re.compile(r"[Ġ▁]?[A-Za-z]+")


# What a process that a rehearsal ends exits with: EX_SOFTWARE of sysexits.h.
REHEARSED_EXIT = 70


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Microseconds of a step; the defaults resemble a 0.5B model on one small GPU.

    The integers rehearse failures and are off at 0. The first three name a query token, as it
    comes in a prompt or in an output that is run again.

    Args:
        exit_token_id: a step that runs it ends the process at once, as a crash of the device's
            library does.
        fail_token_id: a step that runs it raises.
        nan_token_id: the row that runs it has logits that are no numbers, and fails alone.
        oom_above_tokens: a step with more query tokens runs out of memory.
    """

    fixed_us: float = 4_000.0
    per_prefill_token_us: float = 20.0
    per_decode_row_us: float = 40.0
    per_context_token_us: float = 0.02
    exit_token_id: int = 0
    fail_token_id: int = 0
    nan_token_id: int = 0
    oom_above_tokens: int = 0

    def step_us(self, rows: Sequence[ActiveRow]) -> float:
        """How long a step with these rows takes."""
        decode = sum(1 for row in rows if row.num_tokens == 1)
        prefill = sum(row.num_tokens for row in rows if row.num_tokens > 1)
        context = sum(row.context_len for row in rows)
        return (
            self.fixed_us
            + prefill * self.per_prefill_token_us
            + decode * self.per_decode_row_us
            + context * self.per_context_token_us
        )


class SimulatedEngine:
    """Implements Engine. A token depends on seed, choice and position alone, if greedy not on the
    request's seed."""

    def __init__(
        self,
        profile: StepProfile,
        token_ids: Sequence[int],
        seed: int,
        sleep: Callable[[float], None] = time.sleep,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._profile = profile
        self._token_ids = token_ids
        self._seed = seed
        self._sleep = sleep
        self._end_process = end_process

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """There are no blocks."""

    def compute(self, rows: Sequence[ActiveRow], block_tables: npt.NDArray[np.int64]) -> Computed:
        """Sleeps as long as the profile says and draws tokens from noise.

        Raises:
            MemoryError, RuntimeError: the profile rehearses a failure of the whole step.
        """
        self._rehearse(rows)
        self._sleep(self._profile.step_us(rows) / 1e6)
        noise = uniforms(
            [_seed(row) ^ (self._seed & 0xFFFF_FFFF) for row in rows],
            [row.sequence.new.choice for row in rows],
            [row.context_len for row in rows],
            Purpose.SIMULATED_TOKEN,
        )
        return Computed(
            [self._draw(row, value) for row, value in zip(rows, noise.tolist(), strict=True)]
        )

    def _rehearse(self, rows: Sequence[ActiveRow]) -> None:
        profile = self._profile
        num_tokens = sum(row.num_tokens for row in rows)
        if profile.oom_above_tokens and num_tokens > profile.oom_above_tokens:
            raise MemoryError(f"rehearsed: {num_tokens} query tokens in one step")
        if any(_runs(row, profile.exit_token_id) for row in rows):
            self._end_process(REHEARSED_EXIT)
        if any(_runs(row, profile.fail_token_id) for row in rows):
            raise RuntimeError(f"rehearsed: token {profile.fail_token_id} was run")

    def _draw(self, row: ActiveRow, noise: float) -> Draw:
        if _runs(row, self._profile.nan_token_id):
            return Draw(
                error=NumericalError("rehearsed: the logits have values that are no numbers")
            )
        if not row.sample:
            return Draw()
        place = int(noise * len(self._token_ids))
        return Draw(self._token_ids[place], self._logprobs(row, place))

    def _logprobs(self, row: ActiveRow, place: int) -> Logprobs | None:
        wanted = row.sequence.new.sampling.top_logprobs
        if wanted is None:
            return None
        count = min(wanted, len(self._token_ids))
        ids = [self._token_ids[(place + i) % len(self._token_ids)] for i in range(count)]
        return Logprobs(-0.5, ids, [-0.5 - i for i in range(count)])


def _runs(row: ActiveRow, token_id: int) -> bool:
    return token_id > 0 and token_id in row.token_ids


def _seed(row: ActiveRow) -> int:
    sampling = row.sequence.new.sampling
    return 0 if sampling.greedy else sampling.seed or 0


def read_profile(path: str) -> StepProfile:
    """The profile in a JSON file, or the built-in one for an empty path.

    Raises ModelLoadFailed naming the file and what is wrong in it.
    """
    if not path:
        return StepProfile()
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as exc:
        raise ModelLoadFailed(f"the profile {path} is not a readable JSON file") from exc
    known = {field.name: field.type for field in fields(StepProfile)}
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ModelLoadFailed(f"the profile {path} may have {', '.join(sorted(known))} alone")
    for name, value in values.items():
        kind = int if known[name] == "int" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value <= 6e7:
            what = "a whole number of " if kind is int else ""
            raise ModelLoadFailed(f"the profile {path} has {name} {value!r}, not {what}0 to 6e7")
    return StepProfile(**values)


def printable_token_ids(files: ModelFiles) -> Sequence[int]:
    """Tokens that decode to letters, from tokenizer.json alone.

    Raises ModelLoadFailed where there is none.
    """
    vocab = json.loads(files.tokenizer).get("model", {}).get("vocab", {})
    # BPE maps token to id; Unigram lists [token, score] in order of id.
    pairs = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
    end = files.vocab_size
    ids = sorted(i for token, i in pairs if i < end and _PRINTABLE.fullmatch(token))
    if not ids:
        raise ModelLoadFailed(f"the tokenizer of {files.directory} has no printable token")
    return ids
