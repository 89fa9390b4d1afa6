"""Runs rendered pods as processes of this machine, as a kubelet would: probes, budgets, SIGTERM."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy import chart
from tests.deploy.rendered_pods import Manifest, Namespace, Pod, make_pods

# What stands for an image that was not built: the checkout, and this Python's packages.
_CHECKOUT = {
    "/app": chart.ROOT,
    "/opt/infermesh/kernels": Path("~/.cache/infermesh/kernels").expanduser(),
}
_POLL_S = 0.1
_TEST_S = 180.0


class NeverReady(Exception):
    """A container ended, or its startup probe used up its budget."""


@dataclass
class Container:
    """A process, and how it is asked for its health.

    Attributes:
        run: runs a command beside it.
    """

    pod: Pod
    manifest: Manifest
    process: subprocess.Popen[bytes]
    log: Path
    run: Callable[[list[str]], subprocess.CompletedProcess[str]]

    @property
    def name(self) -> str:
        return f"{self.pod.name}/{self.manifest['name']}"

    def passes(self, kind: str) -> bool:
        """Sends one probe."""
        probe = self.manifest[kind]
        if "exec" in probe:
            return self.run(probe["exec"]["command"]).returncode == 0
        get = probe["httpGet"]
        try:
            port = self.pod.port(get["port"], [self.manifest])
            url = f"http://{self.pod.address}:{port}{get['path']}"
            with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as answer:
                return bool(200 <= answer.status < 400)
        except (KeyError, OSError, urllib.error.URLError):
            return False

    def wait_started(self) -> None:
        """Raises NeverReady, with what it wrote."""
        probe = self.manifest["startupProbe"]
        budget_s = probe["periodSeconds"] * probe["failureThreshold"]
        deadline = time.monotonic() + budget_s
        while not self.passes("startupProbe"):
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                why = f"ended with {status}" if status is not None else f"not up in {budget_s} s"
                raise NeverReady(f"{self.name} {why}: {self.log.read_text()[-2000:]}")
            time.sleep(_POLL_S)  # as a kubelet does, which nobody tells


class LocalCluster:
    """A release of rendered objects. A block of it ends with everything stopped.

    Args:
        objects: what the chart rendered.
        secrets: contents of the Secrets that are there before the release.
        only: the owners whose pods are started; None: all.
        shared: volumes that pods have in common.
    """

    def __init__(
        self,
        objects: list[Manifest],
        secrets: dict[str, dict[str, str]] | None = None,
        only: tuple[str, ...] | None = None,
        shared: frozenset[str] = frozenset(),
    ) -> None:
        # short, for the sockets' paths
        self._scratch = tempfile.TemporaryDirectory(prefix="im-", ignore_cleanup_errors=True)
        self.folder = Path(self._scratch.name)
        subnet = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        pods = make_pods(objects, self.folder, subnet)
        self.namespace = Namespace(objects, pods, secrets or {}, _CHECKOUT, shared)
        self._only = only
        self.home = self.folder / "home"
        self.home.mkdir()
        self.containers: list[Container] = []
        # what init containers wrote
        self.said: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            for pod in self.namespace.pods:
                if self._only is None or pod.owner in self._only:
                    self.containers += self.start(pod)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._scratch.cleanup()

    def start(self, pod: Pod) -> list[Container]:
        """A process for each container of a pod, after its init containers. Raises NeverReady."""
        for one in pod.init_containers:
            done = self._run(pod, one)
            self.said[f"{pod.name}/{one['name']}"] = done.stdout + done.stderr
            if done.returncode:
                raise NeverReady(f"{pod.name}/{one['name']} failed: {done.stderr}")
        return [self._start(pod, one) for one in pod.containers]

    def beside(self, objects: list[Manifest], owner: str) -> LocalCluster:
        """Other objects, of which one owner's pods are started; the rest is this release's."""
        other = LocalCluster(objects, self.namespace.secrets, only=(owner,))
        own = [pod for pod in other.namespace.pods if pod.owner == owner]
        rest = [pod for pod in self.namespace.pods if pod.owner != owner]
        other.namespace.pods = [*own, *rest]
        return other

    def run(self, pod: Pod, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A command in a pod's first container, as `kubectl exec` runs it."""
        return self._run(pod, {**pod.containers[0], "command": command, "args": []})

    def wait_ready(self) -> None:
        """Until every startup and readiness probe has passed. Raises NeverReady."""
        for container in self.containers:
            container.wait_started()
        for container in self.containers:
            while not container.passes("readinessProbe"):
                if container.process.poll() is not None:
                    raise NeverReady(f"{container.name} ended")
                time.sleep(_POLL_S)  # as above

    def run_job(self, name: str) -> subprocess.CompletedProcess[str]:
        """A Job's pod, to its end."""
        template = chart.of_kind(self.namespace.objects, "Job")[name]["spec"]["template"]
        pod = Pod(name, f"Job/{name}", template, "127.0.0.1", "127.0.0.1", self.folder / "j")
        (container,) = pod.containers
        return self._run(pod, container)

    def run_test(self, test: Manifest | None = None) -> subprocess.CompletedProcess[str]:
        """What `helm test` runs; another one in its place, if given."""
        (own,) = [one for one in self.namespace.objects if one["kind"] == "Pod"]
        pod = Pod("test", "Pod/test", test or own, "127.0.0.1", "127.0.0.1", self.folder / "t")
        (container,) = pod.containers
        return self._run(pod, container)

    def _run(self, pod: Pod, container: Manifest) -> subprocess.CompletedProcess[str]:
        started = self.namespace.container(pod, container)
        return subprocess.run(
            started.command,
            env=self._environment(started.environment, pod),
            cwd=chart.ROOT,
            capture_output=True,
            text=True,
            timeout=_TEST_S,
            check=False,
        )

    def stop(self) -> dict[str, int]:
        """SIGTERM to all; the exit statuses. Whoever outlives its pod's time is killed."""
        for container in self.containers:
            container.process.send_signal(signal.SIGTERM)
        ended = {}
        for container in self.containers:
            grace_s = container.pod.manifest["spec"]["terminationGracePeriodSeconds"]
            try:
                ended[container.name] = container.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                container.process.kill()
                ended[container.name] = container.process.wait()
        self.containers.clear()
        return ended

    def _start(self, pod: Pod, container: Manifest) -> Container:
        started = self.namespace.container(pod, container)
        log = pod.folder / f"{container['name']}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                started.command,
                env=self._environment(started.environment, pod),
                cwd=chart.ROOT,
                stdout=out,
                stderr=out,
            )

        def run(command: list[str]) -> subprocess.CompletedProcess[str]:
            return self._run(pod, {**container, "command": command, "args": []})

        return Container(pod, container, process, log, run)

    def _environment(self, own: dict[str, str], pod: Pod) -> dict[str, str]:
        """The container's, and of this machine's what Python needs; home is not to be written."""
        temporary = pod.folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        fixed = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(chart.ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.home),
            "TMPDIR": str(temporary),
        }
        return {**fixed, **own}
