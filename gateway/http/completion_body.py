"""POST /v1/completions: the body, and what of OpenAI's and others' fields is not served."""

from typing import Any

from gateway.http.fields import CommonBody, ranged
from gateway.http.parsing import ignored_fields, refuse_unserved
from gateway.ranges import RANGES, check_value
from gateway.request import GenerationRequest, Prompt
from infermesh.errors import InvalidRequest, UnsupportedParameter

# OpenAI's default of this endpoint.
FALLBACK_MAX_TOKENS = 16

UNSERVED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
    "prompt_embeds": (),
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
    "add_special_tokens": (True,),
}

PromptField = str | list[str] | list[int] | list[list[int]]


class CompletionBody(CommonBody):
    """The body of a completion call."""

    prompt: PromptField
    logprobs: int | None = ranged("top_logprobs")
    echo: bool | None = None
    best_of: int | None = None

    def request(self) -> GenerationRequest:
        """The call in the gateway's own terms.

        Raises:
            InvalidRequest: naming the field.
            UnsupportedParameter: it asks for what is not served.
        """
        refuse_unserved(self.model_extra or {}, UNSERVED)
        if self.model is None:
            raise InvalidRequest("model is required", param="model")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UnsupportedParameter(
                f"best_of is {self.best_of}; only the value of n ({self.n or 1}) is supported",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise UnsupportedParameter(
                "logprobs of the prompt are not supported: leave out echo or logprobs",
                param="logprobs",
            )
        if self.logprobs is not None:
            check_value("logprobs", self.logprobs, RANGES["top_logprobs"])
        options = self.options(self.max_tokens, self.logprobs, FALLBACK_MAX_TOKENS)
        return GenerationRequest(self.model, self.prompts(), options)

    def prompts(self) -> tuple[Prompt, ...]:
        """Each prompt as text or token ids."""
        return as_prompts(self.prompt)

    def ignored(self) -> str:
        """Names of unknown fields."""
        return ignored_fields(self.model_extra or {}, UNSERVED)


def as_prompts(prompt: PromptField) -> tuple[Prompt, ...]:
    """The four ways of OpenAI's to write a prompt.

    Raises:
        InvalidRequest: an empty list.
    """
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequest("prompt is empty; it must have at least one entry", param="prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(p if isinstance(p, str) else tuple(p) for p in prompt)
