"""What the gateway counts; labels are bounded."""

from infermesh.telemetry import metrics

REQUESTS = metrics.counter("requests_total", "requests answered", ("endpoint", "status"))
REQUEST_DURATION = metrics.histogram(
    "request_duration_seconds", "from arrival to the last byte", ("endpoint",)
)
TIME_TO_FIRST_TOKEN = metrics.histogram(
    "time_to_first_token_seconds", "from arrival to the first token", ("endpoint",)
)
INTER_TOKEN_LATENCY = metrics.histogram(
    "inter_token_latency_seconds", "between tokens of a choice, as schedulers deliver them"
)
PROMPT_TOKENS = metrics.counter("prompt_tokens_total", "prompt tokens of answered requests")
COMPLETION_TOKENS = metrics.counter("completion_tokens_total", "tokens billed to clients")
INFLIGHT = metrics.gauge("requests_inflight", "requests being answered")
SINGLE_FLIGHT_HITS = metrics.counter(
    "single_flight_hits_total", "requests that joined a running generation"
)
RESUMED = metrics.counter(
    "resumed_total",
    "requests with an idempotency key that was used before: this gateway had the answer, or a "
    "replica, or it was a conflict",
    ("source",),
)
DETACHED = metrics.gauge("detached_requests", "requests that go on without their clients")
FAILOVERS = metrics.counter("failovers_total", "attempts that were resumed elsewhere", ("reason",))
CIRCUIT = metrics.gauge(
    "replica_circuit_state", "0: closed, 1: half-open, 2: open, no request goes there", ("replica",)
)
SILENCES = metrics.counter(
    "replica_silences_total", "sessions given up because the replica said nothing"
)
REPLICA_READY = metrics.gauge("replica_ready", "1: requests are routed there", ("replica",))
REPLICA_INFLIGHT = metrics.gauge("replica_inflight", "this gateway's requests there", ("replica",))
PREFIX_ROUTED = metrics.counter(
    "prefix_routed_total",
    "requests routed among several replicas; hit: the one chosen holds some of the prompt",
    ("outcome",),
)
PREFIX_MATCHED_TOKENS = metrics.counter(
    "prefix_matched_tokens_total", "prompt tokens held by the replica that was chosen for them"
)
REPLICAS_KNOWN = metrics.gauge(
    "replicas_known", "replicas that requests may be routed to, if ready"
)
DISCOVERY_FAILURES = metrics.counter(
    "discovery_failures_total",
    "looks for replicas that found nothing usable, so that those known stay",
    ("source",),
)
CACHE_REQUESTS = metrics.counter(
    "cache_requests_total",
    "requests that the semantic cache could have answered, by what became of that",
    ("outcome", "tier", "reason"),
)
CACHE_WAIT = metrics.histogram(
    "cache_wait_seconds", "what asking the cache added to a request", ("outcome",)
)
CACHE_SAVED = metrics.counter(
    "cache_saved_compute_seconds_total", "computing that hits made unnecessary"
)
CACHE_WRITES = metrics.counter(
    "cache_writes_total",
    "fresh answers for the cache: queued, dropped for want of room, or unmarked: begun without it",
    ("result",),
)  # fmt: skip
CACHE_CONNECTED = metrics.gauge("cache_connected", "1: the semantic cache answers lookups")
