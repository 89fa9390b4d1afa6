"""What the gateway counts of auth; labels are bounded."""

from infermesh.telemetry import metrics

KEY_CHECKS = metrics.counter(
    "key_checks_total", "credentials that had to be asked for", ("result",)
)
ADMISSIONS = metrics.counter(
    "quota_admissions_total", "requests of limited tenants, by what became of them", ("result",)
)
USAGE_SENT = metrics.counter("usage_records_sent_total", "records that the ledger has taken")
