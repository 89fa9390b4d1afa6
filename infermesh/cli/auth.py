"""`infermesh auth`: backup and restore of tenants, keys and usage. The auth service's own modules
do it; the database is this machine's mesh's, unless the settings name another.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from infermesh.config import AuthConfig, ConfigError, load
from infermesh.mesh.models import ROOT
from infermesh.mesh.state import StateFolder

app = typer.Typer(help="The auth database: backup, restore.", no_args_is_help=True)
Database = Annotated[
    str, typer.Option("--database-url", help="default: auth.database_url, or this machine's.")
]


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="To be written; readable by its owner alone.")],
    database_url: Database = "",
) -> None:
    """Write tenants, keys (as hashes) and usage to one file, while auth runs."""
    _run("services.auth.backup", [str(file)], database_url)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="As `auth backup` wrote it.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what the database holds.")
    ] = False,
    database_url: Database = "",
) -> None:
    """Put a backup into an empty database, SQLite or PostgreSQL; stop auth first."""
    words = [str(file), "--replace"] if replace else [str(file)]
    StateFolder.of_user().root.mkdir(parents=True, exist_ok=True)  # a new machine has none
    _run("services.auth.restore", words, database_url)


def _run(module: str, words: list[str], database_url: str) -> None:
    if not (ROOT / "services" / "auth").is_dir():
        raise ConfigError("infermesh auth needs a checkout: the wheel has the client only")
    url = database_url or load().auth.database_url
    if url == AuthConfig().database_url:
        url = StateFolder.of_user().database_url
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "INFERMESH_AUTH__DATABASE_URL": url,  # it may have a password in it
    }
    done = subprocess.run([sys.executable, "-m", module, *words], env=environment, check=False)
    raise typer.Exit(done.returncode)
