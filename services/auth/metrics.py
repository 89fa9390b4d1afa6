"""What the auth service counts; labels are bounded."""

from infermesh.telemetry import metrics

AUTHENTICATIONS = metrics.counter(
    "authentications_total", "Credentials checked: ok, or the error.", ("result",)
)
LEASE_REPORTS = metrics.counter(
    "lease_reports_total", "Reports of leases answered: granted or refused.", ("result",)
)
USAGE_STORED = metrics.counter("usage_records_stored_total", "Records new to the ledger.")
USAGE_DUPLICATES = metrics.counter(
    "usage_records_duplicate_total", "Records that the ledger had already."
)
