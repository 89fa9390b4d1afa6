"""`infermesh up`: the whole mesh on this machine, from one command to the first answer."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from infermesh import sockets
from infermesh.cli import certs
from infermesh.cli.display import LoadingDisplay, show_endpoints
from infermesh.cli.sse import stream_chat
from infermesh.config import ConfigError, GatewayConfig, Settings, load
from infermesh.errors import MeshError, as_mesh_error
from infermesh.mesh.models import ROOT, ModelChoice, check_aliases, choose_models
from infermesh.mesh.plan import plan_mesh
from infermesh.mesh.state import StateFolder
from infermesh.mesh.supervisor import Endpoints, Supervisor
from infermesh.security.identities import Identity
from infermesh.security.posture import Security

EXAMPLE = "What is the capital of France?"
# Measured with benchmarks.deterministic_cost on the demo model; a test holds it to that result.
DETERMINISTIC_COST = (
    "deterministic mode: about 0.28, 0.36 and 0.40 of the tokens/s at 1, 8 and 32 streams"
)
MIN_FREE_BYTES = 64 << 20
KEPT_LOGS = 5
_ADDRESSES = ("http_address", "admin_address", "grpc_address")


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]directory or ORG/NAME; repeatable. Default: demo."),
    ] = None,
    served_name: Annotated[
        list[str] | None, typer.Option(help="The name clients ask for; one per --model.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name: ALIAS=NAME; repeatable.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Copies of each model.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4 weights, on a CPU.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of K and V: auto (the model's), float32, bfloat16.")
    ] = None,
    load_format: Annotated[
        str | None, typer.Option(help="safetensors, or dummy for random weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    engine: Annotated[str | None, typer.Option(help="torch or simulated.")] = None,
    deterministic: Annotated[bool | None, typer.Option(help="Equal bits; slower; CPU.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    target_itl_ms: Annotated[
        float | None, typer.Option(help="Prompts may not make tokens come slower than this.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Of all three ports; else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP; 0: any. Default 8000.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="0: any. Default 8001.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0: any. Default 8002.")] = None,
    cache: Annotated[bool, typer.Option(help="Run the semantic cache.")] = True,
    config: Annotated[str | None, typer.Option(help="Instead of ./infermesh.toml.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting: --set scheduler.max_num_seqs=8; repeatable."),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write addresses and pids here once it can answer.")
    ] = None,
    ask: Annotated[str | None, typer.Option(help="Ask this once it serves.")] = None,
    auth: Annotated[bool, typer.Option(help="Ask for API keys; without, any is accepted.")] = True,
    tls: Annotated[
        bool, typer.Option("--tls", help="Mutual TLS between services, with certificates it makes.")
    ] = False,
) -> None:
    """Run the services of a mesh as supervised processes, and serve until Ctrl-C."""
    if not (ROOT / "services" / "shard").is_dir():
        raise ConfigError("infermesh up needs a checkout: the wheel has the client only")
    flags: dict[str, object] = {
        "scheduler.dtype": dtype,
        "scheduler.quantize": quantize,
        "scheduler.kv_cache_dtype": kv_cache_dtype,
        "scheduler.load_format": load_format,
        "scheduler.max_model_len": max_model_len,
        "scheduler.target_itl_ms": target_itl_ms,
        "shard.device": device,
        "shard.engine": engine,
        "shard.deterministic": None if deterministic is None else str(deterministic).lower(),
        "gateway.model_aliases": ",".join(alias) if alias else None,
        "security.tls_folder": _own_certificates() if tls else None,
    }
    argv = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    argv += [*(f"--{item}" for item in settings or []), *(["--config", config] if config else [])]
    ports = {"http_address": port, "admin_address": admin_port, "grpc_address": grpc_port}
    effective = load([*argv, *_address_flags(load(argv).gateway, host, ports)])
    models = _models(effective, model or [], served_name or [])
    raise typer.Exit(_run(effective, models, replicas, auth, cache, ready_file, ask))


def _run(
    settings: Settings,
    models: Sequence[ModelChoice],
    replicas: int,
    auth: bool,
    cache: bool,
    ready_file: Path | None,
    ask: str | None,
) -> int:
    """The mesh from its first process to its last; the exit status."""
    state = StateFolder.of_user()
    with _folders(state) as (run_dir, log_dir):
        kept = (state if auth else None, state.cache_dir if cache else None)
        plan = plan_mesh(settings, models, replicas, run_dir, log_dir, *kept)
        security = Security.of(settings.security, Identity.OPERATOR)
        _refuse_busy_ports(settings)
        if settings.shard.deterministic:
            Console().print(f"[dim]{DETERMINISTIC_COST}[/]", highlight=False)
        grace_s, certificates = settings.gateway.drain_grace_s, security.certificates
        supervisor = Supervisor(plan, state, ready_file, grace_s, certificates)
        listens = [getattr(settings.gateway, name) for name in _ADDRESSES]
        posture = security.sentence(listens, auth)
        try:
            return asyncio.run(_serve(supervisor, ask, log_dir, posture))
        finally:
            gc.collect()  # as in `lifecycle.run`


def _own_certificates() -> str:
    """The folder of this user's certificates, made or made anew where it is time."""
    from infermesh.security import authority  # its library is not in the wheel's own requirements

    folder = StateFolder.of_user().tls_dir
    authority.ensure(folder, timedelta(days=certs.DAYS), datetime.now(UTC))
    return str(folder)


