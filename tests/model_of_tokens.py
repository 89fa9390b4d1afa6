"""The "model" of a ModelShard: which token follows a history, and what a sequence alone gets."""

from __future__ import annotations

import hashlib

from infermesh.v1 import sampling_pb2

VOCAB_SIZE = 64
EOS = 1
# Where the hash of a history starts; all of a sequence's cells follow from it.
SHORT, LONG = 0, 1


def chain(history: int, token_id: int) -> int:
    digest = hashlib.blake2b(f"{history}:{token_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sample(
    history: int,
    position: int,
    choice: int,
    sampling: sampling_pb2.SamplingParams,
    suppressed: frozenset[int],
    counts: tuple[int, ...],
) -> int:
    """The token after `history`: a function of all that may shape it, EOS now and then."""
    temperature = round(sampling.temperature, 3)
    noise = (sampling.seed, choice, position) if temperature > 0 else ()
    word = f"{history}:{temperature}:{noise}:{counts}"
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little")
    token_id = EOS if draw % 23 == 0 else 2 + draw // 23 % (VOCAB_SIZE - 2)
    while token_id in suppressed:
        token_id = 2 + (token_id + 1) % (VOCAB_SIZE - 2)
    return token_id


def uses_penalties(sampling: sampling_pb2.SamplingParams) -> bool:
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or (sampling.HasField("repetition_penalty") and sampling.repetition_penalty != 1)
    )


def oracle(
    prompt: list[int],
    choice: int,
    sampling: sampling_pb2.SamplingParams,
    *,
    max_tokens: int,
    max_model_len: int,
    min_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset({EOS}),
    rope_switch_len: int = 0,
) -> list[int]:
    """The output of one sequence run alone, token by token."""
    short, long = SHORT, LONG
    for token_id in prompt:
        short, long = chain(short, token_id), chain(long, token_id)
    tokens = list(prompt)
    output: list[int] = []
    while len(output) < max_tokens and len(tokens) < max_model_len:
        suppressed = stop_token_ids if len(output) < min_tokens else frozenset()
        counts = tuple(sorted(tokens)) if uses_penalties(sampling) else ()
        history = long if 0 < rope_switch_len < len(tokens) else short
        token_id = sample(history, len(tokens), choice, sampling, suppressed, counts)
        short, long = chain(short, token_id), chain(long, token_id)
        tokens.append(token_id)
        output.append(token_id)
        if token_id in stop_token_ids and len(output) > min_tokens:
            break
    return output
