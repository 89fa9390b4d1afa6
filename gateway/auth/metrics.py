"""What the gateway counts of auth; labels are bounded."""

from infermesh.telemetry import metrics

KEY_CHECKS = metrics.counter(
    "key_checks_total", "Questions to the auth service about credentials.", ("result",)
)
ADMISSIONS = metrics.counter(
    "quota_admissions_total",
    "Requests of limited tenants: admitted, open (without a lease), or the error of a refusal.",
    ("result",),
)
OPEN_ADMISSIONS = metrics.counter(
    "quota_open_admissions_total", "Requests admitted without a lease while auth was away."
)
FAIL_OPEN = metrics.gauge("quota_fail_open", "1: requests are admitted without leases.")
USAGE_QUARANTINED = metrics.counter(
    "usage_records_quarantined_total", "Records that the ledger refuses, kept beside the spool."
)
USAGE_SENT = metrics.counter("usage_records_sent_total", "Records that the ledger has taken.")
SPOOL_BYTES = metrics.gauge("usage_spool_bytes", "Usage on disk that the ledger has not confirmed.")
SPOOL_OLDEST = metrics.gauge(
    "usage_spool_oldest_seconds", "Age of the oldest of that usage; 0 where none waits."
)


def connected() -> metrics.Metric:
    """Made where there is an auth service: without one, 0 would say that it is away."""
    return metrics.gauge(
        "auth_connected", "1: the auth service's feed of changes is heard; absent without one."
    )
