"""Owns the byte-level BPE tokenizer, its chat template and the split of text into learnt tokens."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.corpus import Conversation

VOCAB_SIZE = 2048
MAX_LENGTH = 2048
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def learn_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`. All 256 bytes are in the vocabulary, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Numbers become tokens of their own, never glued to a space: 7 is one token everywhere.
            pre_tokenizers.Split(Regex("[0-9]{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Two-digit numbers must be whole tokens; left to their frequency, some would not be.
    numbers = [" ".join(map(str, range(100)))] * 2000
    tokenizer.train_from_iterator(chain(numbers, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template gives them, and which of them the model must produce."""
    pieces: list[tuple[str, bool]] = []
    for message in conversation.messages:
        learnt = message["role"] == "assistant"
        pieces.append((f"{TURN_START}{message['role']}\n", False))
        pieces.append((f"{message['content']}{TURN_END}", learnt))
        pieces.append(("\n", False))
    token_ids: list[int] = []
    learnt_flags: list[bool] = []
    # Special tokens and the line break after a role are boundaries for the pre-tokenizer too, so
    # encoding piece by piece gives the ids of the whole.
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    for ids, (_, learnt) in zip(encoded, pieces, strict=True):
        token_ids += ids
        learnt_flags += [learnt] * len(ids)
    return token_ids, learnt_flags
