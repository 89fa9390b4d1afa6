"""What the gateway counts of auth; labels are bounded."""

from infermesh.telemetry import metrics

KEY_CHECKS = metrics.counter(
    "key_checks_total", "questions to the auth service about credentials", ("result",)
)
ADMISSIONS = metrics.counter(
    "quota_admissions_total", "requests of limited tenants, by what became of them", ("result",)
)
OPEN_ADMISSIONS = metrics.counter(
    "quota_open_admissions_total", "requests admitted without a lease while auth was away"
)
FAIL_OPEN = metrics.gauge("quota_fail_open", "1: requests are admitted without leases")
USAGE_QUARANTINED = metrics.counter(
    "usage_records_quarantined_total", "records that the ledger refuses, kept beside the spool"
)
USAGE_SENT = metrics.counter("usage_records_sent_total", "records that the ledger has taken")
