"""In deterministic mode a request's tokens and logprobs have the same bits whatever shares its
batch, however its prompt is cut, and wherever it is taken up again.

Tiny models go through the loader; random work runs on them alone, together and interrupted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infermesh.config import ShardConfig
from infermesh.errors import InvalidRequest, UnsupportedModel
from services.shard import tiles, torch_loading
from services.shard.attention import ScoreRules, paged_attention
from services.shard.domain import (
    BlockId,
    Epoch,
    LoadSpec,
    Logprobs,
    NewSequence,
    Row,
    RowSource,
    Sampling,
    Slot,
    Step,
    StepId,
)
from services.shard.engine import LoadedModel
from services.shard.loading import load_model
from services.shard.scratch import Scratch
from services.shard.stepping import StepRunner
from services.shard.tiled_attention import TiledLayout, attend_tiled
from tests.architectures import VARIANTS, VOCAB_SIZE
from tests.tiny_models import write_tiny_model

BLOCK = 4
NUM_BLOCKS = 400
NUM_SLOTS = 8
OUTPUT = 6
# The longest piece of a prompt, and how often a request is preempted in a step.
WAYS = ((7, 0.1), (64, 0.2))
FEW_STEPS = ((20, 0.15),)
Answer = list[tuple[int, float, tuple[int, ...], tuple[float, ...]]]


def load(
    directory: Path, variant: str = "llama", *, deterministic: bool = True, **options: Any
) -> LoadedModel:
    fields = {**VARIANTS[variant].fields, **options.pop("fields", {})}
    write_tiny_model(directory, VARIANTS[variant].model_type, **fields)
    spec = LoadSpec(
        str(directory),
        block_size=BLOCK,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=NUM_SLOTS,
        dtype=options.pop("dtype", "float32"),
        kv_cache_dtype=options.pop("kv_cache_dtype", "auto"),
    )
    config = ShardConfig(device="cpu", deterministic=deterministic, **{"num_threads": 1, **options})
    return load_model(spec, config, lambda progress: None)


@dataclass
class Request:
    """One sequence as a scheduler would drive it."""

    prompt: list[int]
    sampling: Sampling
    slot: Slot | None = None
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    placed: bool = False
    answer: Answer = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token for token, *_ in self.answer]


class Driver:
    """Runs requests in random company: chunks, preemptions and prefixes are drawn."""

    def __init__(self, model: LoadedModel, rng: random.Random) -> None:
        self.runner = StepRunner(model)
        self.switch_len = model.manifest.rope_switch_len
        self.rng = rng
        self.step_id = 0

    def run(self, requests: list[Request], chunk: int, disturb: float) -> list[Answer]:
        free = [BlockId(b) for b in self.rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)]
        for slot, request in enumerate(requests):
            request.slot = Slot(slot)
        finished: list[Slot] = []
        while left := [r for r in requests if len(r.answer) < OUTPUT]:
            new: list[NewSequence] = []
            rows: list[Row] = []
            members: list[Request] = []
            for request in left:
                if request.placed and self.rng.random() < disturb:  # preempted
                    free += request.blocks
                    request.blocks, request.computed, request.placed = [], 0, False
                    finished.append(request.slot)
                    continue
                if disturb and self.rng.random() < 0.2:
                    continue
                rows.append(self._row(request, chunk, free, new))
                members.append(request)
            self._step(finished, new, rows, members)
            finished = []
        return [request.answer for request in requests]

    def _row(
        self, request: Request, chunk: int, free: list[BlockId], new: list[NewSequence]
    ) -> Row:
        if not request.placed:
            longest = len(request.prompt) + OUTPUT
            request.blocks = [free.pop() for _ in range(-(-longest // BLOCK))]
            request.placed = True
            tokens = request.tokens
            new.append(
                NewSequence(
                    request.slot,
                    request.blocks,
                    0,
                    len(request.prompt),
                    0,
                    request.sampling,
                    penalty_token_ids=tokens if request.sampling.penalizes else (),
                    long_rope=0 < self.switch_len < longest,
                )
            )
        todo = request.tokens[request.computed :]
        taken = todo[: self.rng.randint(1, chunk)] if len(todo) > 1 else todo
        request.computed += len(taken)
        return Row(
            request.slot, len(taken), RowSource.LITERAL, taken, sample=len(taken) == len(todo)
        )

    def _step(
        self,
        finished: list[Slot],
        new: list[NewSequence],
        rows: list[Row],
        members: list[Request],
    ) -> None:
        self.step_id += 1
        step = Step(Epoch(1), StepId(self.step_id), finished, (), new, rows)
        outcome = self.runner.execute(step, 0.0)
        for request, row in zip(members, outcome.rows, strict=True):
            assert row.error is None
            if row.token_id is not None:
                assert isinstance(row.logprobs, Logprobs)
                request.answer.append(
                    (
                        row.token_id,
                        row.logprobs.logprob,
                        tuple(row.logprobs.top_token_ids),
                        tuple(row.logprobs.top_logprobs),
                    )
                )


SAMPLINGS = (
    Sampling(temperature=0.0, top_logprobs=3),
    Sampling(temperature=1.3, seed=5, top_logprobs=0),
    Sampling(temperature=0.8, top_p=0.9, seed=6, top_logprobs=20),
    Sampling(temperature=1.0, top_k=30, min_p=0.01, seed=7, top_logprobs=5),
    Sampling(
        temperature=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=8, top_logprobs=2
    ),
)


def work(rng: random.Random, lengths: tuple[int, ...] = (70, 41, 9, 1, 33)) -> list[Request]:
    return [
        Request([rng.randrange(VOCAB_SIZE) for _ in range(length)], sampling)
        for length, sampling in zip(lengths, SAMPLINGS, strict=True)
    ]


def alone_and_disturbed(
    model: LoadedModel, seed: str, ways: tuple[tuple[int, float], ...] = WAYS
) -> tuple[list[Answer], list[list[Answer]]]:
    """Each request alone with its prompt in one piece; all together, cut and preempted."""
    requests = work(random.Random(seed))
    alone = [
        Driver(model, random.Random(1)).run([Request(r.prompt, r.sampling)], 10_000, 0.0)[0]
        for r in requests
    ]
    disturbed = []
    for chunk, disturb in ways:
        driver = Driver(model, random.Random(f"{seed} {chunk}"))
        disturbed.append(
            driver.run([Request(r.prompt, r.sampling) for r in requests], chunk, disturb)
        )
    return alone, disturbed


@pytest.mark.parametrize(
    "ways", [FEW_STEPS, pytest.param(WAYS, marks=pytest.mark.slow)], ids=["few steps", "many"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_have_the_same_bits_when_company_and_cuts_differ(
    variant: str, ways: tuple[tuple[int, float], ...], tmp_path: Path
) -> None:
    alone, disturbed = alone_and_disturbed(load(tmp_path, variant), variant, ways)
    for answers in disturbed:
        assert answers == alone


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 2},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "bfloat16"},
        # nothing is a multiple of a vector
        {"fields": {"vocab_size": 389, "intermediate_size": 99, "head_dim": 6}},
    ],
    ids=["two threads", "bfloat16", "bfloat16 K and V", "odd sizes"],
)
def test_answers_have_the_same_bits_when_the_arithmetic_is_another(
    options: dict[str, Any], tmp_path: Path
) -> None:
    alone, disturbed = alone_and_disturbed(load(tmp_path, **options), str(options))
    for answers in disturbed:
        assert answers == alone


def test_answers_differ_without_the_mode(tmp_path: Path) -> None:
    plain = load(tmp_path, deterministic=False, kernels="off")
    alone, disturbed = alone_and_disturbed(plain, "llama")
    assert any(answers != alone for answers in disturbed)


def test_fingerprint_is_another_in_the_mode_and_with_other_threads(tmp_path: Path) -> None:
    loads = (
        load(tmp_path, deterministic=False),
        load(tmp_path, deterministic=False, num_threads=2),
        load(tmp_path),
        load(tmp_path),
        load(tmp_path, num_threads=2),
    )
    plain, plain_2, one, again, two = (loaded.manifest.model_fingerprint for loaded in loads)
    assert plain == plain_2
    assert one == again
    assert len({plain, one, two}) == 3


def test_a_machine_is_refused_when_a_rows_place_in_its_tile_shows() -> None:
    def product(tile: torch.Tensor) -> torch.Tensor:
        return tile.sum(dim=-1, keepdim=True) + 1e-3 * torch.arange(len(tile))[:, None]

    with pytest.raises(UnsupportedModel, match="its place among 16 rows"):
        tiles.usable_tiles(product, 32, torch.float32, 1)


def test_large_tiles_are_left_out_when_they_give_other_bits() -> None:
    def product(tile: torch.Tensor) -> torch.Tensor:
        return tile if len(tile) < 256 else tile * (1 + 1e-6)

    assert tiles.usable_tiles(product, 32, torch.float32, 1) == (64, 16)


def test_cuts_cover_all_rows_in_the_largest_tiles_that_fit() -> None:
    assert list(tiles.cuts(352, (256, 64, 16))) == [(0, 256), (256, 320), (320, 336), (336, 352)]


def test_a_device_that_is_no_cpu_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_loading, "choose_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(InvalidRequest, match="proven on a CPU alone"):
        torch_loading.TorchLoader("auto", 1, 1, deterministic=True)


@pytest.mark.parametrize("window", [None, 9, 70])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_tiled_attention_equals_the_reference(window: int | None, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(3)
    heads, kv_heads, dim, block = 6, 2, 10, 4
    pools = [torch.randn(100, block, kv_heads, dim, generator=draw) for _ in range(2)]
    tables = np.random.default_rng(0).permutation(100)[:99].reshape(3, 33)
    query_lens, context_lens = np.array([1, 30, 131]), np.array([77, 100, 131])
    q = torch.randn(int(query_lens.sum()), heads, dim, generator=draw)
    wanted = paged_attention(
        q, *pools, tables, query_lens, context_lens, scale=0.3, sliding_window=window,
        softcap=softcap,
    )  # fmt: skip
    layout = TiledLayout(tables, query_lens, context_lens, block, kv_heads, dim)
    rules = ScoreRules(0.3, softcap)
    got = attend_tiled(q, *pools, layout, rules, window, Scratch(q.device))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
