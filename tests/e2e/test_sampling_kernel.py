"""Seeded requests get the same tokens from the C++ sampling kernel and from torch, through HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.compiled_kernels import needs_kernels
from tests.e2e.mesh_process import Mesh

pytestmark = needs_kernels
TOKENS = 48
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logit_bias": {"402": 4.0}, "logprobs": 3},
    {"temperature": 1.3},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 5},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "extra_body": {"top_k": 7}},
    {"temperature": 1.5, "top_p": 0.7, "extra_body": {"top_k": 300}},
    {"temperature": 1.2, "extra_body": {"min_p": 0.03}},
    {"temperature": 1.1, "presence_penalty": 1.0, "frequency_penalty": 0.4},
    {"temperature": 1.1, "extra_body": {"repetition_penalty": 1.3, "min_tokens": 20}},
]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, Mesh]]:
    """With kernels, and without."""
    flags = ("--no-cache", "--dtype", "float32")
    with (
        Mesh(tmp_path_factory.mktemp("auto"), *flags) as auto,
        Mesh(tmp_path_factory.mktemp("off"), *flags, "--set", "shard.kernels=off") as off,
    ):
        yield auto, off


async def answer(client: openai.AsyncOpenAI, mesh: Mesh, index: int) -> list[int]:
    """Token ids of one seeded request."""
    sampling = dict(SAMPLINGS[index % len(SAMPLINGS)])
    extra = sampling.pop("extra_body", {})
    reply = await client.completions.create(
        model=mesh.model,
        prompt=[400 + 7 * index + place % 50 for place in range(4 + index)],
        max_tokens=TOKENS,
        seed=index,
        extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
        **sampling,
    )
    return list((reply.choices[0].model_extra or {})["token_ids"])


async def answers(mesh: Mesh) -> list[list[int]]:
    async with mesh.async_openai(max_retries=0) as client:
        return await asyncio.gather(
            *(answer(client, mesh, index) for index in range(2 * len(SAMPLINGS)))
        )


async def test_seeded_requests_get_the_same_tokens_with_kernels_and_without(
    meshes: tuple[Mesh, Mesh],
) -> None:
    auto, off = meshes
    by_kernel, by_torch = await answers(auto), await answers(off)
    assert by_kernel == by_torch
    assert all(len(tokens) == TOKENS for tokens in by_kernel)
    assert len({tuple(tokens) for tokens in by_kernel}) == len(by_kernel)
    # Each mesh has drawn all of them in its own way, and none in the other's.
    for mesh, way in ((auto, "kernel"), (off, "torch")):
        drawn = mesh.metric("shard-0", "shard_sampled_rows_total", by=way)
        assert drawn >= sum(map(len, by_kernel))
        assert drawn == mesh.metric("shard-0", "shard_sampled_rows_total")
