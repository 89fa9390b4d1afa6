"""Writes the chart's values.schema.json: what values may be, and what each of them means."""

import json
import sys
from pathlib import Path

from deploy.helm.schema_parts import (
    Schema,
    autoscaling,
    block,
    container,
    flag,
    free,
    pod,
    secret,
    storage,
    text,
    whole,
    words,
)
from infermesh.config import AuthConfig, CacheConfig, GatewayConfig, SchedulerConfig, ShardConfig

SCHEMA = Path(__file__).parent / "infermesh" / "values.schema.json"
_LABEL = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"
# one folder after the other, none of them up; Go's patterns, too
_PATH = r"(/\w[\w.-]*)+"
_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_SOURCE = (
    rf"^(hf://[\w.-]+/[\w.-]+@[\w./-]+|s3://{_BUCKET}{_PATH}|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?({_PATH})?"
    rf"|path://{_PATH})$"
)
_DURATION = "^[0-9]+(s|m)$"


def gateway() -> Schema:
    """The block `gateway`."""
    return block(
        "the public edge",
        replicas=whole(low=1),
        **container(GatewayConfig),
        **pod(),
        autoscaling=autoscaling(requestsInflight=whole("aimed at per gateway", 1)),
        service=block(
            type=text(enum=["ClusterIP", "NodePort", "LoadBalancer"]),
            annotations=words(),
            labels=words(),
            loadBalancerClass=text(),
            loadBalancerSourceRanges={"type": "array", "items": text()},
            externalTrafficPolicy=text("empty: Cluster", enum=["", "Cluster", "Local"]),
        ),
    )


def auth() -> Schema:
    """The block `auth`; SQLite is one process's."""
    made = block(
        "tenants, keys, quota, usage",
        enabled=flag("false: any key is accepted"),
        replicas=whole(low=1),
        **container(AuthConfig),
        **pod(),
        database=block(
            kind=text(enum=["sqlite", "postgresql"]),
            storage=storage("of sqlite"),
            urlSecret=secret("of postgresql: postgresql://USER:PASSWORD@HOST/NAME"),
        ),
        redis=block(urlSecret=secret("rediss://USER:PASSWORD@HOST:PORT/0; empty: none")),
        firstKeySecret=secret("an API key that exists from the start; empty: one is drawn"),
        jwt=block(keysSecret=secret("JWKS of the issuer"), issuer=text(), audience=text()),
    )
    is_sqlite = _where("database", {"properties": {"kind": {"const": "sqlite"}}})
    made["allOf"] = [
        {
            "if": is_sqlite,
            "then": {"properties": {"replicas": {"const": 1}}},
            "else": {
                "properties": {
                    "database": {
                        "properties": {"urlSecret": {"properties": {"name": {"minLength": 1}}}}
                    }
                }
            },
        }
    ]
    return made


def cache() -> Schema:
    """The block `cache`; it is one process."""
    return block(
        "answers given before, and the embedder",
        enabled=flag(),
        replicas={"const": 1, "description": "several instances can't share answers yet"},
        **container(CacheConfig),
        **pod(),
        storage=storage("empty: a restart forgets the answers"),
    )


def model(required: tuple[str, ...] = ()) -> Schema:
    """An entry of `models`, or what each begins with."""
    made = block(
        name=text("part of the objects' names", pattern=_LABEL),
        modelId=text("what clients ask for; empty: the name"),
        source=text(
            "hf://ORG/NAME@REVISION, s3://BUCKET/PREFIX, pvc://CLAIM/FOLDER, or path:///FOLDER of "
            "the image",
            pattern=_SOURCE,
        ),
        replicas=whole(low=1),
        tp=whole("ranks of a stage; 1: infermesh has no tensor parallel yet", 1),
        pp=whole("stages; 1: infermesh has no pipeline parallel yet", 1),
        offload=text("none: infermesh does not offload yet"),
        dtype=text(enum=["auto", "float32", "bfloat16", "float16"]),
        quantize=text("on a CPU", enum=["", "int8", "int4"]),
        accelerator=block(
            kind=text(enum=["cpu", "gpu"]),
            resource=text("what the cluster calls a GPU", minLength=1),
            runtimeClassName=text(),
        ),
        sizeGiB={"type": "number", "exclusiveMinimum": 0, "description": "of the weights"},
        loadMiBPerSecond=whole("of the slowest way to the device", 1),
        checksum=text("of the model's folder", pattern="^(sha256:[0-9a-f]{64})?$"),
        download=download(),
        rollout=text(enum=["drain", "surge"]),
        autoscaling=autoscaling(
            requestsWaiting=whole("aimed at per replica", 1),
            tokensPerSecond=whole("aimed at per replica; 0: not looked at"),
        ),
        scheduler=block("over the block `scheduler`", **container(SchedulerConfig)),
        shard=block("over the block `shard`", **container(ShardConfig)),
        **pod(),
    )
    if required:
        made["required"] = list(required)
    return made


