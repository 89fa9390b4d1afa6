"""What a cluster would make of rendered pods, on this machine: pure, starts nothing.

Every pod has a loopback address of its own, every volume a folder. A container's command, settings
and environment stay as the chart wrote them, but for these: where it names a mount, it is given the
folder; where it names a service, the addresses of the pods that the service selects; 0.0.0.0 is
the pod's address. What the chart got wrong is not found here, and stays wrong.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy import chart

Manifest = dict[str, Any]
_TOLD = frozenset({"model"})


@dataclass
class Pod:
    """One pod that a controller would make.

    Attributes:
        address, inner: its own, and what 127.0.0.1 is inside of it.
        folder: of its volumes.
    """

    name: str
    owner: str
    manifest: Manifest
    address: str
    inner: str
    folder: Path

    @property
    def labels(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.manifest["metadata"]["labels"]
        return found

    @property
    def containers(self) -> list[Manifest]:
        found: list[Manifest] = self.manifest["spec"]["containers"]
        return found

    @property
    def init_containers(self) -> list[Manifest]:
        found: list[Manifest] = self.manifest["spec"].get("initContainers", [])
        return found

    def port(self, wanted: int | str, containers: Sequence[Manifest]) -> int:
        """A port by its number or name. Raises KeyError where no container has it."""
        if isinstance(wanted, int):
            return wanted
        named = {p["name"]: p["containerPort"] for c in containers for p in c.get("ports", ())}
        found: int = named[wanted]
        return found


@dataclass
class Started:
    """What to start for a container."""

    name: str
    command: list[str]
    environment: dict[str, str]


@dataclass
class Namespace:
    """The objects of a release, and the pods that they make."""

    objects: list[Manifest]
    pods: list[Pod] = field(default_factory=list)
    # contents of Secrets that the chart expects to be there, or that a controller would make
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    # folders of the images, by their paths
    image: dict[str, Path] = field(default_factory=dict)
    # volumes that pods have in common
    shared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, one in chart.of_kind(self.objects, "Secret").items():
            data = {k: base64.b64decode(v).decode() for k, v in one["data"].items()}
            self.secrets.setdefault(name, data)

    def container(self, pod: Pod, container: Manifest) -> Started:
        """Its files are written; its command and environment as they would be."""
        mounts = self._mount(pod, container)
        rewrite = self._rewriter(pod, mounts)
        environment = {
            one["name"]: rewrite(one["value"]) if "value" in one else self._looked_up(pod, one)
            for one in container.get("env", ())
        }
        for one in container.get("envFrom", ()):
            environment |= self.secrets[one["secretRef"]["name"]]
        if pod.manifest["spec"].get("enableServiceLinks", True):
            environment |= self._links()
        words = [*container["command"], *container.get("args", ())]
        expanded = [re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], word) for word in words]
        return Started(container["name"], [rewrite(word) for word in expanded], environment)

    def _mount(self, pod: Pod, container: Manifest) -> dict[str, Path]:
        """Path in the container to folder here."""
        volumes = {one["name"]: one for one in pod.manifest["spec"].get("volumes", ())}
        found: dict[str, Path] = {}
        for mount in container.get("volumeMounts", ()):
            volume = volumes.get(mount["name"], {"emptyDir": {}})  # else: of a claim template
            folder = self._folder(pod, mount["name"])
            if "configMap" in volume or "secret" in volume:
                folder = pod.folder / f"{container['name']}-{mount['name']}"
            folder.mkdir(parents=True, exist_ok=True)
            found[mount["mountPath"]] = folder
        found = {**self._told(pod), **found}
        rewrite = self._rewriter(pod, found)
        for mount in container.get("volumeMounts", ()):
            for name, text in self._files(volumes.get(mount["name"], {})).items():
                (found[mount["mountPath"]] / name).write_text(rewrite(text))
        return found

    def _told(self, pod: Pod) -> dict[str, Path]:
        """Mounts that one container names to another: a scheduler tells its shard the model."""
        mounts = [m for one in pod.containers for m in one.get("volumeMounts", ())]
        return {m["mountPath"]: self._folder(pod, m["name"]) for m in mounts if m["name"] in _TOLD}

    def _folder(self, pod: Pod, volume: str) -> Path:
        if volume in self.shared:
            return pod.folder.parent / "shared" / volume
        return pod.folder / volume

    def _files(self, volume: Manifest) -> dict[str, str]:
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            data: dict[str, str] = chart.of_kind(self.objects, "ConfigMap")[name]["data"]
            return data
        if "secret" in volume:
            secret = self.secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items")
            return {i["path"]: secret[i["key"]] for i in items} if items else secret
        return {}

    def _looked_up(self, pod: Pod, variable: Manifest) -> str:
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            ref = source["secretKeyRef"]
            return self.secrets[ref["name"]][ref["key"]]
        fields = {"metadata.name": pod.name, "status.podIP": pod.address}
        return fields[source["fieldRef"]["fieldPath"]]

    def _links(self) -> dict[str, str]:
        """As a kubelet sets them for every service of the namespace."""
        names = (name.upper().replace("-", "_") for name in chart.of_kind(self.objects, "Service"))
        return {f"{name}_SERVICE_HOST": "10.0.0.1" for name in names}

    def _rewriter(self, pod: Pod, mounts: Mapping[str, Path]) -> Callable[[str], str]:
        folders = {**self.image, **mounts}
        by_length = sorted(folders, key=len, reverse=True)
        paths = "|".join(map(re.escape, by_length))
        path = re.compile(rf"(?<![\w.-])({paths})(?![\w.-])")
        services = chart.of_kind(self.objects, "Service")
        names = "|".join(map(re.escape, sorted(services, key=len, reverse=True)))
        domain = rf"(?:\.{chart.NAMESPACE}(?:\.svc(?:\.cluster\.local)?)?)?"
        host = re.compile(rf'"dns:({names}){domain}:(\d+)"|(?<![\w.-])({names}){domain}:(\d+)')

        def address(match: re.Match[str]) -> str:
            if match[1]:
                return ", ".join(f'"dns:{a}"' for a in self.reached(services[match[1]], match[2]))
            return self.reached(services[match[3]], match[4])[0]

        def rewrite(text: str) -> str:
            text = path.sub(lambda match: str(folders[match[1]]), text)
            text = text.replace("127.0.0.1", pod.inner).replace("0.0.0.0", pod.address)
            return host.sub(address, text)

        return rewrite

    def reached(self, service: Manifest, port: str) -> list[str]:
        """The addresses behind a service's port; of a port that it does not have, nobody's."""
        chosen = [p for p in self.pods if service["spec"]["selector"].items() <= p.labels.items()]
        if service["spec"].get("clusterIP") == "None":  # DNS gives addresses; ports stay
            return [f"{pod.address}:{port}" for pod in chosen] or [f"127.255.255.1:{port}"]
        targets = {str(one["port"]): one["targetPort"] for one in service["spec"]["ports"]}
        if port not in targets or not chosen:
            return [f"127.255.255.1:{port}"]
        return [f"{pod.address}:{pod.port(targets[port], pod.containers)}" for pod in chosen]


def make_pods(objects: list[Manifest], folder: Path, subnet: str) -> list[Pod]:
    """Those of every Deployment and StatefulSet, and no others."""
    found: list[Pod] = []
    for one in objects:
        if one["kind"] not in ("Deployment", "StatefulSet"):
            continue
        for index in range(one["spec"].get("replicas", 1)):
            number = len(found) + 1
            found.append(
                Pod(
                    name=f"{one['metadata']['name']}-{index}",
                    owner=f"{one['kind']}/{one['metadata']['name']}",
                    manifest=one["spec"]["template"],
                    address=f"{subnet}.{number}",
                    inner=f"{subnet}.{number + 100}",
                    folder=folder / f"p{number}",
                )
            )
    return found
