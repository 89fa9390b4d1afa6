"""Turns a request with its tokens into a job: model defaults, length limits, seed. Pure but for the
seed that is drawn through `draw_seed`.
"""

import dataclasses
from collections.abc import Callable, Sequence

from gateway.identity import Principal
from gateway.ranges import check_token_ids
from gateway.request import Call, Job, Options, Resumable, Sampling, StopRules
from gateway.served_model import ServedModel
from infermesh.errors import ContextLengthExceeded, InvalidRequest

_SEED_MASK = 2**64 - 1
# An open end is not cut shorter for want of quota: the request waits for a later time.
_LEAST_OPEN_END = 256


def resolve(
    call: Call,
    options: Options,
    model: ServedModel,
    prompt_token_ids: Sequence[int],
    principal: Principal,
    draw_seed: Callable[[], int],
    tokens_left: int | None = None,
) -> Job:
    """The job of one prompt.

    Args:
        tokens_left: of the tenant's quota, for an output without `max_tokens`; None: not limited.

    Raises:
        ContextLengthExceeded: prompt and output don't fit.
        InvalidRequest: an empty prompt, or ids outside of the vocabulary.
    """
    if not prompt_token_ids:
        raise InvalidRequest("prompt has no tokens; it must have at least one", param="prompt")
    sampling = options.sampling
    check_token_ids("logit_bias", tuple(sampling.logit_bias), model.vocab_size)
    check_token_ids("stop_token_ids", options.stop.stop_token_ids, model.vocab_size)
    return Job(
        request_id=call.request_id,
        model_id=model.model_id,
        fingerprint=model.fingerprint,
        prompt_token_ids=tuple(prompt_token_ids),
        num_choices=options.n,
        sampling=_with_defaults(sampling, model.defaults, draw_seed),
        stop=_with_limit(
            options, len(prompt_token_ids), model.max_model_len, tokens_left, principal
        ),
        priority=options.priority,
        tenant=principal.tenant,
        tenant_weight=principal.weight,
        reuse_policy=principal.reuse_policy,
        rope_switch_len=model.rope_switch_len,
        sharing_domain=principal.sharing_domain(options.user),
        traceparent=call.traceparent,
        deadline=call.deadline,
        temperature_given=sampling.temperature is not None,
        shareable_seed=sampling.seed,
    )


def bare_job(
    call: Call,
    options: Options,
    model: ServedModel,
    principal: Principal,
    name: Resumable,
    deadline: float,
) -> Job:
    """A job of which only a replica that has it knows prompt, sampling and stop conditions."""
    return Job(
        request_id=call.request_id,
        model_id=model.model_id,
        fingerprint=model.fingerprint,
        prompt_token_ids=(),
        num_choices=options.n,
        sampling=options.sampling,
        stop=options.stop,
        priority=options.priority,
        tenant=principal.tenant,
        tenant_weight=principal.weight,
        reuse_policy=principal.reuse_policy,
        sharing_domain=principal.sharing_domain(options.user),
        traceparent=call.traceparent,
        deadline=call.deadline or deadline,
        temperature_given=options.sampling.temperature is not None,
        shareable_seed=options.sampling.seed,
        resumable=name,
    )


def _with_defaults(asked: Sampling, defaults: Sampling, draw_seed: Callable[[], int]) -> Sampling:
    def pick(name: str, otherwise: float) -> float:
        for source in (asked, defaults):
            value: float | None = getattr(source, name)
            if value is not None:
                return value
        return otherwise

    return dataclasses.replace(
        asked,
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=int(pick("top_k", 0)),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        presence_penalty=pick("presence_penalty", 0.0),
        frequency_penalty=pick("frequency_penalty", 0.0),
        # drawn here, so that another replica can continue the very same stream
        seed=draw_seed() if asked.seed is None else asked.seed & _SEED_MASK,
    )


def most_tokens(job: Job) -> int:
    """What a job uses at most: its prompt once, and each choice to its limit."""
    return len(job.prompt_token_ids) + job.num_choices * (job.stop.max_tokens or 0)


def _with_limit(
    options: Options,
    prompt_len: int,
    max_model_len: int,
    tokens_left: int | None,
    principal: Principal,
) -> StopRules:
    room = max_model_len - prompt_len
    asked = options.stop.max_tokens
    wanted = asked if asked is not None else 0
    if room < max(1, wanted, options.stop.min_tokens):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {prompt_len + wanted} tokens ({prompt_len} in the prompt, {wanted} in the "
            "completion). Please reduce the length of the prompt or completion.",
            param="max_tokens" if room >= 1 else None,
        )
    limit = asked
    if limit is None:
        limit = min(room, options.fallback_max_tokens or room)
        ceiling = principal.limits.most_tokens
        if ceiling is not None:
            left = ceiling if tokens_left is None else tokens_left
            least = min(_LEAST_OPEN_END, ceiling // 4)
            now = max(left - prompt_len, least)
            limit = min(limit, now // options.n, (ceiling - prompt_len) // options.n)
        limit = max(1, limit)
    return dataclasses.replace(options.stop, max_tokens=max(limit, options.stop.min_tokens))
