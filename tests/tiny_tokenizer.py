"""Small tokenizers made on the spot: byte-level BPE with a ChatML template, and SentencePiece."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = "<|im_end|>"
SPECIALS = ["<|endoftext|>", "<|im_start|>", EOS]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "Zażółć gęślą jaźń, naïve café, Straße, ελληνικά, русский язык",
    "日本語のテキスト、中文文本 😀🎉👍🏽 👨‍👩‍👧",
    "one two three four five six seven eight nine ten STOP user assistant system",
]


@functools.cache
def byte_level() -> Tokenizer:
    """512 entries over all bytes, so that most characters of the corpus are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "naïve ☃"])
    return tokenizer


@functools.cache
def sentence_piece() -> Tokenizer:
    """▁ for spaces, bytes for what is missing, as in Llama 2's tokenizer.json."""
    words = ["▁Hello", "▁world", "▁", "a", "b", "lo", "▁▁", "é", "日", "<x>"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json."""
    return str(tokenizer.to_str()).encode()


def tokenizer_config(**more: object) -> str:
    """tokenizer_config.json."""
    return json.dumps({"eos_token": EOS, "pad_token": "<|endoftext|>", **more})


def eos_id() -> int:
    """The id that ends a chat turn."""
    found: int = byte_level().token_to_id(EOS)
    return found
