"""The whole mesh computes what transformers.generate computes, however the work is cut up."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.mesh_process import DEMO_MODEL, Mesh

NUM_PROMPTS = 50
TIE = 1e-4  # top two logits closer than this may swap under another order of summation
MAX_TIES = 1 / 1000
TOPICS = (
    "What is the capital of {}?", "Tell me about {}.", "Which colour is {}?", "Count from 1 to {}.",
    "Explain {} to me in a few words, please, because I have never heard of it before.",
)  # fmt: skip
THINGS = ("France", "a token", "the sky", "40", "prefill", "Japan", "grass", "17", "gRPC", "Peru")


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    max_tokens: int
    expected: list[int]
    gaps: list[float]  # distance of the top two logits at each expected token


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """50 prompts of mixed length, with what transformers.generate makes of them in float32."""
    torch.set_num_threads(1)  # the machine is the mesh's, too
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    built = []
    for index in range(NUM_PROMPTS):
        text = TOPICS[index % len(TOPICS)].format(THINGS[index // len(TOPICS)])
        turns = [{"role": "user", "content": " ".join([text] * (1 + index % 7))}]
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        prompt = list(encoded["input_ids"])
        max_tokens = 5 + 3 * (index % 20)
        built.append(reference(model, prompt, max_tokens))
    return built


def reference(model: Any, prompt: list[int], max_tokens: int) -> Case:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    top = [logits[0].topk(2).values for logits in output.logits]
    return Case(
        prompt=prompt,
        max_tokens=max_tokens,
        expected=output.sequences[0, len(prompt) :].tolist(),
        gaps=[float(two[0] - two[1]) for two in top],
    )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Chunks of 16 tokens, and too few blocks for all that runs: both must not show."""
    flags = ["max_batch_tokens=16", "max_num_seqs=16", "num_blocks=40", "block_size=8"]
    settings = [word for flag in flags for word in ("--set", f"scheduler.{flag}")]
    with Mesh(
        tmp_path_factory.mktemp("mesh"), "--dtype", "float32", "--no-cache", *settings
    ) as running:
        yield running


async def generate(mesh: Mesh, cases: list[Case]) -> list[list[int]]:
    """All cases at once through the front door; the generated token ids."""
    async with mesh.async_openai(max_retries=0) as client:

        async def one(case: Case) -> list[int]:
            answer = await client.completions.create(
                model=mesh.model,
                prompt=case.prompt,
                max_tokens=case.max_tokens,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return list(answer.choices[0].model_extra["token_ids"])

        return await asyncio.gather(*(one(case) for case in cases))


def assert_same(cases: list[Case], got: list[list[int]]) -> None:
    """Token for token; a row may part from its reference only where the top two are a tie."""
    ties = 0
    for case, tokens in zip(cases, got, strict=True):
        assert len(tokens) == len(case.expected)
        for position, (want, token) in enumerate(zip(case.expected, tokens, strict=True)):
            if want != token:
                assert case.gaps[position] < TIE, f"token {position}: {token}, not {want}"
                ties += 1
                break  # what follows a tie has another context
    total = sum(len(case.expected) for case in cases)
    assert ties <= max(1, total * MAX_TIES)


async def test_greedy_output_equals_transformers_when_cold_and_preempted(
    mesh: Mesh, cases: list[Case]
) -> None:
    assert_same(cases, await generate(mesh, cases))
    assert mesh.metric("scheduler-0", "preemptions_total") > 0
    assert mesh.metric("scheduler-0", "num_blocks_used") == 0


async def test_greedy_output_equals_transformers_when_the_prefix_cache_is_warm(
    mesh: Mesh, cases: list[Case]
) -> None:
    await generate(mesh, cases[:8])
    hits = mesh.metric("scheduler-0", "prefix_cache_hits_total")
    assert_same(cases[:8], await generate(mesh, cases[:8]))
    assert mesh.metric("scheduler-0", "prefix_cache_hits_total") > hits


async def test_seeded_output_is_the_same_alone_in_a_batch_and_across_preemption(
    mesh: Mesh, cases: list[Case]
) -> None:
    async with mesh.async_openai(max_retries=0) as client:

        async def sample(case: Case, seed: int) -> str:
            answer = await client.completions.create(
                model=mesh.model,
                prompt=case.prompt,
                max_tokens=48,
                temperature=0.9,
                top_p=0.95,
                seed=seed,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        alone = [await sample(cases[index], index) for index in range(4)]
        preempted = mesh.metric("scheduler-0", "preemptions_total")
        crowd = await asyncio.gather(*(sample(cases[i % 50], i) for i in range(32)))
    assert crowd[:4] == alone
    assert mesh.metric("scheduler-0", "preemptions_total") > preempted


def test_logs_name_no_prompt_and_no_key(mesh: Mesh, tmp_path: Path) -> None:
    logs = mesh.logs()
    assert "capital" not in logs
    assert "Bearer" not in logs
