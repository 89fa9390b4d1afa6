"""`infermesh keys`: create, list, rotate and revoke API keys."""

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from infermesh.cli.admin import CALL_S, Address, auth_admin, moment, seconds
from infermesh.v1 import auth_admin_service_pb2 as pb

app = typer.Typer(help="API keys: create, list, rotate, revoke.", no_args_is_help=True)
_TENANT = "local"


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = _TENANT,
    name: Annotated[str, typer.Option(help="To tell it from others.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, embeddings, models; default: all.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use; default: every model.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="After 12h, 30d, ...; default: never.")
    ] = None,
    admin: Address = None,
) -> None:
    """Make a key and print it, this once."""
    request = pb.CreateKeyRequest(tenant_id=tenant, name=name, scopes=scope, models=model)
    if expires is not None:
        request.valid_for.FromSeconds(seconds(expires, "expires"))
    with auth_admin(admin) as stub:
        answer = stub.CreateKey(request, timeout=CALL_S)
    _show(answer.key.id, answer.api_key)


@app.command("list")
def list_keys(
    tenant: Annotated[str, typer.Option(help="Only this one's; default: all.")] = "",
    admin: Address = None,
) -> None:
    """List keys; their secrets are known to nobody."""
    with auth_admin(admin) as stub:
        answer = stub.ListKeys(pb.ListKeysRequest(tenant_id=tenant), timeout=CALL_S)
    table = Table(box=None, header_style="bold")
    for heading in ("id", "tenant", "name", "scopes", "models", "created", "state"):
        table.add_column(heading, no_wrap=heading in ("id", "state"))
    for key in answer.keys:
        table.add_row(
            key.id,
            key.tenant_id,
            key.name,
            ",".join(key.scopes),
            ",".join(key.models) or "all",
            moment(key.created_unix_s),
            _state(key),
        )
    Console().print(table)


@app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it.")],
    overlap: Annotated[str, typer.Option(help="The old key still works so long.")] = "24h",
    admin: Address = None,
) -> None:
    """Make a key like another, which then ends; print it, this once."""
    request = pb.RotateKeyRequest(key_id=key_id)
    request.overlap.FromSeconds(seconds(overlap, "overlap"))
    with auth_admin(admin) as stub:
        answer = stub.RotateKey(request, timeout=CALL_S)
    _show(answer.key.id, answer.api_key)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it.")],
    admin: Address = None,
) -> None:
    """End a key at once."""
    with auth_admin(admin) as stub:
        stub.RevokeKey(pb.RevokeKeyRequest(key_id=key_id), timeout=CALL_S)
    typer.echo(f"{key_id} is revoked")


def _show(key_id: str, api_key: str) -> None:
    """The key alone on stdout, for scripts."""
    typer.echo(f"key {key_id}; keep its text, it is not shown again:", err=True)
    typer.echo(api_key)


def _state(key: pb.Key) -> str:
    if key.HasField("revoked_unix_s"):
        return f"revoked {moment(key.revoked_unix_s)}"
    if not key.HasField("expires_unix_s"):
        return "active"
    verb = "expired" if key.expires_unix_s <= time.time() else "expires"
    return f"{verb} {moment(key.expires_unix_s)}"
