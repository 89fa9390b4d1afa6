"""What the auth service counts; labels are bounded."""

from infermesh.telemetry import metrics

AUTHENTICATIONS = metrics.counter(
    "authentications_total", "Credentials checked: ok, or the error.", ("result",)
)
LEASE_REPORTS = metrics.counter(
    "lease_reports_total", "Reports of leases answered: granted or refused.", ("result",)
)
LEASE_STORE_FAILURES = metrics.counter(
    "lease_store_failures_total", "Calls to Redis that failed, by why.", ("reason",)
)
LEASE_STORE_UP = metrics.gauge(
    "lease_store_up", "1: it answered the last call; 0: it did not.", ("store",)
)
USAGE_STORED = metrics.counter("usage_records_stored_total", "Records new to the ledger.")
USAGE_DUPLICATES = metrics.counter(
    "usage_records_duplicate_total", "Records that the ledger had already."
)
LEDGER_ROLLED_UP = metrics.counter(
    "ledger_rows_rolled_up_total", "Usage records that became part of a day's sums."
)
