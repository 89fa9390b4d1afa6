"""Increments put together are the whole decoding, whatever the tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.text.detokenizer import AnyDecoder, ByteLevel, SentencePiece, decoder_family
from gateway.text.vocabulary import display
from tests.tiny_tokenizer import byte_level, sentence_piece


def family(tokenizer: Tokenizer) -> object:
    return decoder_family(tokenizer, json.loads(tokenizer.to_str())["decoder"])


def increments(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    stream = family(tokenizer).start()
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [(byte_level(), ByteLevel), (sentence_piece(), SentencePiece)]
)
def test_decoder_family_is_recognised(tokenizer: Tokenizer, kind: type) -> None:
    assert isinstance(family(tokenizer), kind)


def test_any_decoder_serves_when_the_family_is_unknown() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "##b": 1, "c": 2}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    assert isinstance(family(tokenizer), AnyDecoder)
    assert "".join(increments(tokenizer, [0, 1, 2, 0])) == tokenizer.decode([0, 1, 2, 0])


# ids beyond the vocabulary are dropped by both
@given(st.lists(st.integers(0, byte_level().get_vocab_size() + 2), max_size=40))
@settings(max_examples=400, deadline=None)
def test_byte_level_increments_equal_the_whole_when_tokens_are_any(token_ids: list[int]) -> None:
    expected = byte_level().decode(token_ids, skip_special_tokens=True)
    assert "".join(increments(byte_level(), token_ids)) == expected


@given(st.lists(st.integers(0, sentence_piece().get_vocab_size() + 2), max_size=40))
@settings(max_examples=400, deadline=None)
def test_sentence_piece_increments_equal_the_whole_when_tokens_are_any(
    token_ids: list[int],
) -> None:
    expected = sentence_piece().decode(token_ids, skip_special_tokens=True)
    assert "".join(increments(sentence_piece(), token_ids)) == expected


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_increment_has_half_a_character_when_the_text_is_whole(text: str) -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    parts = increments(tokenizer, token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert sum(part.count("�") for part in parts) == text.count("�")


def test_letter_is_held_until_it_is_whole() -> None:
    token_ids = byte_level().encode("𐌰").ids  # in no corpus: one token per byte
    parts = increments(byte_level(), token_ids)
    assert len(token_ids) == 4
    assert parts == ["", "", "", "𐌰", ""]


def test_half_a_character_is_marked_when_the_text_ends_in_it() -> None:
    token_ids = byte_level().encode("𐌰").ids[:3]
    assert increments(byte_level(), token_ids) == ["", "", "", "�"]


@pytest.mark.parametrize(
    ("data", "shown"),
    [(b" fox", " fox"), ("é".encode(), "é"), (b"\xf0\x9f", "bytes:\\xf0\\x9f")],
)
def test_token_is_shown_as_openai_does(data: bytes, shown: str) -> None:
    assert display(data) == shown


def test_token_bytes_join_to_the_text_when_characters_span_tokens() -> None:
    text = "naïve 𐌰 日本"
    token_ids = byte_level().encode(text).ids
    known = family(byte_level())
    assert b"".join(known.token_bytes(i) for i in token_ids).decode() == text
