"""All replicas of this gateway: which models they serve, which of them can take a request.

Owns the replica clients. The choice itself is `routing`'s.
"""

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from gateway.replica.client import ReplicaClient
from gateway.replica.view import ReplicaState
from gateway.request import Fingerprint
from gateway.routing import choose
from gateway.served_model import ServedModel
from infermesh.config import ConfigError
from infermesh.errors import Draining, MeshError, ModelLoading, ModelNotFound, ReplicaUnavailable

_RETRY_AFTER_S = 1.0


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
    """The replicas behind this gateway."""

    def __init__(
        self, addresses: Sequence[str], aliases: Mapping[str, str], threads: ThreadPoolExecutor
    ) -> None:
        self._aliases = dict(aliases)
        self._changed = asyncio.Event()
        self.clients = [ReplicaClient(a, threads, self._on_change) for a in addresses]

    async def run(self) -> None:
        """Keeps every replica connected until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for client in self.clients:
                tasks.create_task(client.run())

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
        self, fingerprint: Fingerprint, excluding: Collection[ReplicaClient] = ()
    ) -> ReplicaClient | None:
        """The replica for one request; None where none can take it now."""
        pairs = [
            (client, client.candidate())
            for client in self.clients
            if client.routable
            and client.model is not None
            and client.model.fingerprint == fingerprint
            and client not in excluding
        ]
        chosen = choose([candidate for _, candidate in pairs], random.randrange)
        # by identity: nothing keeps two schedulers from reporting the same id
        return next((client for client, candidate in pairs if candidate is chosen), None)

    def why_none(self, fingerprint: Fingerprint) -> MeshError:
        """Why no replica can take a request for this model now."""
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
