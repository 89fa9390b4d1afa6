"""What of a fresh answer is worth keeping: whole choices, up to where this reader's text ended."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.cache.keepable import answer_to_keep
from gateway.generation import Generation
from gateway.text.choice_text import ChoiceText
from gateway.text.detokenizer import decoder_family
from gateway.tokens import ChoiceTimings, Finish, FinishReason
from tests import tiny_tokenizer
from tests.unit.gateway.jobs import job

TEXT = "one two three four five six"
IDS: list[int] = tiny_tokenizer.byte_level().encode(TEXT).ids
LENGTH = Finish(FinishReason.LENGTH, timings=ChoiceTimings(prefill_s=1.0, decode_s=2.0))
FAMILY = decoder_family(tiny_tokenizer.byte_level(), {"type": "ByteLevel"})


def read(finish: Finish | None, stops: tuple[str, ...] = ()) -> Any:
    """A reply to one prompt, all tokens of which came at once."""
    generation = Generation(job(), lambda: 0.0)
    generation.extend(0, 0, IDS, ())
    text = ChoiceText(0, FAMILY, stops)
    text.push(IDS, ())
    if finish is not None:
        generation.finish(0, finish)
        text.finish(finish)
    reader = SimpleNamespace(generation=generation)
    timings = generation.choices[0].timings
    return SimpleNamespace(reader=reader, texts=[text], prompt_len=3, timings=lambda: timings)


def test_whole_answer_is_kept_with_its_end_and_its_cost() -> None:
    kept = answer_to_keep(read(LENGTH), 9.0)
    assert kept is not None
    assert kept.choices[0].token_ids == tuple(IDS)
    assert kept.choices[0].finish.reason is FinishReason.LENGTH
    assert (kept.compute_s, kept.prompt_tokens) == (3.0, 3)


@pytest.mark.parametrize("finish", [None, LENGTH])
def test_tokens_after_a_stop_string_are_not_kept(finish: Finish | None) -> None:
    kept = answer_to_keep(read(finish, ("three",)), 9.0)
    assert kept is not None
    (choice,) = kept.choices
    assert choice.finish == Finish(FinishReason.STOP)
    assert 0 < len(choice.token_ids) < len(IDS)
    assert "three" in tiny_tokenizer.byte_level().decode(list(choice.token_ids))


@pytest.mark.parametrize("finish", [None, Finish(FinishReason.CANCELLED)])
def test_answer_that_did_not_end_is_not_kept(finish: Finish | None) -> None:
    assert answer_to_keep(read(finish), 9.0) is None
