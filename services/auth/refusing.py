"""How a need that was not met is told to a client: which limit, and when to come back. Pure."""

from __future__ import annotations

from infermesh.errors import InsufficientQuota, MeshError, RateLimitExceeded
from infermesh.quota import BUDGETS, LIMIT_WORDS, Amounts, Limits
from services.auth import quota
from services.auth.quota import Refusal, Tally
from services.auth.values import Report


def refusal_of(
    report: Report, limits: Limits, tally: Tally, open_amounts: Amounts, now: float
) -> MeshError:
    """RateLimitExceeded, or InsufficientQuota where a budget is used up."""
    found = quota.refusal(limits, tally, open_amounts, report.least_needed, now) or Refusal(
        "max_concurrency", limits.max_concurrency or 0, 1.0
    )
    words = LIMIT_WORDS[found.limit]
    sentence = f"Rate limit reached for tenant {report.tenant_id} on {words}: {found.allowed}."
    if found.retry_after_s is not None:
        sentence += f" Please try again in {found.retry_after_s:.1f} s."
    error = InsufficientQuota if found.limit in BUDGETS else RateLimitExceeded
    return error(sentence, retry_after_s=found.retry_after_s)