def download() -> Schema:
    """How files come from the hub or a bucket."""
    return block(
        "of hf:// and s3:// sources",
        storage=storage("of the downloaded files"),
        tokenSecret=secret("of the hub"),
        s3=block(
            endpointUrl=text("empty: AWS", pattern="^(https?://.+)?$"),
            region=text(minLength=1),
            credentialsSecret=text("of variables as AWS' libraries name them"),
        ),
        minMiBPerSecond=whole("of the way here: how long a rollout may take", 1),
        resources=free("requests and limits"),
    )


def _where(name: str, schema: Schema) -> Schema:
    return {"properties": {name: schema}, "required": [name]}


def _required_if_enabled(*names: str) -> list[Schema]:
    """Of a block with `enabled`: these may not be empty then."""
    filled = {name: {"minLength": 1, "minItems": 1} for name in names}
    return [{"if": _where("enabled", {"const": True}), "then": {"properties": filled}}]


def edges() -> dict[str, Schema]:
    """What lies between the mesh and its clients."""
    grpc = block(enabled=flag(), host=text(), annotations=words(), tls=free("", "array"))
    ingress = block(
        enabled=flag(),
        className=text(),
        host=text(),
        annotations=words("over those for ingress-nginx, which keep streams alive"),
        tls=free("", "array"),
        grpc={**grpc, "allOf": _required_if_enabled("host")},
    )
    routes = block(
        enabled=flag(),
        annotations=words(),
        parentRefs=free("the Gateways", "array"),
        hostnames={"type": "array", "items": text()},
        grpcHostnames={"type": "array", "items": text()},
    )
    return {
        "ingress": {**ingress, "allOf": _required_if_enabled("host")},
        "gatewayApi": {**routes, "allOf": _required_if_enabled("parentRefs")},
        "networkPolicy": block(
            enabled=flag(),
            clients=free("peers that may use the gateway; empty: everyone", "array"),
            monitoring=free("peers that may read metrics; empty: everyone", "array"),
            database=block(to=free("peers", "array"), port=whole(low=1)),
            redis=block(to=free("peers", "array"), port=whole(low=1)),
            download=block(to=free("peers; empty: anywhere", "array"), port=whole(low=1)),
        ),
    }


def tls() -> Schema:
    """Certificates of the services."""
    names = ("gateway", "auth", "cache", "scheduler", "shard", "operator")
    return block(
        "between the services",
        mode=text(
            "plaintext: nothing is hidden inside the cluster; certManager; secrets: yours, each "
            "with ca.crt, tls.crt and tls.key",
            enum=["plaintext", "certManager", "secrets"],
        ),
        certManager=block(
            issuerRef=block(
                "empty: an authority of the release's own",
                name=text(),
                kind=text(enum=["Issuer", "ClusterIssuer"]),
            ),
            duration=text(pattern="^[0-9]+h$"),
            renewBefore=text(pattern="^[0-9]+h$"),
        ),
        secrets=block(**{name: text() for name in names}),
    )


def monitoring() -> Schema:
    """Of Prometheus' operator and Grafana's sidecar."""
    return block(
        podMonitor=block(
            enabled=flag(),
            interval=text(pattern=_DURATION),
            scrapeTimeout=text(pattern=_DURATION),
            labels=words(),
        ),
        prometheusRule=block("the chart's alerts", enabled=flag(), labels=words()),
        dashboards=block("a ConfigMap each", enabled=flag(), labels=words(), annotations=words()),
    )


def schema() -> Schema:
    """The whole."""
    scheduler, shard = container(SchedulerConfig), container(ShardConfig)
    values = block(
        **{
            "global": {
                "type": "object",
                "properties": {
                    "imageRegistry": text("in front of every image's repository"),
                    "imagePullSecrets": free("", "array"),
                },
            },
            "nameOverride": text(maxLength=40),
            "fullnameOverride": text(maxLength=40),
            "imagePullSecrets": free("", "array"),
            "commonLabels": words(),
            "commonAnnotations": words(),
            "revisionHistoryLimit": whole(),
            "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
            "telemetry": block(
                logLevel=text(enum=["debug", "info", "warning", "error"]),
                logFormat=text(enum=["json", "text"]),
            ),
            "gateway": gateway(),
            "auth": auth(),
            "cache": cache(),
            "scheduler": block("of every model", **scheduler),
            "shard": block("of every model", **shard),
            "models": {"type": "array", "minItems": 1, "items": model(("name", "source"))},
            "modelDefaults": model(),
            "tls": tls(),
            **edges(),
            "monitoring": monitoring(),
            "prometheus": block(
                address=text("http://…", pattern="^(https?://.+)?$"),
                authentication=block(
                    "KEDA's",
                    name=text("empty: none"),
                    kind=text(enum=["TriggerAuthentication", "ClusterTriggerAuthentication"]),
                ),
            ),
            "test": block(
                enabled=flag(),
                model=text("empty: the first"),
                waitSeconds=whole(),
                keySecret=secret("empty: the first key's"),
            ),
        }
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "infermesh",
        **values,
    }


def rendered() -> str:
    """The file's text."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(rendered(), encoding="utf-8")
    sys.stdout.write(f"{SCHEMA} is written\n")
