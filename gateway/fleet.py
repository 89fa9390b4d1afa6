"""All replicas of this gateway: which models they serve, which of them can take a request.

Owns the replica clients. The choice itself is `routing`'s.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from gateway import metrics
from gateway.prompt_blocks import PromptBlocks
from gateway.replica.client import ReplicaClient
from gateway.replica.view import ReplicaState
from gateway.request import Fingerprint
from gateway.router import Router
from gateway.routing import Policy
from gateway.served_model import ServedModel
from infermesh.config import ConfigError
from infermesh.errors import Draining, MeshError, ModelLoading, ModelNotFound, ReplicaUnavailable
from infermesh.security.certificates import Certificates
from infermesh.telemetry import logs

_log = logs.get(__name__)
_RETRY_AFTER_S = 1.0
_TICK_S = 0.05
# With nowhere to go, patience costs a stream less than starting it again.
_SILENCE_WITHOUT_SPARE_S = 10.0
_LEAVING_POLL_S = 1.0


def parse_aliases(pairs: Sequence[str]) -> dict[str, str]:
    """`alias=model` settings.

    Raises:
        ConfigError: one is no such pair.
    """
    aliases = {}
    for pair in pairs:
        alias, separator, model_id = pair.partition("=")
        if not (alias and separator and model_id):
            raise ConfigError(f"gateway.model_aliases has {pair!r}; it must be alias=model")
        aliases[alias] = model_id
    return aliases


class Fleet:
    """The replicas behind this gateway, which come and go.

    Args:
        silence_s: the streams of one that says nothing for so long go on elsewhere.

    Attributes:
        clients: of those that requests may go to. Who is taken from the list lives on until what
            is open there has ended.
        listeners: called at every change, by those who wait for one without a task of their own.
    """

    def __init__(
        self,
        aliases: Mapping[str, str],
        threads: ThreadPoolExecutor,
        policy: Policy,
        silence_s: float,
        certificates: Certificates | None = None,
    ) -> None:
        self._certificates = certificates
        self._silence_s = silence_s
        self._aliases = dict(aliases)
        self._threads = threads
        self._router = Router(policy, threads)
        self._changed = asyncio.Event()
        self.listeners: set[Callable[[], None]] = set()
        # Not running yet; bounded by how many there are.
        self._made: list[ReplicaClient] = []
        self._has_made = asyncio.Event()
        self._leaving: list[ReplicaClient] = []
        self.clients: list[ReplicaClient] = []

    def update(self, addresses: Collection[str]) -> None:
        """These are the replicas from now on."""
        wanted = dict.fromkeys(addresses)
        for client in [one for one in self.clients if one.address not in wanted]:
            _log.info("replica left", extra={"replica": client.address})
            self.clients.remove(client)
            self._leaving.append(client)
            client.leaving.set()
        known = {client.address for client in self.clients}
        for address in wanted:
            if address not in known:
                _log.info("replica found", extra={"replica": address})
                self.clients.append(self._come_back(address) or self._make(address))
        metrics.REPLICAS_KNOWN.set(len(self.clients))
        self._on_change()

    def _come_back(self, address: str) -> ReplicaClient | None:
        for client in self._leaving:
            if client.address == address:
                self._leaving.remove(client)
                client.leaving.clear()
                return client
        return None

    def _make(self, address: str) -> ReplicaClient:
        client = ReplicaClient(address, self._threads, self._on_change, self._certificates)
        self._made.append(client)
        self._has_made.set()
        return client

    async def run(self) -> None:
        """Keeps every replica connected until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                self._has_made.clear()
                while self._made:
                    tasks.create_task(self._keep(self._made.pop()))
                await self._has_made.wait()

    async def _tick(self) -> None:
        """Time makes replicas let more in, or takes them for lost where they are silent."""
        while True:
            await asyncio.sleep(_TICK_S)
            for client in [*self.clients, *self._leaving]:
                patience_s = (
                    self._silence_s if self._has_spare(client) else _SILENCE_WITHOUT_SPARE_S
                )
                client.check_silence(patience_s)
            if any(client.admittance.held_back for client in self.clients):
                self._on_change()

    async def _keep(self, client: ReplicaClient) -> None:
        """Runs a client until it has left and nothing of ours is open there."""
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(client.run())
            await client.leaving.wait()
            while client.num_inflight or not client.leaving.is_set():
                await self.changed(_LEAVING_POLL_S)
                await client.leaving.wait()
            self._leaving.remove(client)
            running.cancel()
        client.forget()

    def models(self) -> list[ServedModel]:
        """Every model served here, one entry per name."""
        found = {c.model.model_id: c.model for c in self.clients if c.model is not None}
        return list(found.values())

    def names(self) -> dict[str, ServedModel]:
        """Every name that a client may ask for."""
        models = {model.model_id: model for model in self.models()}
        aliased = {a: models[target] for a, target in self._aliases.items() if target in models}
        return {**models, **aliased}

    def num_ready(self, model_id: str) -> int:
        """Replicas of a model that can take a request now."""
        return sum(c.routable and _serves(c, model_id) for c in self.clients)

    def resolve(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ModelNotFound: no replica has it, or will have once loaded.
            ModelLoading, ReplicaUnavailable: that is not known yet.
        """
        model_id = self._aliases.get(name, name)
        having = [c for c in self.clients if c.model is not None and _serves(c, model_id)]
        # while replicas with other weights take over, prefer those that answer
        having.sort(key=lambda client: not client.routable)
        if having and having[0].model is not None:
            return having[0].model
        unknown = [c for c in self.clients if c.model is None and _may_serve(c, model_id)]
        if unknown or not self.clients:
            raise _why_not(unknown)
        raise ModelNotFound(
            f"The model `{name}` does not exist or is not served here", param="model"
        )

    def default_model(self) -> ServedModel:
        """The model meant where a request names none: the only one.

        Raises:
            ModelNotFound: there are several.
            ModelLoading, ReplicaUnavailable: there is none yet.
        """
        models = self.models()
        if not models:
            raise _why_not(self.clients)
        if len(models) > 1:
            raise ModelNotFound("model must be named: several are served here", param="model")
        return models[0]

    def pick(
        self,
        fingerprint: Fingerprint,
        excluding: Collection[ReplicaClient] = (),
        prompt: PromptBlocks | None = None,
        resumed: bool = False,
    ) -> ReplicaClient | None:
        """The replica for one request, which is to be sent there; None where none can take it now.

        Args:
            prompt: None: without regard to who holds what.
            resumed: it was promised to a client before.
        """
        able = [
            c
            for c in self._routable(fingerprint)
            if c not in excluding and c.admittance.permits(resumed)
        ]
        able = [c for c in able if c.serving] or able  # at a recovering one it would wait
        replica = self._router.choose(able, prompt)
        if replica is not None:
            replica.admittance.chosen(resumed)
        return replica

    def pick_other(
        self, fingerprint: Fingerprint, replica: ReplicaClient, prompt: PromptBlocks
    ) -> ReplicaClient | None:
        """The replica where an open request of this one would go on at once."""
        down = [c for c in self.clients if not c.serving]
        return self.pick(fingerprint, [replica, *down], prompt, resumed=True)

    async def prepare(self, fingerprint: Fingerprint, prompt: PromptBlocks) -> None:
        """What takes too long for `pick`, which is to follow."""
        await self._router.prepare(self._routable(fingerprint), prompt)

    def _has_spare(self, client: ReplicaClient) -> bool:
        """Another replica could go on with its streams at once."""
        model = client.model
        return model is not None and any(
            other.serving for other in self._routable(model.fingerprint) if other is not client
        )

    def _routable(self, fingerprint: Fingerprint) -> list[ReplicaClient]:
        return [
            client
            for client in self.clients
            if client.routable
            and client.model is not None
            and client.model.fingerprint == fingerprint
        ]

    def attachable(self, fingerprint: Fingerprint) -> list[ReplicaClient]:
        """Replicas of this model that can be asked for a request."""
        return [
            client
            for client in [*self.clients, *self._leaving]
            if client.attachable
            and client.model is not None
            and client.model.fingerprint == fingerprint
        ]

    def why_none(self, fingerprint: Fingerprint) -> MeshError:
        """Why no replica can take a request for this model now."""
        failing = self._routable(fingerprint)
        if failing:
            soonest_s = min(client.admittance.breaker.retry_after_s for client in failing)
            return ReplicaUnavailable(
                "every replica of the model has failed several times of late",
                retry_after_s=max(_RETRY_AFTER_S, soonest_s),
            )
        return _why_not([c for c in self.clients if c.model and c.model.fingerprint == fingerprint])

    def may_return(self, fingerprint: Fingerprint) -> bool:
        """A replica has this model, or had it last, so a stream of it can wait for one."""
        return any(
            client.model is None or client.model.fingerprint == fingerprint
            for client in self.clients
            if client.view.state is not ReplicaState.FAILED
        )

    def why_gone(self, fingerprint: Fingerprint) -> MeshError:
        """Why a stream of this model can't go on."""
        if any(c.model and c.model.fingerprint == fingerprint for c in self.clients):
            return self.why_none(fingerprint)
        return ReplicaUnavailable("the model that began this answer is not served any more")

    async def warm_up(self, timeout_s: float) -> None:
        """Returns once every replica can take requests, or after a while."""
        try:
            async with asyncio.timeout(timeout_s):
                # none: names and file have not been looked at yet
                while not (self.clients and all(client.routable for client in self.clients)):
                    await self._changed.wait()
        except TimeoutError:
            pass

    async def changed(self, timeout_s: float) -> None:
        """Returns when any replica changed, or after a while."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _on_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in list(self.listeners):
            listener()


def _serves(client: ReplicaClient, model_id: str) -> bool:
    return client.model is not None and client.model.model_id == model_id


def _may_serve(client: ReplicaClient, model_id: str) -> bool:
    return client.view.model_id in (None, model_id)


def _why_not(clients: Sequence[ReplicaClient]) -> MeshError:
    states = {client.view.state for client in clients}
    for client in clients:
        error = client.view.error or (client.error if client.model is None else None)
        if error is not None and client.view.state is not ReplicaState.LOADING:
            return ReplicaUnavailable(f"the model can't be served: {error.message}")
    reachable = {ReplicaState.SERVING, ReplicaState.RECOVERING}
    fetching = any(c.model is None and c.view.state in reachable for c in clients)
    if ReplicaState.LOADING in states or fetching:
        return ModelLoading("the model is being loaded", retry_after_s=_RETRY_AFTER_S)
    if ReplicaState.DRAINING in states:
        return Draining("every replica of the model is shutting down", retry_after_s=_RETRY_AFTER_S)
    return ReplicaUnavailable(
        "no replica of the model can be reached", retry_after_s=_RETRY_AFTER_S
    )