def _models(
    settings: Settings, models: Sequence[str], served_names: Sequence[str]
) -> tuple[ModelChoice, ...]:
    """What the command line names, else what [scheduler] does, else the demo model."""
    configured = settings.scheduler
    if not models and configured.model:
        models = [configured.model]
        served_names = served_names or ([configured.model_id] if configured.model_id else [])
    chosen = choose_models(models, served_names)
    check_aliases(settings.gateway.model_aliases, chosen)
    return chosen


async def _serve(supervisor: Supervisor, ask: str | None, log_dir: Path, posture: str) -> int:
    console = Console()
    stop = _StopRequests(supervisor)
    began = time.monotonic()
    try:
        with LoadingDisplay(console) as display:
            async with supervisor.running(display.update) as endpoints:
                display.close()
                stop.drains = True
                await _serve_until(stop, supervisor, console, endpoints, ask, posture, began)
                console.print("\n[dim]draining; Ctrl-C again stops at once[/]")
    except asyncio.CancelledError:
        if not stop.requested.is_set():
            raise
    except (MeshError, ExceptionGroup) as error:
        sentence = as_mesh_error(error).message
        console.print(f"[red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        console.print(f"[dim]logs: {log_dir}[/]", highlight=False, soft_wrap=True)
        return 1
    return 0


class _StopRequests:
    """Ctrl-C, SIGTERM and SIGHUP: the first drains (or ends the loading), the second kills.
    SIGUSR1 asks for a rolling restart.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.requested = asyncio.Event()
        self.roll_requested = asyncio.Event()
        self.drains = False
        self._supervisor = supervisor
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGUSR1, self.roll_requested.set)

    def _on_signal(self) -> None:
        again = self.requested.is_set()
        self.requested.set()
        if again:
            self._supervisor.kill()
        elif not self.drains and self._task is not None:
            self._task.cancel()


async def _serve_until(
    stop: _StopRequests,
    supervisor: Supervisor,
    console: Console,
    endpoints: Endpoints,
    ask: str | None,
    posture: str,
    began: float,
) -> None:
    if ask is not None:
        console.print(f"[bold]> {escape(ask)}[/]", highlight=False)
        await asyncio.to_thread(_ask, console, endpoints, ask)
    show_endpoints(console, endpoints, ask or EXAMPLE)
    console.print(f"[dim]security: {escape(posture)}[/]", highlight=False)
    console.print(f"[dim]up in {time.monotonic() - began:.1f} s[/]")
    async with asyncio.TaskGroup() as tasks:
        rolling = tasks.create_task(_keep_rolling(stop.roll_requested, supervisor, console))
        await stop.requested.wait()
        rolling.cancel()


async def _keep_rolling(requested: asyncio.Event, supervisor: Supervisor, console: Console) -> None:
    """A rolling restart whenever one is asked for, one at a time."""
    while True:
        await requested.wait()
        requested.clear()
        began = time.monotonic()
        console.print("[dim]rolling restart[/]")
        try:
            await supervisor.roll(lambda what: console.print(f"[dim]restarted: {what}[/]"))
        except MeshError as error:
            console.print(f"[red]error:[/] {escape(error.message)}", highlight=False)
        else:
            console.print(f"[dim]restarted all in {time.monotonic() - began:.1f} s[/]")


def _ask(console: Console, endpoints: Endpoints, question: str) -> None:
    message = {"role": "user", "content": question}
    target = (endpoints.url, endpoints.models[0], [message], endpoints.api_key)
    pieces = stream_chat(*target, temperature=0)
    for piece in pieces:
        console.out(piece, end="", highlight=False)
    console.print()


def _address_flags(
    configured: GatewayConfig, host: str | None, ports: Mapping[str, int | None]
) -> list[str]:
    """Flags for the addresses of which the command line names host or port."""
    flags = []
    for name, port in ports.items():
        address: str = getattr(configured, name)
        if (host is None and port is None) or address.startswith("unix:"):
            continue
        old_host, _, old_port = address.rpartition(":")
        joined = sockets.join(host or old_host, old_port if port is None else port)
        flags.append(f"--gateway.{name}={joined}")
    return flags


def _refuse_busy_ports(settings: Settings) -> None:
    """Before anything is started; the gateway itself would say it seconds later."""
    for name in _ADDRESSES:
        address = getattr(settings.gateway, name)
        if address.startswith("unix:"):
            continue
        try:
            sockets.bind(f"gateway.{name}", address)[0].close()
        except ConfigError as error:
            raise ConfigError(
                f"{error}; --port, --admin-port and --grpc-port choose others (0: any free one)"
            ) from None


@contextlib.contextmanager
def _folders(state: StateFolder) -> Iterator[tuple[Path, Path]]:
    """A private folder for sockets, removed at the end, and one for logs, of which few are kept."""
    log_dir = state.root / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    log_dir.mkdir(parents=True)
    if shutil.disk_usage(log_dir).free < MIN_FREE_BYTES:
        raise ConfigError(f"the disk with {state.root} is full: less than 64 MiB are free")
    for old in sorted(log_dir.parent.iterdir())[:-KEPT_LOGS]:
        shutil.rmtree(old, ignore_errors=True)
    # short, because a unix socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="infermesh-") as run_dir:
        yield Path(run_dir), log_dir
