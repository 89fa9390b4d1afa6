"""Writes the chart's values.schema.json: what values may be, and what each of them means.

The `config` of a component is made from the settings of `infermesh.config`, so that a setting that
the code does not have, or a value that it would refuse, is refused before anything is installed.
"""

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from infermesh.config import AuthConfig, CacheConfig, GatewayConfig, SchedulerConfig, ShardConfig

SCHEMA = Path(__file__).parent / "infermesh" / "values.schema.json"
Schema = dict[str, Any]

# What the chart sets itself.
OWNED: dict[type, frozenset[str]] = {
    GatewayConfig: frozenset(
        {
            *("http_address", "admin_address", "grpc_address", "replicas", "replicas_file"),
            *("auth", "gateway_id", "usage_dir", "cache", "drain_grace_s", "grpc_reuse_port"),
        }
    ),
    AuthConfig: frozenset(
        {
            *("address", "admin_address", "database_url", "first_key_file", "drain_grace_s"),
            *("jwt_keys_file", "jwt_issuer", "jwt_audience", "redis_url"),
        }
    ),
    CacheConfig: frozenset({"address", "data_dir", "drain_grace_s"}),
    SchedulerConfig: frozenset(
        {
            *("address", "shard", "replica_id", "model", "model_id", "dtype", "quantize"),
            "drain_grace_s",
        }
    ),
    ShardConfig: frozenset({"address", "device", "kernels_dir", "local_shards", "drain_grace_s"}),
}
_LABEL = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
# one folder after the other, none of them up; Go's patterns, too
_PATH = r"(/\w[\w.-]*)+"
_SOURCE = rf"^(hf://[\w.-]+/[\w.-]+@[\w./-]+|pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?({_PATH})?|path://{_PATH})$"


def text(doc: str = "", **more: Any) -> Schema:
    """A string."""
    return _with(doc, {"type": "string", **more})


def whole(doc: str = "", low: int = 0, **more: Any) -> Schema:
    """A whole number."""
    return _with(doc, {"type": "integer", "minimum": low, **more})


def flag(doc: str = "") -> Schema:
    """True or false."""
    return _with(doc, {"type": "boolean"})


def block(doc: str = "", **properties: Schema) -> Schema:
    """A mapping of exactly these keys."""
    own = {"type": "object", "additionalProperties": False, "properties": properties}
    return _with(doc, own)


def words(doc: str = "") -> Schema:
    """A mapping of strings, as labels and annotations are."""
    return _with(doc, {"type": "object", "additionalProperties": {"type": "string"}})


def free(doc: str, kind: str = "object") -> Schema:
    """What goes into a manifest as it is, and is Kubernetes' to check."""
    own: Schema = {"type": kind}
    if kind == "array":
        own["items"] = {"type": "object"}
    return _with(doc, own)


def secret(doc: str) -> Schema:
    """A key of a Secret that exists."""
    return block(doc, name=text("empty: none"), key=text(minLength=1))


def _with(doc: str, schema: Schema) -> Schema:
    return {"description": doc, **schema} if doc else schema


def config(cls: type) -> Schema:
    """The settings of one section, but for those that the chart sets."""
    hints = typing.get_type_hints(cls)
    return block(
        "settings of infermesh.toml",
        **{
            item.name: _setting(item, hints[item.name])
            for item in dataclasses.fields(cls)
            if item.name not in OWNED[cls]
        },
    )


def _setting(item: "dataclasses.Field[Any]", kind: Any) -> Schema:
    facts = item.metadata
    schema: Schema = {"description": facts["doc"]}
    if typing.get_origin(kind) is tuple:
        return {**schema, "type": "array", "items": {"type": "string"}}
    schema["type"] = {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]
    if facts["choices"]:
        schema["enum"] = list(facts["choices"])
    if facts["low"] is not None:
        schema["minimum"] = facts["low"]
    if facts["high"] is not None:
        schema["maximum"] = facts["high"]
    return schema


def probe() -> Schema:
    """When a probe is sent, and how often it may fail."""
    numbers = ("periodSeconds", "timeoutSeconds", "failureThreshold", "initialDelaySeconds")
    return block(**{name: whole(low=0 if name.startswith("initial") else 1) for name in numbers})


