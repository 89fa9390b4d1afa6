"""Prompts of the load generator: as many as asked, as long as asked, nothing in common unasked."""

import itertools

import pytest

from benchmarks.workload import Workload


def test_prompts_have_the_length_and_ids_asked_for_when_drawn() -> None:
    prompts = Workload(prompt_tokens=20, vocab=(50, 60)).prompts(30)
    assert [len(prompt) for prompt in prompts] == [20] * 30
    assert {token for prompt in prompts for token in prompt} == set(range(50, 60))


def test_prompts_begin_alike_and_go_on_apart_when_a_prefix_is_shared() -> None:
    prompts = Workload(prompt_tokens=40, shared_prefix_tokens=30).prompts(20)
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 20


def test_prompts_share_no_beginning_when_no_prefix_is_asked_for() -> None:
    assert len({tuple(prompt[:4]) for prompt in Workload().prompts(100)}) == 100


def test_workloads_draw_alike_by_seed_and_apart_without() -> None:
    first, again, other = (Workload(seed=seed).prompts(5) for seed in (1, 1, 2))
    assert first == again
    assert not any(prompt in other for prompt in first)


def test_text_prompts_have_as_many_words_when_asked_for_text() -> None:
    workload = Workload(prompt_tokens=12, shared_prefix_tokens=4, as_text=True)
    prompts = [prompt.split() for prompt in itertools.islice(workload.endless(), 8)]
    assert [len(words) for words in prompts] == [12] * 8
    assert len({tuple(words[:4]) for words in prompts}) == 1
    assert len({tuple(words) for words in prompts}) == 8


@pytest.mark.parametrize("shared", [-1, 128, 200])
def test_workload_is_refused_when_the_prefix_leaves_nothing_of_its_own(shared: int) -> None:
    with pytest.raises(ValueError, match=r"shared_prefix_tokens is .* allowed are 0 to 127"):
        Workload(prompt_tokens=128, shared_prefix_tokens=shared)
