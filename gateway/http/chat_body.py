"""POST /v1/chat/completions: the body, and what of OpenAI's and others' fields is not served."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from gateway.http.fields import CommonBody, ranged
from gateway.http.parsing import ignored_fields, refuse_unserved
from gateway.ranges import RANGES, check_value
from gateway.request import Conversation, GenerationRequest
from infermesh.errors import InvalidRequest, UnsupportedParameter

# Known, not served: each with the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    # hints that change no answer
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    # of other servers
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}
_HINTS = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})


class ChatMessage(BaseModel):
    """One message; fields beyond these go to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None


class ChatBody(CommonBody):
    """The body of a chat call."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = ranged("max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = ranged("top_logprobs")
    chat_template_kwargs: dict[str, Any] | None = None

    def request(self, fallback_max_tokens: int | None) -> GenerationRequest:
        """The call in the gateway's own terms.

        Raises:
            InvalidRequest: naming the field.
            UnsupportedParameter: it asks for what is not served.
        """
        extra = self.model_extra or {}
        refuse_unserved({k: v for k, v in extra.items() if k not in _HINTS}, UNSERVED)
        if self.model is None:
            raise InvalidRequest("model is required", param="model")
        # named as the client spelled it
        check_value("top_logprobs", self.top_logprobs)
        check_value("max_completion_tokens", self.max_completion_tokens, RANGES["max_tokens"])
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs is {self.top_logprobs}; it needs logprobs to be true",
                param="top_logprobs",
            )
        newer = self.max_completion_tokens
        limit = self.max_tokens if newer is None else newer
        options = self.options(
            limit, (self.top_logprobs or 0) if self.logprobs else None, fallback_max_tokens
        )
        return GenerationRequest(self.model, (self.conversation(),), options)

    def conversation(self) -> Conversation:
        """The messages as the chat template takes them."""
        return conversation(self.messages, self.chat_template_kwargs)

    def ignored(self) -> str:
        """Names of unknown fields."""
        return ignored_fields(self.model_extra or {}, UNSERVED)


def conversation(
    messages: list[ChatMessage], template_kwargs: dict[str, Any] | None
) -> Conversation:
    """Messages with text contents.

    Raises:
        InvalidRequest, UnsupportedParameter: naming the message.
    """
    if not messages:
        raise InvalidRequest("messages is empty; it must have at least one", param="messages")
    return Conversation(
        tuple(_message(message, i) for i, message in enumerate(messages)), template_kwargs or {}
    )


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    extra = message.model_extra or {}
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if extra.get(name):
            raise UnsupportedParameter(f"{where}.{name} is not supported", param=f"{where}.{name}")
    if message.role in ("tool", "function"):
        raise UnsupportedParameter(
            f"{where}.role is {message.role!r}; tools are not supported", param=f"{where}.role"
        )
    # templates know the older name of what OpenAI now calls "developer"
    role = "system" if message.role == "developer" else message.role
    content = _text(message.content, f"{where}.content")
    return {**extra, "role": role, "content": content, "name": message.name}


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where} is required", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type")
        if kind != "text":
            raise UnsupportedParameter(
                f"{where}[{i}].type is {kind!r}; only text is supported", param=f"{where}[{i}].type"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{i}].text must be a string", param=f"{where}[{i}].text")
        texts.append(text)
    return "\n".join(texts)
