"""A model's tokenizer as transformers would load it: text to ids, off the event loop where long.

Owns the thread pool of its encodings. Decoding a stream is `detokenizer`'s.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from gateway.text.chat_template import ChatTemplate, Message, no_template, template_source
from gateway.text.detokenizer import DecoderFamily, decoder_family

# Shorter texts take less time to encode than a thread takes to be woken.
_INLINE_CHARS = 2048
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ModelText:
    """Everything between a model's text and its tokens.

    Args:
        tokenizer_json: the bytes of tokenizer.json.
        config: tokenizer_config.json, {} where the model has none.
        chat_template: the manifest's template, "" where it has none.

    Raises:
        Exception: `tokenizers` and Jinja raise their own kinds for files that they can't read.
    """

    def __init__(
        self,
        model_id: str,
        tokenizer_json: bytes,
        config: Mapping[str, Any],
        chat_template: str,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._model_id = model_id
        self._tokenizer = load_tokenizer(tokenizer_json, config)
        self._threads = threads
        self.family: DecoderFamily = decoder_family(
            self._tokenizer, json.loads(tokenizer_json).get("decoder")
        )
        source = template_source(chat_template, config)
        self._template = ChatTemplate(source, special_tokens(config)) if source else None

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with special tokens, what the post-processor adds (BOS) as well."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)

    async def encode_chat(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation; the template writes its special tokens itself.

        Raises:
            InvalidRequest: the template refuses the messages.
            UnsupportedParameter: the model has no template.
        """
        if self._template is None:
            raise no_template(self._model_id)
        if sum(len(str(message.get("content", ""))) for message in messages) <= _INLINE_CHARS:
            return self._encode(self._template.render(messages, extra), False)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_chat, messages, extra)

    def render(self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None) -> str:
        """The prompt text of a conversation; raises as `encode_chat` does."""
        if self._template is None:
            raise no_template(self._model_id)
        return self._template.render(messages, extra)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of whole sequences of ids."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _encode_chat(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None
    ) -> list[int]:
        assert self._template is not None
        return self._encode(self._template.render(messages, extra), False)


def load_tokenizer(tokenizer_json: bytes, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with what transformers changes on loading: no truncation or padding, named
    special tokens made special, BOS and EOS where tokenizer_config.json asks for them.
    """
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_added_tokens_decoder()
    known = {token.content for token in vocabulary.values() if token.special}
    missing = [text for text in _special_texts(config) if text not in known]
    # a token that the model has no row for can't be made one here
    missing = [text for text in missing if tokenizer.token_to_id(text) is not None]
    if missing:
        tokenizer.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in missing]
        )
    if "add_bos_token" in config or "add_eos_token" in config:
        _set_post_processor(tokenizer, config)
    return tokenizer


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` …: what a template may name."""
    named = {name: _text_of(config.get(name)) for name in _NAMED}
    return {name: text for name, text in named.items() if text is not None}


def _special_texts(config: Mapping[str, Any]) -> list[str]:
    texts = list(special_tokens(config).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        values = listed.values() if isinstance(listed, Mapping) else listed
        texts += [text for text in map(_text_of, values) if text is not None]
    declared = config.get("added_tokens_decoder") or {}
    texts += [token["content"] for token in declared.values() if token.get("special")]
    return list(dict.fromkeys(texts))


def _text_of(token: Any) -> str | None:
    """tokenizer_config.json writes a token as a string or as {"content": …}."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _set_post_processor(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    named = special_tokens(config)
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    pieces = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    used = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=list(dict(used).items())
    )
