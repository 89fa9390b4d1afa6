"""`infermesh tenants`: create, list and limit the tenants that keys belong to."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from infermesh.cli.admin import CALL_S, Address, auth_admin
from infermesh.quota import limits_from_pb
from infermesh.v1 import auth_admin_service_pb2 as pb
from infermesh.v1 import auth_service_pb2 as auth_pb

app = typer.Typer(help="Tenants: create, list, limit.", no_args_is_help=True)

Requests = Annotated[int | None, typer.Option("--requests-per-minute", min=0)]
Tokens = Annotated[int | None, typer.Option("--tokens-per-minute", min=0)]
Concurrency = Annotated[int | None, typer.Option("--max-concurrency", min=0)]
Daily = Annotated[int | None, typer.Option("--daily-tokens", min=0)]
Monthly = Annotated[int | None, typer.Option("--monthly-tokens", min=0)]
Weight = Annotated[float, typer.Option(help="Share of service among tenants.")]
Semantic = Annotated[bool, typer.Option(help="Answers may be found by meaning.")]
Reuse = Annotated[str, typer.Option(help="greedy, unset, all, never; empty: the gateway's.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Lower-case letters, digits, dashes.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    max_concurrency: Concurrency = None,
    daily_tokens: Daily = None,
    monthly_tokens: Monthly = None,
    weight: Weight = 1.0,
    semantic_cache: Semantic = False,
    reuse_policy: Reuse = "",
    admin: Address = None,
) -> None:
    """Make a tenant; a limit that is not given does not exist."""
    limits = auth_pb.TenantLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
        daily_tokens=daily_tokens,
        monthly_tokens=monthly_tokens,
    )
    policy = auth_pb.TenantPolicy(
        weight=weight, semantic_cache=semantic_cache, reuse_policy=reuse_policy
    )
    request = pb.CreateTenantRequest(id=tenant, name=name, limits=limits, policy=policy)
    with auth_admin(admin) as stub:
        stub.CreateTenant(request, timeout=CALL_S)
    typer.echo(f"tenant {tenant} is there; `infermesh keys create --tenant {tenant}` makes a key")


@app.command()
def limit(
    tenant: Annotated[str, typer.Argument(help="As `tenants list` shows it.")],
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    max_concurrency: Concurrency = None,
    daily_tokens: Daily = None,
    monthly_tokens: Monthly = None,
    admin: Address = None,
) -> None:
    """Replace all limits of a tenant; one that is not given is gone."""
    limits = auth_pb.TenantLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
        daily_tokens=daily_tokens,
        monthly_tokens=monthly_tokens,
    )
    with auth_admin(admin) as stub:
        stub.UpdateTenant(pb.UpdateTenantRequest(id=tenant, limits=limits), timeout=CALL_S)
    typer.echo(f"tenant {tenant} has new limits")


@app.command("list")
def list_tenants(admin: Address = None) -> None:
    """List tenants with their limits."""
    with auth_admin(admin) as stub:
        answer = stub.ListTenants(pb.ListTenantsRequest(), timeout=CALL_S)
    headings = ("tenant", "requests/min", "tokens/min", "at once", "tokens/day", "tokens/month")
    table = Table(*headings, "weight", "semantic cache", "reuse", box=None, header_style="bold")
    for tenant in answer.tenants:
        limits = limits_from_pb(tenant.limits)
        shown = (
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.max_concurrency,
            limits.daily_tokens,
            limits.monthly_tokens,
        )
        table.add_row(
            tenant.id,
            *("-" if value is None else str(value) for value in shown),
            f"{tenant.policy.weight:g}",
            "on" if tenant.policy.semantic_cache else "off",
            tenant.policy.reuse_policy or "-",
        )
    Console().print(table)
