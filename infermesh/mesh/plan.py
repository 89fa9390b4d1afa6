"""Which processes make a mesh on this machine, with which settings. Pure: starts nothing."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infermesh.config import (
    AuthConfig,
    CacheConfig,
    GatewayConfig,
    SchedulerConfig,
    SecurityConfig,
    Settings,
    ShardConfig,
    TelemetryConfig,
)
from infermesh.config_fields import sections
from infermesh.mesh.models import ModelChoice
from infermesh.mesh.state import StateFolder
from infermesh.security.identities import Identity


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: `python -m module arguments`."""

    name: str
    module: str
    arguments: tuple[str, ...]
    announce_file: Path
    log_file: Path
    # what a command line would show to everyone
    environment: tuple[tuple[str, str], ...] = ()
    # restarted where its health service does not answer any more
    probed: bool = False

    @property
    def identity(self) -> Identity:
        """Whom its certificate names."""
        return Identity(self.module.rpartition(".")[2])


@dataclass(frozen=True, slots=True)
class AuthPlan:
    """Where the mesh's own auth service will listen."""

    address: str
    admin_address: str


@dataclass(frozen=True, slots=True)
class Group:
    """Processes of one kind, which stop together.

    Attributes:
        late: the mesh can answer without them: they start once it does, and nobody waits for them.
    """

    name: str
    processes: tuple[ProcessSpec, ...]
    late: bool = False


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """All processes, in the order in which they start; they stop in reverse, the gateway first."""

    groups: tuple[Group, ...]
    gateway: ProcessSpec
    gateway_config: GatewayConfig
    scheduler_addresses: tuple[str, ...]
    model_names: tuple[str, ...]
    auth: AuthPlan | None = None


def plan_mesh(
    settings: Settings,
    models: Sequence[ModelChoice],
    replicas: int,
    run_dir: Path,
    log_dir: Path,
    state: StateFolder | None = None,
    cache_dir: Path | None = None,
) -> MeshPlan:
    """The processes of one gateway over `replicas` schedulers of each model, one shard each.

    Args:
        state: where the auth service keeps its data; None: no auth service, any key is accepted.
        cache_dir: where the semantic cache keeps its answers; None: no cache.
    """

    def spec(name: str, module: str, own: Settings) -> ProcessSpec:
        return _spec(name, module, own, run_dir, log_dir)

    copies = list(enumerate(_replicas(settings, models, replicas, run_dir)))
    addresses = tuple(one.scheduler.address for _, one in copies)
    gateway = dataclasses.replace(settings.gateway, replicas=addresses)
    groups, auth = [], None
    if state is not None:
        auth = AuthPlan(f"unix:{run_dir}/auth.sock", f"unix:{run_dir}/auth-admin.sock")
        groups.append(Group("auth", (_auth_spec(settings, auth, run_dir, log_dir, state),)))
        gateway = _with_auth(gateway, auth, state)
    shards = tuple(spec(f"shard-{i}", "services.shard", one) for i, one in copies)
    schedulers = tuple(spec(f"scheduler-{i}", "services.scheduler", one) for i, one in copies)
    groups += [Group("shards", shards), Group("schedulers", schedulers)]
    if cache_dir is not None:
        folder = settings.cache.data_dir or str(cache_dir)
        address = f"unix:{run_dir}/cache.sock"
        cache = dataclasses.replace(settings.cache, address=address, data_dir=folder)
        own = dataclasses.replace(settings, cache=cache)
        groups.append(Group("cache", (spec("cache", "services.cache", own),), late=True))
        gateway = dataclasses.replace(gateway, cache=address)
    # the gateway's admin port serves its metrics
    telemetry = dataclasses.replace(settings.telemetry, metrics_address="")
    edge = dataclasses.replace(settings, gateway=gateway, telemetry=telemetry)
    edge_process = spec("gateway", "gateway", edge)
    groups.append(Group("gateway", (edge_process,)))
    names = tuple(model.name for model in models)
    return MeshPlan(tuple(groups), edge_process, gateway, addresses, names, auth)


