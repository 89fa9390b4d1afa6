"""One choice's tokens become deltas: text, logprobs of what is shown, the reason of its end."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.text.choice_text import ChoiceText
from gateway.text.detokenizer import decoder_family
from gateway.tokens import Finish, FinishReason, TokenLogprobs
from tests.tiny_tokenizer import byte_level, eos_id

FAMILY = decoder_family(byte_level(), json.loads(byte_level().to_str())["decoder"])


def ids(text: str) -> list[int]:
    found: list[int] = byte_level().encode(text).ids
    return found


def choice(*stops: str, min_tokens: int = 0) -> ChoiceText:
    return ChoiceText(0, FAMILY, stops, min_tokens)


def test_text_is_cut_and_reason_is_stop_when_a_stop_string_spans_tokens() -> None:
    text = choice("ox ju")
    text.push(ids("The quick brown fox jumps over"), ())
    delta = text.take()
    assert delta is not None
    assert delta.text == "The quick brown f"
    assert delta.finish_reason is FinishReason.STOP


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    text = choice("fox")
    before = ids("The quick brown fox")
    text.push(before, ())
    text.push(ids(" jumps over"), ())
    assert text.num_tokens == len(before)


def test_stop_string_wins_when_the_scheduler_ends_the_choice_too() -> None:
    text = choice("dog.")
    text.push(ids("lazy dog."), ())
    text.finish(Finish(FinishReason.LENGTH))
    delta = text.take()
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("lazy ", FinishReason.STOP)


def test_held_back_text_is_shown_when_the_choice_ends() -> None:
    text = choice("lazier")
    text.push(ids("so laz"), ())
    first = text.take()
    text.finish(Finish(FinishReason.LENGTH))
    last = text.take()
    assert first is not None
    assert last is not None
    assert (first.text, last.text) == ("so ", "laz")


def test_stop_string_is_not_looked_for_below_min_tokens() -> None:
    token_ids = ids("one two one two")
    text = choice("one", min_tokens=3)
    text.push(token_ids, ())
    delta = text.take()
    assert delta is not None
    assert delta.text == "one two "


def test_nothing_is_taken_while_only_half_a_character_is_there() -> None:
    text = choice()
    text.push(ids("𐌰")[:2], ())
    assert text.take() is None


def test_logprobs_wait_for_their_text_and_end_with_it() -> None:
    token_ids = [*ids("a𐌰"), eos_id()]
    text = choice()
    entries = [TokenLogprobs(-float(i)) for i in range(len(token_ids))]
    text.push(token_ids[:3], entries[:3])
    first = text.take()
    text.push(token_ids[3:], entries[3:])
    text.finish(Finish(FinishReason.STOP, stop_token_id=eos_id()))
    last = text.take()
    assert first is not None
    assert last is not None
    assert [e.logprob for e in first.logprobs] == [0.0]
    # the four bytes of the letter, and not the end-of-sequence token
    assert [e.logprob for e in last.logprobs] == [-1.0, -2.0, -3.0, -4.0]
    assert [e.text_offset for e in last.logprobs] == [1, 1, 1, 1]
    assert b"".join(e.token for e in last.logprobs).decode() == "𐌰"
    assert text.num_tokens == len(token_ids)


def test_logprobs_of_a_stop_string_are_left_out() -> None:
    token_ids = ids("one two STOP more")
    text = choice("STOP")
    text.push(token_ids, [TokenLogprobs(-1.0)] * len(token_ids))
    delta = text.take()
    assert delta is not None
    shown = b"".join(entry.token for entry in delta.logprobs).decode()
    assert delta.text == "one two "
    assert delta.text.startswith(shown.rstrip()) or shown.startswith(delta.text)


def test_token_ids_come_with_the_text_that_they_make() -> None:
    token_ids = ids("Hello world")
    text = choice()
    text.push(token_ids, ())
    delta = text.take()
    assert delta is not None
    assert list(delta.token_ids) == token_ids


LOGPROBS = TokenLogprobs(-0.5)


@given(
    st.text(alphabet="abx zé€🙂\n", min_size=1, max_size=40),
    st.sampled_from(["", "x", "b x", "🙂é"]),
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.data(),
)
def test_reader_who_has_any_delta_gets_exactly_the_rest(
    text: str, stop: str, pieces: list[int], data: st.DataObject
) -> None:
    token_ids, stops = ids(text), (stop,) if stop else ()
    first = ChoiceText(0, FAMILY, stops)
    deltas, received, position = [], [0], 0
    for size in itertools.cycle(pieces):
        tokens = token_ids[position : position + size]
        position += len(tokens)
        first.push(tokens, [LOGPROBS] * len(tokens))
        if position == len(token_ids):
            first.finish(Finish(FinishReason.LENGTH))
        if (delta := first.take()) is not None:
            deltas.append(delta)
            ended = delta.finish_reason is not None
            received.append(received[-1] + len(delta.token_ids) + ended)
        if first.done:
            break
    seen = data.draw(st.integers(0, len(deltas)))
    again = ChoiceText(0, FAMILY, stops, num_had=received[seen])
    again.push(token_ids, [LOGPROBS] * len(token_ids))
    again.finish(Finish(FinishReason.LENGTH))
    rest = again.take()
    assert rest is not None
    assert rest.finish_reason is first.finish_reason
    assert rest.text == "".join(delta.text for delta in deltas[seen:])
    assert list(rest.token_ids) == [t for delta in deltas[seen:] for t in delta.token_ids]
    assert list(rest.logprobs) == [e for delta in deltas[seen:] for e in delta.logprobs]
    assert again.num_tokens == first.num_tokens
