"""Tokens to text, one at a time: increments that never hold half a character and whose
concatenation equals `Tokenizer.decode(ids, skip_special_tokens=True)`.

Two families of decoders are followed exactly at constant cost per token: byte-level BPE, and
SentencePiece with byte fallback. Any other decoder is run again over all tokens each time.
"""

import codecs
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from gateway.text.vocabulary import (
    Vocabulary,
    byte_fallback,
    byte_level_bytes,
    undecodable,
)


class Detokenizer(Protocol):
    """The text of one choice as its tokens arrive."""

    def push(self, token_id: int) -> str:
        """The whole characters that this token completes."""

    def finish(self) -> str:
        """What is still held; half a character becomes U+FFFD."""


class DecoderFamily(Protocol):
    """Makes a detokenizer for each choice of a model and knows each token's bytes."""

    def start(self) -> Detokenizer: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text in the middle of it; may be half a character."""


class ByteLevel:
    """GPT-2's alphabet: every token is bytes, the text is their UTF-8 decoding."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bytes: dict[int, bytes] = {}

    def start(self) -> Detokenizer:
        return _ByteLevelStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        return byte_level_bytes(self._vocabulary.token(token_id) or "")

    def text_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but nothing for a special token."""
        try:
            return self._bytes[token_id]
        except KeyError:
            data = byte_level_bytes(self._vocabulary.decoded(token_id) or "")
            self._bytes[token_id] = data
            return data


class _ByteLevelStream:
    def __init__(self, family: ByteLevel) -> None:
        self._bytes_of = family.text_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True, slots=True)
class SentencePieceRules:
    """What the decoder does to each token, then to the start of the text."""

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    strip_char: str
    strip_left: int

    def spell(self, token: str) -> str:
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token


class SentencePiece:
    """`▁` for a space and `<0xNN>` for what the vocabulary lacks."""

    def __init__(self, vocabulary: Vocabulary, rules: SentencePieceRules) -> None:
        self._vocabulary = vocabulary
        self.rules = rules

    def start(self) -> Detokenizer:
        return _SentencePieceStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        spelled = self.rules.spell(self._vocabulary.token(token_id) or "")
        byte = byte_fallback(spelled) if self.rules.byte_fallback else None
        return spelled.encode() if byte is None else bytes([byte])

    def piece(self, token_id: int) -> str | int | None:
        """A token's text, the byte that it stands for, or None where it adds nothing."""
        token = self._vocabulary.decoded(token_id)
        if token is None:
            return None
        spelled = self.rules.spell(token)
        byte = byte_fallback(spelled) if self.rules.byte_fallback else None
        return spelled if byte is None else byte


class _SentencePieceStream:
    """A run of byte tokens is text only if all of it is, so it is held until it ends."""

    def __init__(self, family: SentencePiece) -> None:
        self._family = family
        self._run = bytearray()
        self._to_strip = family.rules.strip_left

    def push(self, token_id: int) -> str:
        piece = self._family.piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._strip(self._end_run() + piece)

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = undecodable(len(self._run))
        self._run.clear()
        return text

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._family.rules.strip_char):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


class AnyDecoder:
    """Decodes all tokens again for each new one: right for every decoder whose text only grows."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def start(self) -> Detokenizer:
        return _AnyDecoderStream(self._tokenizer)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._vocabulary.special_ids:
            return (self._vocabulary.token(token_id) or "").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


class _AnyDecoderStream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        # a trailing U+FFFD may be a character of which the rest is to come
        return self._advance(self._decode().rstrip("�"))

    def finish(self) -> str:
        return self._advance(self._decode())

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _advance(self, text: str) -> str:
        if not text.startswith(self._emitted):
            return ""
        new = text[len(self._emitted) :]
        self._emitted = text
        return new


def decoder_family(tokenizer: Tokenizer, decoder: dict[str, Any] | None) -> DecoderFamily:
    """The family that `decoder`, of tokenizer.json, belongs to."""
    vocabulary = Vocabulary(tokenizer)
    steps = _steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevel(vocabulary)
    rules = _sentence_piece_rules(steps)
    if rules is not None:
        return SentencePiece(vocabulary, rules)
    return AnyDecoder(tokenizer, vocabulary)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _sentence_piece_rules(steps: list[dict[str, Any]]) -> SentencePieceRules | None:
    """Replace*, ByteFallback?, Fuse, Strip? of the left side: anything else is another family."""
    rest = list(steps)
    replacements = []
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    has_bytes = bool(rest) and rest[0]["type"] == "ByteFallback"
    if has_bytes:
        rest.pop(0)
    if not rest or rest.pop(0)["type"] != "Fuse":
        return None
    strip_char, strip_left = "", 0
    if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
        step = rest.pop(0)
        strip_char, strip_left = step["content"], step["start"]
    if rest:
        return None
    return SentencePieceRules(tuple(replacements), has_bytes, strip_char, strip_left)
