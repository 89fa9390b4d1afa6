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
FAILOVERS = metrics.counter("failovers_total", "attempts that were resumed elsewhere", ("reason",))
REPLICA_READY = metrics.gauge("replica_ready", "1: requests are routed there", ("replica",))
REPLICA_INFLIGHT = metrics.gauge("replica_inflight", "this gateway's requests there", ("replica",))
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
    "cache_writes_total", "fresh answers for the cache: queued, or dropped for want of room",
    ("result",),
)  # fmt: skip
CACHE_CONNECTED = metrics.gauge("cache_connected", "1: the semantic cache answers lookups")
