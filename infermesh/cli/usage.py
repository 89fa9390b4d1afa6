"""`infermesh usage`: what was used and what it cost, by tenant, key, model, user, day or label."""

import csv
import enum
import json
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from infermesh.cli.admin import CALL_S, Address, auth_admin, seconds
from infermesh.errors import InvalidRequest
from infermesh.v1 import auth_admin_service_pb2 as pb

Facts = dict[str, str | int | float]
_DIMENSIONS = {
    "tenant": pb.USAGE_DIMENSION_TENANT,
    "key": pb.USAGE_DIMENSION_KEY,
    "model": pb.USAGE_DIMENSION_MODEL,
    "user": pb.USAGE_DIMENSION_USER,
    "day": pb.USAGE_DIMENSION_DAY,
    "label": pb.USAGE_DIMENSION_LABEL,
}
_DEFAULT = ("tenant", "key", "model")
_SHOWN = ("requests", "prompt_tokens", "cached_prompt_tokens", "completion_tokens")


class Format(enum.StrEnum):
    """What is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def usage(
    tenant: Annotated[str, typer.Option(help="Only this one's; default: all.")] = "",
    since: Annotated[str | None, typer.Option(help="The last 1h, 30d, ...; default: ever.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="tenant, key, model, user, day or label:NAME; again for more. "
            "Default: tenant, key and model."
        ),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How it is printed.")] = Format.TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    admin: Address = None,
) -> None:
    """Show requests, tokens, device time and cost."""
    names = list(dict.fromkeys(by or _DEFAULT))
    request = _request(tenant, since, names)
    with auth_admin(admin) as stub:
        totals = stub.QueryUsage(request, timeout=CALL_S).totals
    rows = [_facts(total, names) for total in totals]
    if as_json or output is Format.JSON:
        typer.echo(json.dumps(rows))
    elif output is Format.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(_headings(names))
        writer.writerows(row.values() for row in rows)
    else:
        _show(names, rows)


def _request(tenant: str, since: str | None, names: list[str]) -> pb.QueryUsageRequest:
    request = pb.QueryUsageRequest(tenant_id=tenant)
    for name in names:
        kind, _, label = name.partition(":")
        if kind not in _DIMENSIONS or (kind == "label") != bool(label):
            raise InvalidRequest(
                f"by is {name!r}; it must be tenant, key, model, user, day or label:NAME",
                param="by",
            )
        if label and request.label:
            raise InvalidRequest("by names two labels; one is possible", param="by")
        request.group_by.append(_DIMENSIONS[kind])
        request.label = request.label or label
    if since is not None:
        request.since_unix_ms = int((time.time() - seconds(since, "since")) * 1e3)
    return request


def _headings(names: list[str]) -> list[str]:
    return list(_facts(pb.UsageTotal(), names))


def _facts(total: pb.UsageTotal, names: list[str]) -> Facts:
    values = {
        "tenant": total.tenant_id,
        "key": total.key_id,
        "model": total.model,
        "user": total.end_user,
        "day": total.day,
    }
    return {
        **{name: values.get(name, total.label_value) for name in names},
        "requests": total.num_requests,
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "cached_prompt_tokens": total.cached_prompt_tokens,
        "computed_prompt_tokens": total.prompt_tokens - total.cached_prompt_tokens,
        "device_seconds": total.device_us / 1e6,
        # a decimal number as text: money is no float
        "cost": total.cost if total.currency else "",
        "currency": total.currency,
    }


def _show(names: list[str], rows: list[Facts]) -> None:
    """What a person reads, in 80 columns: the rest is for programs."""
    table = Table(box=None, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    for heading in ("requests", "prompt", "cached", "output", "device s", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in names),
            *(str(row[name]) for name in _SHOWN),
            f"{row['device_seconds']:.2f}",
            f"{row['cost']} {row['currency']}".strip() or "-",
        )
    Console().print(table)
