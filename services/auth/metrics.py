"""What the auth service counts; labels are bounded."""

from infermesh.telemetry import metrics

AUTHENTICATIONS = metrics.counter("authentications_total", "credentials checked", ("result",))
LEASE_REPORTS = metrics.counter("lease_reports_total", "reports of leases answered", ("result",))
LEASE_STORE_FAILURES = metrics.counter(
    "lease_store_failures_total", "calls to Redis that failed, by why", ("reason",)
)
LEASE_STORE_UP = metrics.gauge(
    "lease_store_up", "1: it answered the last call; 0: it did not", ("store",)
)
USAGE_STORED = metrics.counter("usage_records_stored_total", "records new to the ledger")
USAGE_DUPLICATES = metrics.counter(
    "usage_records_duplicate_total", "records that the ledger had already"
)
