"""The gateway as a service: builds its parts, starts them in order, drains them in reverse."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from gateway.auth.gate import Gate, OpenGate
from gateway.auth.keyed_gate import KeyedGate
from gateway.cache.client import CacheClient
from gateway.cache.stage import CacheStage
from gateway.discovery import Discovery
from gateway.embeddings import Embeddings
from gateway.fleet import Fleet, parse_aliases
from gateway.grpc.servicer import SERVICE_NAME, InferenceServicer
from gateway.http.admin import admin_app
from gateway.http.app import public_app
from gateway.http.serve import HttpServer
from gateway.pipeline import Pipeline
from gateway.routing import Policy
from infermesh import rpc
from infermesh.config import GatewayConfig
from infermesh.errors import Draining
from infermesh.security.posture import LOCAL, Security
from infermesh.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server

_TOKENIZER_THREADS = 2
# After the grace period, time for clients to read that their answer was cut.
_LAST_WORDS_S = 1.0
_STOP_S = 2.0
_LAST_USAGE_S = 2.0
_ADDRESSES = ("http_address", "admin_address", "grpc_address")


class GatewayService:
    """One gateway process.

    Raises:
        ConfigError: it would be reachable from other machines, or a setting can't be used.
    """

    name = "gateway"

    def __init__(self, config: GatewayConfig, security: Security = LOCAL) -> None:
        check_addresses(config, security)
        self._config = config
        self._security = security
        certificates = security.certificates
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        aliases = parse_aliases(config.model_aliases)
        policy = Policy(config.routing)
        self.fleet = Fleet(aliases, self._threads, policy, config.replica_silence_s, certificates)
        self._discovery = Discovery(
            config.replicas,
            config.replicas_file,
            config.discovery_interval_s,
            self.fleet.update,
            refuse=lambda addresses: security.check_peers("gateway.replicas", addresses),
        )
        # the loop's own clock has steps of a millisecond
        self.cache = (
            CacheClient(config.cache, time.monotonic, certificates) if config.cache else None
        )
        self._http: list[HttpServer] = []
        self._http_tasks: list[asyncio.Task[None]] = []
        self._tasks: asyncio.TaskGroup
        self._grpc: grpc.aio.Server | None = None
        self._health: rpc.HealthHandle | None = None
        self._addresses: dict[str, str] = {}
        # loop-bound, and it may refuse a setting
        self._gate: Gate = (
            KeyedGate(
                config,
                time.monotonic,
                certificates,
                lambda addresses: security.check_peers("gateway.auth", addresses),
            )
            if config.auth
            else OpenGate()
        )
        self.pipeline: Pipeline

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Serves at once: replicas that are not ready are answered for with 503."""
        config = self._config
        self._tasks = tasks
        tasks.create_task(self.fleet.run())
        tasks.create_task(self._discovery.run())
        self._gate.start(tasks)
        if self.cache is not None:
            tasks.create_task(self.cache.run())
        await self.fleet.warm_up(config.warm_up_s)
        stage = CacheStage(self.cache, config, self._threads, time.monotonic)
        self.pipeline = Pipeline(
            config, self.fleet, self._gate, stage, tasks.create_task, time.monotonic
        )
        tasks.create_task(self.pipeline.resumption.run())
        embeddings = Embeddings(self.cache, self.pipeline, config.request_timeout_s)
        public = HttpServer(
            public_app(self.pipeline, embeddings, config),
            "gateway.http_address",
            config.http_address,
        )
        self._http.append(public)
        admin = HttpServer(
            admin_app(self.pipeline, self.cache), "gateway.admin_address", config.admin_address
        )
        self._http.append(admin)
        self._grpc = rpc.create_server(
            write_timeout_s=config.write_timeout_s, reuse_port=config.grpc_reuse_port
        )
        servicer = InferenceServicer(self.pipeline, embeddings, config.default_max_tokens or None)
        add_InferenceServiceServicer_to_server(servicer, self._grpc)
        self._health = rpc.add_standard_services(self._grpc, [SERVICE_NAME])
        grpc_address = rpc.bind(self._grpc, config.grpc_address)
        self._addresses = {
            "address": public.address,
            "http_address": public.address,
            "admin_address": admin.address,
            "grpc_address": grpc_address,
        }
        await self._grpc.start()
        await self._health.set_serving(True)
        self._http_tasks = [tasks.create_task(server.run()) for server in self._http]
        for server in self._http:
            await server.started()
        self._report()

    async def drain(self, grace_s: float) -> None:
        """Answers under way finish, or are told that they can't. Who is connected may still ask for
        a moment and goes elsewhere then; what comes later gets 503.
        """
        self.pipeline.admission.close_soon()
        self.pipeline.hand_over()
        if self._health is not None:
            await self._health.set_serving(False)
        if self._grpc is not None:  # GOAWAY: calls under way finish
            self._tasks.create_task(self._grpc.stop(grace_s + _LAST_WORDS_S))
        try:
            async with asyncio.timeout(grace_s):
                await self._http[0].hand_over(self._config.hand_over_s)
                self.pipeline.admission.close()
                await self.pipeline.admission.idle()
        except TimeoutError:
            self.pipeline.admission.close()
            self.pipeline.abandon(Draining("the gateway is shutting down"))
            try:
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self.pipeline.admission.idle()
            except TimeoutError:
                pass  # a client that does not even read its error
        await self._gate.flush(_LAST_USAGE_S)

    async def stop(self) -> None:
        """Closes every socket."""
        if self._grpc is not None:
            await self._grpc.stop(0)
        for server in self._http:
            server.stop()
        if self._http_tasks:
            await asyncio.wait(self._http_tasks, timeout=_STOP_S)
        for server in self._http:
            server.close()
        await self._gate.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def announce(self) -> dict[str, str]:
        """Where each of its ports is."""
        return self._addresses

    def _report(self) -> None:
        listens = {f"gateway.{s}": self._addresses[s] for s in _ADDRESSES}
        self._security.report(listens, keys="asked for" if self._config.auth else "any is accepted")


def check_addresses(config: GatewayConfig, security: Security) -> None:
    """Raises ConfigError where a gateway would listen or connect without protection."""
    for setting in ("http_address", "grpc_address"):
        address = getattr(config, setting)
        security.check_public(f"gateway.{setting}", address, bool(config.auth))
    security.check_admin("gateway.admin_address", config.admin_address)
    security.check_peers("gateway.auth", config.auth)
    security.check_peers("gateway.cache", filter(None, [config.cache]))
