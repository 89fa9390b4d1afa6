"""What each token id stands for: its bytes, and which ids decoding skips.

Owns no state of a stream (see `detokenizer`).
"""

import functools
import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNDECODABLE = "�"


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, encoder.py), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level BPE token; an added token outside the alphabet is plain text."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode()


def byte_fallback(token: str) -> int | None:
    """The byte that `<0x41>` means, None for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


class Vocabulary:
    """Looks ids up once and remembers them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[int, str | None] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None for an id that it lacks."""
        try:
            return self._tokens[token_id]
        except KeyError:
            self._tokens[token_id] = found = self._tokenizer.id_to_token(token_id)
            return found

    def decoded(self, token_id: int) -> str | None:
        """The spelling of an id that appears in text; None where it is special or unknown."""
        return None if token_id in self.special_ids else self.token(token_id)


def display(data: bytes) -> str:
    """A token's bytes as OpenAI shows them: text, or `bytes:\\xf0\\x9f` where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def undecodable(count: int) -> str:
    """What stands for `count` bytes that are no text."""
    return _UNDECODABLE * count