def container(section: type) -> dict[str, Schema]:
    """What every container has."""
    return {
        "image": block(
            repository=text(minLength=1),
            tag=text("empty: the chart's appVersion"),
            digest=text("sha256:…, in place of the tag", pattern="^(sha256:[0-9a-f]{64})?$"),
            pullPolicy=text(enum=["Always", "IfNotPresent", "Never"]),
        ),
        "resources": free("requests and limits"),
        "probes": block(startup=probe(), readiness=probe(), liveness=probe()),
        "extraEnv": {
            "type": "array",
            "description": "more environment; secrets by valueFrom.secretKeyRef",
            "items": {"type": "object", "required": ["name"]},
        },
        "config": config(section),
    }


def pod() -> dict[str, Schema]:
    """What every pod has."""
    return {
        "drain": block(
            "the pod may take their sum, and 10 seconds, to end",
            preStopSeconds=whole("still serves while it leaves the lists of addresses", 1),
            graceSeconds=whole("to finish what runs", 0),
        ),
        "podDisruptionBudget": block(enabled=flag(), maxUnavailable=whole(low=1)),
        "serviceAccount": block(
            "no token is mounted", create=flag(), name=text(), annotations=words()
        ),
        "podAnnotations": words(),
        "podLabels": words(),
        "nodeSelector": words(),
        "tolerations": free("", "array"),
        "affinity": free(""),
        "topologySpreadConstraints": free("", "array"),
        "priorityClassName": text(),
    }


def storage(doc: str) -> Schema:
    """A volume that lasts."""
    return block(
        doc,
        size=text("empty: none", pattern=rf"^$|{_QUANTITY}"),
        storageClassName=text("empty: the cluster's default"),
        existingClaim=text("in place of a new one"),
    )


def autoscaling(**targets: Schema) -> Schema:
    """By KEDA, on what waits and runs, never on CPU."""
    return block(
        "by KEDA, from Prometheus",
        enabled=flag(),
        minReplicas=whole(low=1),
        maxReplicas=whole(low=1),
        **targets,
    )


def gateway() -> Schema:
    """The block `gateway`."""
    return block(
        "the public edge",
        replicas=whole(low=1),
        **container(GatewayConfig),
        **pod(),
        autoscaling=autoscaling(requestsInflight=whole("aimed at per gateway", 1)),
        service=block(
            type=text(enum=["ClusterIP", "NodePort", "LoadBalancer"]), annotations=words()
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
        redis=block(urlSecret=secret("rediss://:PASSWORD@HOST:6379/0; empty: none")),
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
    one_device = "one device holds a replica: the code has no tensor or pipeline parallel yet"
    made = block(
        name=text("part of the objects' names", pattern=_LABEL),
        modelId=text("what clients ask for; empty: the name"),
        source=text(
            "hf://ORG/NAME@REVISION, pvc://CLAIM/FOLDER or path:///FOLDER of the image",
            pattern=_SOURCE,
        ),
        replicas=whole(low=1),
        tp={"const": 1, "description": one_device},
        pp={"const": 1, "description": one_device},
        offload={"const": "none", "description": "the code does not offload yet"},
        dtype=text(enum=["auto", "float32", "bfloat16", "float16"]),
        quantize=text("on a CPU", enum=["", "int8", "int4"]),
        accelerator=block(
            kind=text(enum=["cpu", "gpu"]),
            resource=text("what the cluster calls a GPU", minLength=1),
            runtimeClassName=text(),
        ),
        sizeGiB={"type": "number", "exclusiveMinimum": 0, "description": "of the weights"},
        loadMiBPerSecond=whole("of the slowest way to the device", 1),
        download=block(
            "of hf:// sources",
            storage=storage("of the downloaded files"),
            tokenSecret=secret("of the hub"),
        ),
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


def schema() -> Schema:
    """The whole."""
    scheduler, shard = container(SchedulerConfig), container(ShardConfig)
    values = block(
        **{
            "global": free("Helm's own"),
            "nameOverride": text(maxLength=40),
            "fullnameOverride": text(maxLength=40),
            "imagePullSecrets": free("", "array"),
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
            "podMonitor": block(
                enabled=flag(), interval=text(pattern="^[0-9]+(s|m)$"), labels=words()
            ),
            "prometheus": block(address=text("http://…", pattern="^(https?://.+)?$")),
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
