"""Values that must be refused, each with a message that names what is wrong."""

from typing import Any

import helm_python
import pytest

from tests.deploy import chart

_DEMO = {"name": "demo", "source": "path:///app/demo/model"}
_BUCKET = {
    "name": "chat",
    "source": "s3://models/chat/v1",
    "checksum": "sha256:" + "0123456789abcdef" * 4,
}
_GPU = {"accelerator": {"kind": "gpu"}}
_HUB = {"name": "hub", "source": "hf://org/name@0123abc"}


def _models(*models: dict[str, Any]) -> dict[str, Any]:
    return {"models": list(models)}


_POSTGRES = {"kind": "postgresql", "urlSecret": {"name": "db"}}
_REDIS = {"redis": {"urlSecret": {"name": "redis"}}}
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
    ("a bucket without a prefix", _models({**_DEMO, "source": "s3://bucket"}), "source"),
    ("other object storage", _models({**_DEMO, "source": "gs://bucket/model"}), "source"),
    (
        "a bucket without a checksum",
        _models({**_DEMO, "source": "s3://bucket/model"}),
        "models[0] (demo): checksum is empty, but an s3:// prefix has no revision",
    ),
    ("a checksum that is none", _models({**_DEMO, "checksum": "md5:0"}), "checksum"),
    (
        "a bucket that pods can't reach",
        _models(
            {**_BUCKET, "download": {"s3": {"endpointUrl": "http://minio.data.svc:9000"}}},
        ),
        "has port 9000, but networkPolicy.download.port lets pods out to 443",
    ),
    ("hub without a revision", _models({**_DEMO, "source": "hf://org/name"}), "source"),
    ("path upwards", _models({**_DEMO, "source": "path:///app/../etc"}), "source"),
    (
        "tensor parallel",
        _models({**_DEMO, "tp": 4}),
        "models[0] (demo): tp is 4 and pp is 1, but a replica has one device: infermesh has no "
        "tensor or pipeline parallel yet",
    ),
    ("pipeline parallel", _models({**_DEMO, "pp": 2}), "tp is 1 and pp is 2, but a replica"),
    ("no ranks", _models({**_DEMO, "tp": 0}), "/models/0/tp"),
    (
        "parallel for every model",
        {"modelDefaults": {"tp": 2, "pp": 2}},
        "models[0] (demo): tp is 2 and pp is 2",
    ),
    ("offload", _models({**_DEMO, "offload": "cpu"}), 'offload is "cpu", which infermesh does'),
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
        "only hf:// and s3:// sources",
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
    ("Redis' URL for all to see", {"auth": {"redis": {"url": "redis://r"}}}, "url"),
    ("Redis' URL in a setting", {"auth": {"config": {"redis_url": "redis://r"}}}, "redis_url"),
    ("Redis out of reach", {"auth": _REDIS}, "networkPolicy.redis.to is empty"),
    ("SQLite of several with Redis", {"auth": {**_REDIS, "replicas": 2}}, "replicas"),
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
    (
        "a pod that is killed while it drains",
        {"gateway": {"drain": {"terminationSeconds": 30}}},
        "gateway: drain.terminationSeconds is 30; preStopSeconds and graceSeconds, and 5 to end, "
        "are 40",
    ),
    (
        "a replica that is killed while it drains",
        _models({**_DEMO, "drain": {"graceSeconds": 600, "terminationSeconds": 600}}),
        "model-demo: drain.terminationSeconds is 600",
    ),
    (
        "a scrape that outlasts its interval",
        {"monitoring": {"podMonitor": {"interval": "1m", "scrapeTimeout": "90s"}}},
        "scrapeTimeout is 90s, which is more than interval, 1m",
    ),
    ("an interval without a unit", {"monitoring": {"podMonitor": {"interval": "30"}}}, "interval"),
    ("a volume without a name", {"gateway": {"extraVolumes": [{"emptyDir": {}}]}}, "name"),
    ("another kind of service", {"gateway": {"service": {"type": "ExternalName"}}}, "type"),
    (
        "another kind of authentication",
        {"prometheus": {"authentication": {"kind": "Secret"}}},
        "kind",
    ),
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
        {"auth": _REDIS, "networkPolicy": {"redis": {"to": [{"podSelector": {}}]}}},
        _models({**_HUB, "rollout": "surge", "download": {"storage": {"existingClaim": "hub"}}}),
        _models({**_DEMO, "tp": 1, "pp": 1, "offload": "none"}),
        _models({**_BUCKET, "download": {"storage": {"size": "1Gi"}}}),
        {
            **_models(
                {**_BUCKET, "download": {"s3": {"endpointUrl": "http://minio.data.svc:9000"}}}
            ),
            "networkPolicy": {"download": {"port": 9000}},
        },
        _models({**_BUCKET, "download": {"s3": {"endpointUrl": "https://s3.example.com"}}}),
        {"gateway": {"drain": {"terminationSeconds": 40}}},
        {"monitoring": {"podMonitor": {"interval": "1m", "scrapeTimeout": "60s"}}},
        {"nameOverride": "x", "fullnameOverride": "y", "test": {"enabled": False}},
    ],
)
def test_values_beside_them_are_accepted(values: dict[str, Any]) -> None:
    assert chart.manifests(values)
