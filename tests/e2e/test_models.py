"""Two models in one mesh of separate processes, through the official OpenAI client."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import VARIANTS, VOCAB_SIZE
from tests.e2e.mesh_process import DEMO_MODEL, Mesh
from tests.tiny_models import write_tiny_model

(LONGROPE,) = (v for v in VARIANTS.values() if v.model_type == "phi3" and "longrope" in v.name)
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose rotary tables change at 40 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny-phi3"
    return write_tiny_model(folder, "phi3", **LONGROPE.fields)


@pytest.fixture(scope="module")
def mesh(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The demo model under a name of ours, a tiny one under its folder's, and an alias for each."""
    arguments = ["--model", f"capitals={DEMO_MODEL}", "--model", str(tiny), "--dtype", "float32"]
    arguments += ["--alias", "gpt-4o=capitals", "--alias", "noise=tiny-phi3"]
    with Mesh(tmp_path_factory.mktemp("mesh"), *arguments) as mesh:
        yield mesh


def ask(mesh: Mesh, model: str) -> openai.types.Completion:
    """A greedy completion, long enough to tell two models apart."""
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    return mesh.openai().completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )


def test_all_names_are_listed_and_in_the_ready_file(mesh: Mesh) -> None:
    names = ["capitals", "tiny-phi3", "gpt-4o", "noise"]
    assert [model.id for model in mesh.openai().models.list()] == names
    assert mesh.facts["models"] == names
    services = {service["name"] for service in mesh.facts["services"]}
    assert {"shard-0", "shard-1", "scheduler-0", "scheduler-1", "gateway"} <= services


def test_each_model_answers_by_name_and_alias(mesh: Mesh) -> None:
    capitals, tiny = ask(mesh, "capitals"), ask(mesh, "tiny-phi3")
    assert "Paris" in capitals.choices[0].text
    assert "Paris" not in tiny.choices[0].text
    assert ask(mesh, "gpt-4o").choices[0].text == capitals.choices[0].text
    assert ask(mesh, "noise").choices[0].text == tiny.choices[0].text


def alone(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by one whole forward pass each: no cache that could hold other tables."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_short_growing_and_long_sequences_of_longrope_run_together_as_each_alone(
    mesh: Mesh, tiny: Path
) -> None:
    rng = random.Random(5)
    long = [rng.randrange(4, VOCAB_SIZE) for _ in range(60)]
    # 40 tokens is where the tables change; the last ones share their beginning with the long one.
    prompts = [[9, 8, 7], long, long[:12], long[:38], long[:40], long[:41]]
    reference = AutoModelForCausalLM.from_pretrained(tiny).eval()
    wanted = [alone(reference, prompt, 24) for prompt in prompts]

    async def all_at_once() -> list[list[int]]:
        async with mesh.async_openai(max_retries=0) as client:

            async def one(prompt: list[int]) -> list[int]:
                answer = await client.completions.create(
                    model="tiny-phi3",
                    prompt=prompt,
                    max_tokens=24,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                return list(answer.choices[0].model_extra["token_ids"])

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    assert asyncio.run(all_at_once()) == wanted
    assert mesh.metric("scheduler-1", "preemptions_total") >= 2


def test_unknown_name_is_not_found_when_several_are_served(mesh: Mesh) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(mesh, "gpt-9")
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in caught.value.message


def test_other_model_goes_on_when_one_models_shard_is_killed(mesh: Mesh) -> None:
    wanted = ask(mesh, "capitals").choices[0].text
    untouched = {name: mesh.service(name)["pid"] for name in ("shard-0", "scheduler-0")}
    stream = mesh.openai().completions.create(
        model="capitals",
        prompt="Hello",
        max_tokens=400,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    old = mesh.kill("shard-1")
    assert ask(mesh, "capitals").choices[0].text == wanted
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert mesh.metric("scheduler-0", "epochs_total") == 1
    mesh.wait_restarted("shard-1", old)
    assert "Paris" not in ask(mesh, "tiny-phi3").choices[0].text
    assert {name: mesh.service(name)["pid"] for name in untouched} == untouched
