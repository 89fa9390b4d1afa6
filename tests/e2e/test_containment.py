"""One request's computation fails, or there is too little memory: its neighbours do not notice."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.mesh_process import Mesh, wait_until
from tests.tiny_models import write_tiny_model

# Punctuation in the demo model's vocabulary, which the simulated engine never draws.
FAIL, NAN = 3, 4
NEIGHBOURS = 4
TOKENS = 60
PROMPT = [400, 401, 402]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Steps of 20 ms in which no more than 24 query tokens have room."""
    folder = tmp_path_factory.mktemp("rehearsal")
    profile = folder / "profile.json"
    faults = {"fail_token_id": FAIL, "nan_token_id": NAN, "oom_above_tokens": 24}
    profile.write_text(json.dumps({"fixed_us": 20_000, **faults}))
    flags = ("--no-cache", "--engine", "simulated", "--set", f"shard.simulated_profile={profile}")
    with Mesh(folder, *flags) as running:
        yield running


async def answer(
    client: openai.AsyncOpenAI, mesh: Mesh, prompt: list[int], seed: int, max_tokens: int = TOKENS
) -> str:
    """A whole answer, which a model that ends early would make shorter."""
    reply = await client.completions.create(
        model=mesh.model,
        prompt=prompt,
        temperature=1,
        seed=seed,
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True},
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == max_tokens
    return reply.choices[0].text


async def fails_beside_neighbours(mesh: Mesh, prompt: list[int]) -> openai.APIStatusError:
    """What a request gets whose prompt is bad, while its neighbours' answers stay what they are."""
    async with mesh.async_openai(max_retries=0) as client:
        alone = [await answer(client, mesh, PROMPT, seed) for seed in range(NEIGHBOURS)]
        neighbours = [
            asyncio.create_task(answer(client, mesh, PROMPT, seed)) for seed in range(NEIGHBOURS)
        ]
        await asyncio.to_thread(
            wait_until, lambda: mesh.metric("scheduler-0", "num_requests_running") == NEIGHBOURS, 30
        )
        with pytest.raises(openai.APIStatusError) as caught:
            await answer(client, mesh, prompt, 99)
        assert not any(task.done() for task in neighbours)
        assert await asyncio.gather(*neighbours) == alone
    return caught.value


async def test_a_request_fails_alone_when_its_computation_raises(mesh: Mesh) -> None:
    error = await fails_beside_neighbours(mesh, [*PROMPT, FAIL, 403])
    assert (error.status_code, error.code) == (500, "internal")
    assert mesh.metric("shard-0", "shard_batch_splits_total", reason="error") > 0
    assert mesh.metric("scheduler-0", "num_blocks_used") == 0


async def test_a_request_fails_alone_when_its_logits_are_no_numbers(mesh: Mesh) -> None:
    error = await fails_beside_neighbours(mesh, [*PROMPT, NAN, 403])
    assert (error.status_code, error.code) == (500, "numerical_error")


async def test_everything_is_served_when_memory_is_short(mesh: Mesh) -> None:
    async with mesh.async_openai(max_retries=0) as client:
        prompts = [[410 + i, *range(500, 539)] for i in range(12)]
        answers = (answer(client, mesh, prompt, 1, 5) for prompt in prompts)
        assert len(await asyncio.gather(*answers)) == len(prompts)
    assert mesh.metric("shard-0", "shard_batch_splits_total", reason="out_of_memory") > 0
    assert mesh.metric("shard-0", "shard_batch_splits_total", reason="limit") > 0


POISON = 77


@pytest.fixture(scope="module")
def poisoned_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A model in which one token's embedding is NaN, in chunks of 32 tokens."""
    folder = tmp_path_factory.mktemp("poisoned")
    directory = write_tiny_model(folder / "tiny")
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    flags = ("--no-cache", "--model", f"tiny={directory}", "--set", "scheduler.max_batch_tokens=32")
    with Mesh(folder, *flags) as running:
        yield running


async def test_a_request_fails_alone_when_a_models_weights_hold_nan(poisoned_mesh: Mesh) -> None:
    mesh = poisoned_mesh
    async with mesh.async_openai(max_retries=0) as client:
        prompts = [[100 + i, 101, 102] for i in range(NEIGHBOURS)]
        alone = [await answer(client, mesh, prompt, 7) for prompt in prompts]
        bad = asyncio.create_task(answer(client, mesh, [5, POISON, 6], 7))
        together = await asyncio.gather(*(answer(client, mesh, p, 7) for p in prompts))
        with pytest.raises(openai.APIStatusError) as caught:
            await bad
    assert caught.value.code == "numerical_error"
    assert together == alone


async def test_a_prefix_stays_clean_when_a_token_after_it_is_nan(poisoned_mesh: Mesh) -> None:
    mesh = poisoned_mesh
    clean = list(range(200, 216))  # one block, and in the same chunk as what poisons it
    async with mesh.async_openai(max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await answer(client, mesh, [*clean, POISON, *range(100, 170)], 7, 1)
        # One token: a longer answer might draw the poison by itself.
        await answer(client, mesh, [*clean, 101], 7, 1)
    assert caught.value.code == "numerical_error"
