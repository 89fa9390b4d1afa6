"""Field types that both bodies share. Types only: ranges are `gateway.ranges`' for both edges."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.http.parsing import token_id_key
from gateway.ranges import MAX_LABELS, MAX_USER_CHARS, RANGES
from gateway.request import Attribution, Options, Priority, Sampling, StopRules


def _bounds(name: str) -> Any:
    """For the schema that clients read; the check itself is not pydantic's."""
    limits = RANGES[name]
    low = "exclusiveMinimum" if limits.low_excluded else "minimum"
    return {low: limits.low, "maximum": limits.high}


def ranged(name: str) -> Any:
    """A field that may be absent, with its range in the schema."""
    return Field(default=None, json_schema_extra=_bounds(name))


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    # accepted: this gateway never obfuscates
    include_obfuscation: bool | None = None


class CommonBody(BaseModel):
    """What chat and completions have in common; null means absent everywhere."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = ranged("temperature")
    top_p: float | None = ranged("top_p")
    n: int | None = ranged("n")
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = ranged("max_tokens")
    presence_penalty: float | None = ranged("presence_penalty")
    frequency_penalty: float | None = ranged("frequency_penalty")
    logit_bias: dict[str, float] | None = None
    user: str | None = Field(default=None, json_schema_extra={"maxLength": MAX_USER_CHARS})
    safety_identifier: str | None = Field(
        default=None, json_schema_extra={"maxLength": MAX_USER_CHARS}
    )
    metadata: dict[str, str] | None = Field(
        default=None, json_schema_extra={"maxProperties": MAX_LABELS}
    )
    # of other servers
    top_k: int | None = Field(default=None, json_schema_extra={"minimum": -1})
    min_p: float | None = ranged("min_p")
    repetition_penalty: float | None = ranged("repetition_penalty")
    min_tokens: int | None = ranged("min_tokens")
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    priority: Literal["low", "normal", "high"] | None = None

    def options(
        self, max_tokens: int | None, top_logprobs: int | None, fallback_max_tokens: int | None
    ) -> Options:
        """The generation's options in the gateway's own terms."""
        stop = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return Options(
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0 if self.top_k == -1 else self.top_k,  # other servers' word for "off"
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self._logit_bias(),
                seed=self.seed,
                top_logprobs=top_logprobs,
            ),
            stop=StopRules(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens or 0,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
            ),
            stop_strings=tuple(stop),
            n=1 if self.n is None else self.n,
            priority=Priority[(self.priority or "normal").upper()],
            user=self.user or "",
            attribution=Attribution(self.safety_identifier or self.user or "", self.metadata or {}),
            fallback_max_tokens=fallback_max_tokens,
        )

    def _logit_bias(self) -> dict[int, float]:
        return {token_id_key(key): value for key, value in (self.logit_bias or {}).items()}
