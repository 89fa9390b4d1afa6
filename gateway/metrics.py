"""What the gateway counts; labels are bounded.

A model is one that a replica serves, never what a client asks for; a tenant is no label: the ledger
has what each of them used.
"""

from infermesh.telemetry import metrics
from infermesh.telemetry.metrics import GAP_BUCKETS, LATENCY_BUCKETS, TOKEN_BUCKETS

model_label = metrics.MODELS.of

HTTP_REQUESTS = metrics.counter(
    "http_requests_total",
    "HTTP requests at the public port, by route and status; 499: the client left before an answer.",
    ("route", "method", "status"),
)
REQUESTS = metrics.counter(
    "requests_total",
    "Requests to generate or to embed, by what was answered; model is empty where it was refused "
    "before one was found.",
    ("endpoint", "status", "model"),
)
REQUEST_LATENCY = metrics.histogram(
    "e2e_request_latency_seconds",
    "From a request's arrival to the last byte of its answer, or to its refusal.",
    ("endpoint", "model"),
    LATENCY_BUCKETS,
)
TIME_TO_FIRST_TOKEN = metrics.histogram(
    "time_to_first_token_seconds",
    "From a request's arrival to the first token of its answer.",
    ("endpoint", "model"),
    LATENCY_BUCKETS,
)
INTER_TOKEN_LATENCY = metrics.histogram(
    "inter_token_latency_seconds",
    "From one token of a choice to the next, once per token; several that come at once share the "
    "time.",
    ("model",),
    GAP_BUCKETS,
)
PROMPT_TOKENS = metrics.counter(
    "billed_prompt_tokens_total", "Prompt tokens that clients were told as usage.", ("model",)
)
COMPLETION_TOKENS = metrics.counter(
    "billed_completion_tokens_total", "Output tokens that clients were told as usage.", ("model",)
)
REQUEST_PROMPT_TOKENS = metrics.histogram(
    "request_prompt_tokens", "Prompt tokens of one answered request.", ("model",), TOKEN_BUCKETS
)
REQUEST_GENERATION_TOKENS = metrics.histogram(
    "request_generation_tokens", "Output tokens of one answered request.", ("model",), TOKEN_BUCKETS
)
INFLIGHT = metrics.gauge("requests_inflight", "Requests being answered.")
SINGLE_FLIGHT_HITS = metrics.counter(
    "single_flight_hits_total", "Requests that joined a running generation."
)
RESUMED = metrics.counter(
    "resumed_total",
    "Requests with an idempotency key that was used before: this gateway had the answer, or a "
    "replica, or it was a conflict.",
    ("source",),
)
DETACHED = metrics.gauge("detached_requests", "Requests that go on without their clients.")
FAILOVERS = metrics.counter(
    "failovers_total", "Attempts that were resumed elsewhere, by why.", ("reason",)
)
CIRCUIT = metrics.gauge(
    "replica_circuit_state",
    "0: closed, 1: half-open, 2: open, no request goes there.",
    ("replica",),
)
SILENCES = metrics.counter(
    "replica_silences_total", "Sessions given up because the replica said nothing."
)
REPLICA_READY = metrics.gauge("replica_ready", "1: requests are routed there.", ("replica",))
REPLICA_INFLIGHT = metrics.gauge("replica_inflight", "This gateway's requests there.", ("replica",))
PREFIX_ROUTED = metrics.counter(
    "prefix_routed_total",
    "Requests routed among several replicas; hit: the one chosen holds some of the prompt.",
    ("outcome",),
)
PREFIX_MATCHED_TOKENS = metrics.counter(
    "prefix_matched_tokens_total", "Prompt tokens held by the replica that was chosen for them."
)
REPLICAS_KNOWN = metrics.gauge(
    "replicas_known", "Replicas that requests may be routed to, if ready."
)
DISCOVERY_FAILURES = metrics.counter(
    "discovery_failures_total",
    "Looks for replicas that found nothing usable, so that those known stay.",
    ("source",),
)
CACHE_REQUESTS = metrics.counter(
    "cache_requests_total",
    "Requests that the semantic cache could have answered, by what became of that.",
    ("outcome", "tier", "reason"),
)
CACHE_WAIT = metrics.histogram(
    "cache_wait_seconds", "What asking the cache added to a request.", ("outcome",)
)
CACHE_SAVED = metrics.counter(
    "cache_saved_compute_seconds_total", "Computing that hits made unnecessary."
)
CACHE_WRITES = metrics.counter(
    "cache_writes_total",
    "Fresh answers for the cache: queued, dropped for want of room, or unmarked: begun without it.",
    ("result",),
)
CACHE_CONNECTED = metrics.gauge("cache_connected", "1: the semantic cache answers lookups.")