def _replicas(
    settings: Settings, models: Sequence[ModelChoice], replicas: int, run_dir: Path
) -> list[Settings]:
    """The settings of each scheduler and its shard, model by model."""
    copies = [(model, copy) for model in models for copy in range(replicas)]
    found = []
    for index, (model, copy) in enumerate(copies):
        shard = dataclasses.replace(
            settings.shard, address=f"unix:{run_dir}/shard-{index}.sock", local_shards=len(copies)
        )
        scheduler = dataclasses.replace(
            settings.scheduler,
            address=f"unix:{run_dir}/scheduler-{index}.sock",
            shard=shard.address,
            model=model.source,
            model_id=model.name,
            replica_id=f"{'replica' if len(models) == 1 else model.name}-{copy}",
        )
        found.append(dataclasses.replace(settings, shard=shard, scheduler=scheduler))
    return found


def _auth_spec(
    settings: Settings, plan: AuthPlan, run_dir: Path, log_dir: Path, state: StateFolder
) -> ProcessSpec:
    url = settings.auth.database_url
    if url == AuthConfig().database_url:
        url = state.database_url
    auth = dataclasses.replace(
        settings.auth,
        address=plan.address,
        admin_address=plan.admin_address,
        database_url=AuthConfig().database_url,
    )
    redis_url, auth = auth.redis_url, dataclasses.replace(auth, redis_url="")
    whole = dataclasses.replace(settings, auth=auth)
    spec = _spec("auth", "services.auth", whole, run_dir, log_dir)
    # they may have passwords in them, and a command line is anybody's to read
    environment = [("INFERMESH_AUTH__DATABASE_URL", url)]
    if redis_url:
        environment.append(("INFERMESH_AUTH__REDIS_URL", redis_url))
    return dataclasses.replace(spec, environment=tuple(environment))


def _with_auth(gateway: GatewayConfig, plan: AuthPlan, state: StateFolder) -> GatewayConfig:
    return dataclasses.replace(
        gateway,
        auth=(plan.address, *gateway.auth),
        # the same when it is restarted, another in another mesh
        gateway_id=gateway.gateway_id or f"gateway-{os.getpid()}",
        usage_dir=gateway.usage_dir or str(state.usage_dir),
    )


_SECTION_OF: dict[str, type] = {
    "gateway": GatewayConfig,
    "services.cache": CacheConfig,
    "services.auth": AuthConfig,
    "services.scheduler": SchedulerConfig,
    "services.shard": ShardConfig,
}
# Their event loops answer whatever they compute.
_PROBED = ("services.scheduler", "services.shard")


def _spec(name: str, module: str, settings: Settings, run_dir: Path, log_dir: Path) -> ProcessSpec:
    announce_file = run_dir / f"{name}.json"
    telemetry = dataclasses.replace(
        settings.telemetry,
        service_name=name,
        announce_file=str(announce_file),
        supervisor_pid=os.getpid(),
    )
    whole = dataclasses.replace(settings, telemetry=telemetry)
    wanted = (_SECTION_OF[module], TelemetryConfig, SecurityConfig)
    arguments = [
        argument
        for section, cls in sections(Settings).items()
        if cls in wanted
        for argument in _flags(section, getattr(whole, section))
    ]
    return ProcessSpec(
        name,
        module,
        tuple(arguments),
        announce_file,
        log_dir / f"{name}.log",
        probed=module in _PROBED,
    )


def _flags(section: str, config: object) -> list[str]:
    """Flags for what differs from the defaults."""
    flags = []
    for item in dataclasses.fields(config):  # type: ignore[arg-type]  # a section is a dataclass
        value = getattr(config, item.name)
        if value != item.default:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            flags.append(f"--{section}.{item.name}={text}")
    return flags
