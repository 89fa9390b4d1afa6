"""`infermesh usage`: what was used, by tenant, key and model."""

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from infermesh.cli.admin import CALL_S, Address, auth_admin, seconds
from infermesh.v1 import auth_admin_service_pb2 as pb


def usage(
    tenant: Annotated[str, typer.Option(help="Only this one's; default: all.")] = "",
    since: Annotated[str | None, typer.Option(help="The last 1h, 30d, ...; default: ever.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    admin: Address = None,
) -> None:
    """Show requests and tokens by tenant, key and model."""
    request = pb.QueryUsageRequest(tenant_id=tenant)
    if since is not None:
        request.since_unix_ms = int((time.time() - seconds(since, "since")) * 1e3)
    with auth_admin(admin) as stub:
        totals = stub.QueryUsage(request, timeout=CALL_S).totals
    if as_json:
        typer.echo(json.dumps([_facts(total) for total in totals]))
        return
    table = Table(box=None, header_style="bold")
    for heading in ("tenant", "key", "model"):
        table.add_column(heading)
    for heading in ("requests", "prompt tokens", "completion tokens", "cached prompt tokens"):
        table.add_column(heading, justify="right")
    for total in totals:
        table.add_row(*(str(value) for value in _facts(total).values()))
    Console().print(table)


def _facts(total: pb.UsageTotal) -> dict[str, str | int]:
    return {
        "tenant": total.tenant_id,
        "key": total.key_id,
        "model": total.model,
        "requests": total.num_requests,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cached_prompt_tokens": total.cached_prompt_tokens,
    }
