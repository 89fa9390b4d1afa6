"""What a client asks for, whichever way it asked, and what the gateway made of it. Values only."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

RequestId = NewType("RequestId", str)
ReplicaId = NewType("ReplicaId", str)
Fingerprint = NewType("Fingerprint", str)


class Priority(enum.IntEnum):
    """Who goes first when not all fit."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; None is what the client left open."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    # None: no logprobs; 0: the sampled token's alone.
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class StopRules:
    """When the scheduler ends a choice."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them, with the client's template variables."""

    messages: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


# Text, token ids, or a conversation to render.
Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True, slots=True)
class Attribution:
    """Whose usage it is, in the client's own words: its end user, empty where it names none, and
    labels. Changes no answer.
    """

    end_user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything about a generation but its input.

    Attributes:
        user: narrows what is shared.
        fallback_max_tokens: output where the client set no limit; None: the rest of the context.
    """

    sampling: Sampling = Sampling()
    stop: StopRules = StopRules()
    stop_strings: tuple[str, ...] = ()
    n: int = 1
    priority: Priority = Priority.NORMAL
    user: str = ""
    attribution: Attribution = Attribution()
    fallback_max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call of a client; each prompt gets `options.n` choices."""

    model: str
    prompts: tuple[Prompt, ...]
    options: Options = Options()


@dataclass(frozen=True, slots=True)
class Call:
    """The circumstances of a request.

    Attributes:
        deadline: on the monotonic clock, where the client itself set one.
        cache_control: what the client asks of the cache, as it wrote it.
        whole: the client sees nothing before the answer's end.
        idempotency_key: the client's; empty: the request ends when its client goes away.
        resume_from: what the client has of the answer, as it wrote it.
    """

    request_id: RequestId
    endpoint: str
    credential: str | None = None
    deadline: float | None = None
    traceparent: str = ""
    cache_control: str = ""
    whole: bool = False
    idempotency_key: str = ""
    resume_from: str | None = None


@dataclass(frozen=True, slots=True)
class Resumable:
    """What names a request to every gateway.

    Attributes:
        key: hash of tenant and idempotency key.
        digest: hash of what was asked for.
        record_id: of the request's usage record.
    """

    key: bytes
    digest: bytes
    record_id: str


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, resolved: what a replica is asked to generate.

    Attributes:
        shareable_seed: the client's own seed; a drawn one does not make a request unlike another.
        reuse_policy: the tenant's; empty: the gateway's.
        rope_switch_len: of the model, see `ServedModel`.
        resumable: it outlives its clients' connections; None: it ends with its last reader.
    """

    request_id: RequestId
    model_id: str
    fingerprint: Fingerprint
    prompt_token_ids: tuple[int, ...]
    num_choices: int
    sampling: Sampling
    stop: StopRules
    priority: Priority
    tenant: str
    sharing_domain: str
    traceparent: str
    deadline: float | None
    temperature_given: bool
    shareable_seed: int | None
    tenant_weight: float = 1.0
    reuse_policy: str = ""
    rope_switch_len: int = 0
    resumable: Resumable | None = None
