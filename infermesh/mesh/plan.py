"""Which processes make a mesh on this machine, with which settings. Pure: starts nothing."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infermesh.config import GatewayConfig, SchedulerConfig, Settings, ShardConfig
from infermesh.config_fields import sections
from infermesh.mesh.models import ModelChoice


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: `python -m module arguments`."""

    name: str
    module: str
    arguments: tuple[str, ...]
    announce_file: Path
    log_file: Path


@dataclass(frozen=True, slots=True)
class Group:
    """Processes of one kind, which stop together."""

    name: str
    processes: tuple[ProcessSpec, ...]


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """All processes, in the order in which they start; they stop in reverse, the gateway first."""

    groups: tuple[Group, ...]
    gateway: ProcessSpec
    scheduler_addresses: tuple[str, ...]
    model_names: tuple[str, ...]


def plan_mesh(
    settings: Settings,
    models: Sequence[ModelChoice],
    replicas: int,
    run_dir: Path,
    log_dir: Path,
) -> MeshPlan:
    """The processes of one gateway over `replicas` schedulers of each model, one shard each."""
    copies = _replicas(settings, models, replicas, run_dir)
    shards = [
        _spec(f"shard-{index}", "services.shard", one, run_dir, log_dir)
        for index, one in enumerate(copies)
    ]
    schedulers = [
        _spec(f"scheduler-{index}", "services.scheduler", one, run_dir, log_dir)
        for index, one in enumerate(copies)
    ]
    addresses = tuple(one.scheduler.address for one in copies)
    gateway = dataclasses.replace(settings.gateway, replicas=addresses)
    # the gateway's admin port serves its metrics
    telemetry = dataclasses.replace(settings.telemetry, metrics_address="")
    edge = dataclasses.replace(settings, gateway=gateway, telemetry=telemetry)
    edge_process = _spec("gateway", "gateway", edge, run_dir, log_dir)
    groups = (
        Group("shards", tuple(shards)),
        Group("schedulers", tuple(schedulers)),
        Group("gateway", (edge_process,)),
    )
    return MeshPlan(groups, edge_process, addresses, tuple(model.name for model in models))


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


_SECTION_OF: dict[str, type] = {
    "gateway": GatewayConfig,
    "services.scheduler": SchedulerConfig,
    "services.shard": ShardConfig,
}


def _spec(name: str, module: str, settings: Settings, run_dir: Path, log_dir: Path) -> ProcessSpec:
    announce_file = run_dir / f"{name}.json"
    telemetry = dataclasses.replace(
        settings.telemetry,
        service_name=name,
        announce_file=str(announce_file),
        supervisor_pid=os.getpid(),
    )
    whole = dataclasses.replace(settings, telemetry=telemetry)
    wanted = (_SECTION_OF[module], type(telemetry))
    arguments = [
        argument
        for section, cls in sections(Settings).items()
        if cls in wanted
        for argument in _flags(section, getattr(whole, section))
    ]
    return ProcessSpec(name, module, tuple(arguments), announce_file, log_dir / f"{name}.log")


def _flags(section: str, config: object) -> list[str]:
    """Flags for what differs from the defaults."""
    flags = []
    for item in dataclasses.fields(config):  # type: ignore[arg-type]  # a section is a dataclass
        value = getattr(config, item.name)
        if value != item.default:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            flags.append(f"--{section}.{item.name}={text}")
    return flags
