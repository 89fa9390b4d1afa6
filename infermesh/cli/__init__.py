"""The `infermesh` command: every failure is one sentence and a non-zero exit status."""

import sys

import typer

from infermesh.cli import (
    certs,
    chat,
    check,
    config,
    doctor,
    keys,
    quantize,
    restart,
    tenants,
    up,
    usage,
)
from infermesh.config import ConfigError
from infermesh.errors import MeshError

app = typer.Typer(
    help="Foundation-model inference as a mesh of gRPC services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("up")(up.up)
app.command("chat")(chat.chat)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("restart")(restart.restart)
app.command("quantize")(quantize.quantize)
app.command("usage")(usage.usage)
app.command("certs")(certs.certs)
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(config.app, name="config")


def main() -> None:
    """The console script."""
    try:
        app()
    except (ConfigError, MeshError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        sys.exit(1)
