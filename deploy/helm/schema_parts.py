"""The pieces of which values.schema.json is made: kinds of values, and what all pods have.

The `config` of a component is made from the settings of `infermesh.config`, so that a setting that
the code does not have, or a value that it would refuse, is refused before anything is installed.
"""

import dataclasses
import typing
from typing import Any

from infermesh.config import AuthConfig, CacheConfig, GatewayConfig, SchedulerConfig, ShardConfig

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
            "redis_url",
            *("jwt_keys_file", "jwt_issuer", "jwt_audience"),
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
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


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


def named(doc: str) -> Schema:
    """A list of Kubernetes' own things that have names."""
    return _with(doc, {"type": "array", "items": {"type": "object", "required": ["name"]}})


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
        "extraEnv": named("more environment; secrets by valueFrom.secretKeyRef"),
        "extraEnvFrom": free("whole ConfigMaps and Secrets as environment", "array"),
        "extraVolumeMounts": named("of the pod's extraVolumes"),
        "config": config(section),
    }


def pod() -> dict[str, Schema]:
    """What every pod has."""
    return {
        "drain": block(
            preStopSeconds=whole("still serves while it leaves the lists of addresses", 1),
            graceSeconds=whole("to finish what runs", 0),
            terminationSeconds=whole("all of its time to end; 0: their sum, and 10"),
        ),
        "podDisruptionBudget": block(enabled=flag(), maxUnavailable=whole(low=1)),
        "serviceAccount": block(
            "no token is mounted", create=flag(), name=text(), annotations=words()
        ),
        "annotations": words("of the Deployment or StatefulSet"),
        "podAnnotations": words(),
        "podLabels": words(),
        "nodeSelector": words(),
        "tolerations": free("", "array"),
        "affinity": free(""),
        "topologySpreadConstraints": free("labelSelector: by default the component's", "array"),
        "priorityClassName": text(),
        "extraVolumes": named("of any kind that the restricted Pod Security Standard allows"),
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
        behavior=free("of the HorizontalPodAutoscaler"),
        **targets,
    )
