"""`infermesh certs`: a certificate authority of one's own, and what it makes for every service."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from infermesh.config import ConfigError
from infermesh.mesh.state import StateFolder
from infermesh.security.identities import Identity

if TYPE_CHECKING:  # its library is not in the wheel's own requirements
    from infermesh.security.authority import Issued

DAYS = 90


def certs(
    folder: Annotated[
        Path | None, typer.Option(help="Default: that of `infermesh up --tls`.")
    ] = None,
    dns: Annotated[
        list[str] | None,
        typer.Option(help="SERVICE=NAME: another name in a certificate; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="A certificate's life.")] = DAYS,
    renew: Annotated[bool, typer.Option("--renew", help="Make every certificate anew.")] = False,
    new_authority: Annotated[
        bool, typer.Option("--new-authority", help="Begin to replace it: both are believed.")
    ] = False,
    forget_old_authority: Annotated[
        bool, typer.Option("--forget-old-authority", help="After --renew: end it.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Change nothing.")] = False,
) -> None:
    """Make a certificate authority and a certificate for every service; running ones follow."""
    try:
        from infermesh.security import authority
    except ImportError:
        raise ConfigError("this needs the package cryptography: infermesh[control]") from None
    if sum((renew, new_authority, forget_old_authority, show)) > 1:
        raise ConfigError("give one of --renew, --new-authority, --forget-old-authority, --show")
    target = folder or StateFolder.of_user().tls_dir
    names, life, now = _names(dns or []), timedelta(days=days), datetime.now(UTC)
    if renew:
        authority.renew(target, names, life, now)
    elif new_authority:
        authority.begin_replacement(target, now)
    elif forget_old_authority:
        authority.end_replacement(target)
    elif not show:
        authority.create(target, names, life, now)
    _print(target, authority.issued_in(target), now)


def _names(pairs: list[str]) -> dict[Identity, list[str]]:
    """Raises ConfigError for what is no SERVICE=NAME."""
    found: dict[Identity, list[str]] = {}
    for pair in pairs:
        service, _, name = pair.partition("=")
        if service not in list(Identity) or not name:
            known = ", ".join(Identity)
            raise ConfigError(f"--dns is {pair!r}; it must be SERVICE=NAME, of {known}")
        found.setdefault(Identity(service), []).append(name)
    return found


def _print(folder: Path, issued: "list[Issued]", now: datetime) -> None:
    table = Table(box=None)
    for heading in ("identity", "SPIFFE id", "expires (UTC)", "days left", "more names"):
        table.add_column(heading, no_wrap=True)
    for one in issued:
        left = (one.expires - now).days
        expires = f"{one.expires:%Y-%m-%d %H:%M}"
        names = ", ".join(one.dns_names) or "-"
        table.add_row(one.identity.value, one.identity.spiffe_id, expires, str(left), names)
    console = Console()
    console.print(table)
    console.print(
        f"in {folder}; security.tls_folder={folder} uses them", highlight=False, soft_wrap=True
    )
