"""Values that must be refused, each with a message that names what is wrong."""

from typing import Any

import helm_python
import pytest

from tests.deploy import chart

_DEMO = {"name": "demo", "source": "path:///app/demo/model"}
_GPU = {"accelerator": {"kind": "gpu"}}
_HUB = {"name": "hub", "source": "hf://org/name@0123abc"}


def _models(*models: dict[str, Any]) -> dict[str, Any]:
    return {"models": list(models)}


_POSTGRES = {"kind": "postgresql", "urlSecret": {"name": "db"}}
_TO = {"networkPolicy": {"database": {"to": [{"podSelector": {}}]}}}
_PROMETHEUS = {"prometheus": {"address": "http://prometheus:9090"}}
_SCALED = {"enabled": True, "minReplicas": 4, "maxReplicas": 2}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key", {"gatway": {}}, "gatway"),
    ("unknown key in a block", {"gateway": {"replica": 2}}, "replica"),
    ("unknown setting", {"gateway": {"config": {"keep_alive_s": 5}}}, "keep_alive_s"),
    ("setting of the chart's own", {"gateway": {"config": {"http_address": "0.0.0.0:1"}}}, "http_"),
    ("setting out of range", {"shard": {"config": {"stall_s": 0}}}, "stall_s"),
    ("setting of another kind", {"gateway": {"config": {"keepalive_s": "5"}}}, "keepalive_s"),
    ("setting with another word", {"gateway": {"config": {"routing": "random"}}}, "routing"),
    ("no gateway", {"gateway": {"replicas": 0}}, "replicas"),
    ("no model", {"models": []}, "models"),
    ("model without a source", _models({"name": "demo"}), "source"),
    ("model name that is no label", _models({**_DEMO, "name": "Qwen/2.5"}), "name"),
    ("models of one name", _models(_DEMO, _DEMO), "models[1] (demo): another model has this name"),
    (
        "models of one id",
        _models(_DEMO, {**_DEMO, "name": "again", "modelId": "demo"}),
        'another model has the modelId "demo"',
    ),
    ("object storage", _models({**_DEMO, "source": "s3://bucket/model"}), "source"),
    ("hub without a revision", _models({**_DEMO, "source": "hf://org/name"}), "source"),
    ("path upwards", _models({**_DEMO, "source": "path:///app/../etc"}), "source"),
    ("tensor parallel", _models({**_DEMO, "tp": 4}), "/models/0/tp"),
    ("pipeline parallel", _models({**_DEMO, "pp": 2}), "/models/0/pp"),
    ("offload", _models({**_DEMO, "offload": "cpu"}), "/models/0/offload"),
    ("unknown quantization", _models({**_DEMO, "quantize": "int2"}), "quantize"),
    (
        "quantization on a GPU",
        _models({**_DEMO, **_GPU, "quantize": "int8"}),
        "models[0] (demo): quantize",
    ),
    (
        "quantization and determinism",
        _models({**_DEMO, "quantize": "int8", "shard": {"config": {"deterministic": True}}}),
        "not deterministic",
    ),
    (
        "determinism on a GPU",
        _models({**_DEMO, **_GPU, "shard": {"config": {"deterministic": True}}}),
        "works on a CPU alone",
    ),
    (
        "a download of what is not downloaded",
        _models({**_DEMO, "download": {"storage": {"size": "1Gi"}}}),
        "only hf:// sources",
    ),
    (
        "a volume per pod that surges",
        _models({**_HUB, "rollout": "surge", "download": {"storage": {"size": "1Gi"}}}),
        "rollout is surge",
    ),
    ("SQLite of several", {"auth": {"replicas": 2}}, "replicas"),
    (
        "SQLite without a volume",
        {"auth": {"database": {"storage": {"size": ""}}}},
        "auth.database.storage is empty",
    ),
    (
        "PostgreSQL without a URL",
        {"auth": {"database": {"kind": "postgresql"}}, **_TO},
        "urlSecret",
    ),
    ("PostgreSQL out of reach", {"auth": {"database": _POSTGRES}}, "networkPolicy.database.to"),
    ("another database", {"auth": {"database": {"kind": "mysql"}}}, "kind"),
    ("Redis' password in the open", {"auth": {"redis": {"url": "redis://:p@r"}}}, "redis"),
    ("the same as a setting", {"auth": {"config": {"redis_url": "redis://:p@r"}}}, "redis_url"),
    (
        "Redis out of reach",
        {"auth": {"redis": {"urlSecret": {"name": "r"}}}},
        "networkPolicy.redis.to",
    ),
    ("several caches", {"cache": {"replicas": 2}}, "replicas"),
    (
        "scaling without Prometheus",
        {"gateway": {"autoscaling": {"enabled": True}}},
        "prometheus.address is empty",
    ),
    (
        "scaling of gateways upside down",
        {"gateway": {"autoscaling": _SCALED}, **_PROMETHEUS},
        "gateway.autoscaling: minReplicas is 4",
    ),
    (
        "scaling of a model upside down",
        {**_models({**_DEMO, "autoscaling": _SCALED}), **_PROMETHEUS},
        "autoscaling.minReplicas is 4",
    ),
    ("scaling by CPU", {"gateway": {"autoscaling": {"targetCPU": 80}}}, "targetCPU"),
    ("certificates that are missing", {"tls": {"mode": "secrets"}}, "tls.secrets."),
    ("an Ingress without a host", {"ingress": {"enabled": True}}, "host"),
    ("routes without a Gateway", {"gatewayApi": {"enabled": True}}, "parentRefs"),
    ("a digest that is none", {"gateway": {"image": {"digest": "latest"}}}, "digest"),
    ("a security context", {"gateway": {"securityContext": {"privileged": True}}}, "securityCont"),
]


@pytest.mark.parametrize(
    ("values", "said"), [one[1:] for one in REFUSED], ids=[o[0] for o in REFUSED]
)
def test_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        chart.texts(values)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"auth": {"enabled": False}, "cache": {"enabled": False}},
        {"auth": {"database": _POSTGRES, "replicas": 3}, **_TO},
        _models({**_HUB, "rollout": "surge", "download": {"storage": {"existingClaim": "hub"}}}),
        _models({**_DEMO, "tp": 1, "pp": 1, "offload": "none"}),
        {"nameOverride": "x", "fullnameOverride": "y", "test": {"enabled": False}},
    ],
)
def test_values_beside_them_are_accepted(values: dict[str, Any]) -> None:
    assert chart.manifests(values)
