"""Rate limits as OpenAI writes them into response headers. Pure."""

from gateway.auth.account import Grant
from infermesh.quota import Amounts, Limits

PREFIX = "x-ratelimit-"
LIMIT_HEADERS = tuple(
    f"{PREFIX}{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
)


def limit_headers(limits: Limits, known: tuple[Grant, Amounts] | None) -> dict[str, str]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, for what is limited per minute.

    Args:
        known: what the auth service last said is left to all, and what this gateway has beyond.
    """
    headers: dict[str, str] = {}
    kinds = (
        ("requests", limits.requests_per_minute),
        ("tokens", limits.tokens_per_minute),
    )
    for kind, limit in kinds:
        if limit is None:
            continue
        headers[f"{PREFIX}limit-{kind}"] = str(limit)
        if known is None:
            continue
        grant, available = known
        left = getattr(grant.remaining, kind) + getattr(available, kind)
        headers[f"{PREFIX}remaining-{kind}"] = str(min(limit, left))
        headers[f"{PREFIX}reset-{kind}"] = duration(getattr(grant, f"{kind}_reset_s"))
    return headers


def duration(seconds: float) -> str:
    """As in OpenAI's headers: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1e3)}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
