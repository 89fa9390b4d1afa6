"""Parts of KV blocks are reused: by who goes on from an answer, by who begins alike, by chats."""

import random
from collections.abc import Iterator

import pytest

from tests.e2e.mesh_process import Mesh

SIZE = 16
FLAGS = ("--dtype", "float32", "--no-cache", "--set", f"scheduler.block_size={SIZE}")
COMPUTED, PARTIAL, COPIES = (
    "prompt_tokens_computed_total",
    "prefix_cache_partial_hits_total",
    "kv_block_copies_total",
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("mesh"), *FLAGS) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The same, and every prompt is computed from its first token on."""
    never = ("--set", "scheduler.enable_prefix_caching=false")
    with Mesh(tmp_path_factory.mktemp("uncached"), *FLAGS, *never) as mesh:
        yield mesh


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(300, 2000) for _ in range(count)]


def complete(mesh: Mesh, prompt: list[int], max_tokens: int = 24) -> list[int]:
    """The greedy answer's token ids."""
    answer = mesh.openai(max_retries=0).completions.create(
        model=mesh.model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].model_extra["token_ids"])


def counts(mesh: Mesh) -> list[int]:
    return [round(mesh.metric("scheduler-0", name)) for name in (COMPUTED, PARTIAL, COPIES)]


def grown(mesh: Mesh, before: list[int]) -> list[int]:
    return [now - then for now, then in zip(counts(mesh), before, strict=True)]


def test_answer_is_computed_once_when_the_next_prompt_goes_on_from_it(
    mesh: Mesh, uncached: Mesh
) -> None:
    prompt = tokens(1, 3 * SIZE + 9)
    prompt += complete(mesh, prompt) + tokens(2, 11)
    num_known = 3 * SIZE + 9 + 24 - 1  # all but the last token of the answer
    before = counts(mesh)
    answer = complete(mesh, prompt)
    # The block that the answer ended in was nobody's: it is gone on in, not copied.
    assert grown(mesh, before) == [len(prompt) - num_known, num_known % SIZE, 0]
    assert answer == complete(uncached, prompt)
    assert uncached.metric("scheduler-0", PARTIAL) == 0


@pytest.mark.parametrize("num_common", [3, 15])
def test_part_of_a_block_is_copied_when_two_prompts_have_no_more_in_common(
    mesh: Mesh, uncached: Mesh, num_common: int
) -> None:
    first = tokens(10 + num_common, 4 * SIZE)
    first_answer = complete(mesh, first)
    second = first[: 2 * SIZE + num_common] + tokens(3, 20)
    before = counts(mesh)
    answer = complete(mesh, second)
    assert grown(mesh, before) == [len(second) - 2 * SIZE - num_common, num_common, 1]
    assert answer == complete(uncached, second)
    # Nothing was written into the block that was copied.
    again = counts(mesh)
    assert complete(mesh, first) == first_answer == complete(uncached, first)
    assert grown(mesh, again) == [1, SIZE - 1, 1]


def test_part_of_the_first_block_is_reused_when_prompts_are_shorter_than_one(mesh: Mesh) -> None:
    prompt = tokens(4, SIZE - 5)
    complete(mesh, prompt, 1)
    before = counts(mesh)
    complete(mesh, prompt[:-1] + tokens(5, 3), 1)
    assert grown(mesh, before)[:2] == [3, len(prompt) - 1]


def test_chat_computes_its_new_words_alone_when_it_comes_back(mesh: Mesh) -> None:
    client = mesh.openai(max_retries=0)
    messages = [{"role": "system", "content": "You answer questions about serving models."}]
    num_known = 0
    for question in ("What is a token?", "What is prefill?", "And what is a KV block?"):
        messages.append({"role": "user", "content": question})
        before = counts(mesh)
        answer = client.chat.completions.create(
            model=mesh.model, messages=messages, max_tokens=40, temperature=0
        )
        usage = answer.usage
        # The template and the tokenizer give back the very tokens that were generated.
        assert usage.prompt_tokens_details.cached_tokens == num_known
        assert grown(mesh, before)[0] == usage.prompt_tokens - num_known
        # The last token is computed, too, where another was to follow: the window saw to it.
        num_known = usage.total_tokens - (usage.completion_tokens == 40)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert mesh.metric("scheduler-0", PARTIAL) > 0
