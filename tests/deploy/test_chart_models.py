"""Where a model comes from: what fetches and checks it, and who has the secrets for that."""

from typing import Any

import pytest
import yaml

from infermesh import config_load
from services.shard.fetch import __main__ as fetch
from tests.deploy import chart

_SUM = "sha256:" + "0123456789abcdef" * 4
_HUB = {"name": "chat", "source": "hf://org/chat@v1", "sizeGiB": 10}
_BUCKET = {"name": "chat", "source": "s3://models/chat/v1", "checksum": _SUM}
_NAME = "infermesh-model-chat"


def replica(model: dict[str, Any], kind: str = "StatefulSet") -> dict[str, Any]:
    objects = chart.manifests({"models": [model]})
    found: dict[str, Any] = chart.of_kind(objects, kind)[_NAME]["spec"]
    return found


def opened(model: dict[str, Any]) -> str:
    """What the scheduler's settings say that the shard shall open."""
    maps = chart.of_kind(chart.manifests({"models": [model]}), "ConfigMap")
    text = maps[_NAME]["data"]["scheduler.toml"]
    (line,) = [one for one in text.splitlines() if one.startswith("model =")]
    return line.split('"')[1]


@pytest.mark.parametrize(
    ("source", "checksum", "folder"),
    [
        ("hf://org/chat@v1", "", "/models/org--chat@v1"),
        ("hf://org/chat@refs/pr/1", "", "/models/org--chat@refs--pr--1"),
        ("hf://org/chat@v1", _SUM, "/models/org--chat@v1-0123456789ab"),
        ("s3://models/chat/v1", _SUM, "/models/models--chat--v1-0123456789ab"),
        ("pvc://claim/chat", "", "/models/chat"),
        ("pvc://claim", _SUM, "/models"),
        ("path:///app/demo/model", _SUM, "/app/demo/model"),
    ],
)
def test_the_shard_opens_the_folder_that_is_fetched_or_checked(
    source: str, checksum: str, folder: str
) -> None:
    model = {"name": "chat", "source": source, "checksum": checksum}
    spec = replica(model)["template"]["spec"]

    assert opened(model) == folder
    for container in spec.get("initContainers", ()):
        flags = fetch._parse(container["args"])
        assert str(flags.folder) == folder
        assert flags.source == (source if source.startswith(("hf", "s3")) else "")
        assert flags.checksum == checksum
    assert bool(spec.get("initContainers")) is (source.startswith("hf") or bool(checksum))


@pytest.mark.parametrize("model", [_HUB, _BUCKET], ids=["hub", "bucket"])
def test_what_is_fetched_is_written_by_the_fetcher_alone(model: dict[str, Any]) -> None:
    spec = replica(model)["template"]["spec"]
    (fetcher,) = spec["initContainers"]
    (shard,) = [one for one in spec["containers"] if one["name"] == "shard"]

    assert {"name": "model", "mountPath": "/models"} in fetcher["volumeMounts"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in shard["volumeMounts"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in shard["env"]


def test_secrets_of_a_source_are_the_fetchers_alone() -> None:
    token = {"tokenSecret": {"name": "hub-token", "key": "token"}}
    bucket = {"s3": {"credentialsSecret": "bucket-key"}}

    for model in ({**_HUB, "download": token}, {**_BUCKET, "download": bucket}):
        spec = replica(model)["template"]["spec"]
        (fetcher,) = spec["initContainers"]
        wanted = "hub-token" if model["source"].startswith("hf") else "bucket-key"
        assert wanted in yaml.safe_dump(fetcher)
        assert wanted not in yaml.safe_dump(spec["containers"])


def test_a_bucket_elsewhere_is_named_as_awss_libraries_want_it() -> None:
    s3 = {"endpointUrl": "https://s3.example.com", "region": "eu-central-1"}
    (fetcher,) = replica({**_BUCKET, "download": {"s3": s3}})["template"]["spec"]["initContainers"]

    environment = {one["name"]: one["value"] for one in fetcher["env"]}
    assert environment == {
        "AWS_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL_S3": "https://s3.example.com",
    }


@pytest.mark.parametrize(
    ("storage", "volume", "claims"),
    [
        ({}, {"name": "model", "emptyDir": {}}, 0),
        ({"size": "20Gi"}, None, 1),
        (
            {"existingClaim": "all"},
            {"name": "model", "persistentVolumeClaim": {"claimName": "all"}},
            0,
        ),
    ],
    ids=["of the pod", "of the replica", "of all replicas"],
)
def test_files_are_on_the_volume_that_was_asked_for(
    storage: dict[str, str], volume: dict[str, Any] | None, claims: int
) -> None:
    spec = replica({**_BUCKET, "download": {"storage": storage}})
    volumes = [one for one in spec["template"]["spec"]["volumes"] if one["name"] == "model"]

    assert volumes == ([volume] if volume else [])
    assert len(spec.get("volumeClaimTemplates", ())) == claims


def test_a_rollout_waits_for_the_download_and_a_start_does_not() -> None:
    shared = {"storage": {"existingClaim": "all"}, "minMiBPerSecond": 10}
    fetched = {**_HUB, "rollout": "surge", "download": shared, "loadMiBPerSecond": 1024}
    spec = replica(fetched, "Deployment")
    (scheduler,) = [
        one for one in spec["template"]["spec"]["containers"] if one["name"] == "scheduler"
    ]
    probe = scheduler["startupProbe"]

    start_s = 120 + 10
    assert probe["failureThreshold"] * probe["periodSeconds"] == start_s
    assert spec["progressDeadlineSeconds"] == start_s + 600 + 1024


def test_policies_let_out_who_fetches_and_nobody_else() -> None:
    to = [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    values = {"networkPolicy": {"download": {"to": to, "port": 9000}}}

    def egress(model: dict[str, Any]) -> list[dict[str, Any]]:
        objects = chart.manifests({**values, "models": [model]})
        found: list[dict[str, Any]] = chart.of_kind(objects, "NetworkPolicy")[_NAME]["spec"][
            "egress"
        ]
        return found

    assert egress(_HUB)[1:] == [{"ports": [{"port": 9000, "protocol": "TCP"}], "to": to}]
    assert egress(_BUCKET)[1:] == egress(_HUB)[1:]
    assert egress({"name": "chat", "source": "pvc://claim", "checksum": _SUM}) == []


def test_a_scheduler_reads_the_folders_name(tmp_path: Any) -> None:
    maps = chart.of_kind(chart.manifests({"models": [_BUCKET]}), "ConfigMap")
    file = tmp_path / "scheduler.toml"
    file.write_text(maps[_NAME]["data"]["scheduler.toml"])

    scheduler = config_load.load(["--config", str(file)], {}).scheduler

    assert scheduler.model == "/models/models--chat--v1-0123456789ab"
    assert scheduler.model_id == "chat"
