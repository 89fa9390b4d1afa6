"""`infermesh config show`: the effective settings and where each came from."""

import dataclasses
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infermesh.config import Settings, load
from infermesh.config_fields import masked, sections

app = typer.Typer(help="Inspect the settings of every service.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Inspect the settings of every service."""


@app.command()
def show(
    file: Annotated[
        str | None, typer.Option("--config", help="Instead of ./infermesh.toml.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what stands at its default.")] = True,
) -> None:
    """Print every setting, its value, and whether default, file or environment set it."""
    settings = load(["--config", file] if file else [])
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "from", "meaning"):
        table.add_column(heading, overflow="fold")
    for section, cls in sections(Settings).items():
        for item in dataclasses.fields(cls):
            key = f"{section}.{item.name}"
            origin = settings.origins[key]
            if all_ or origin != "default":
                value = getattr(getattr(settings, section), item.name)
                cells = (key, _text(value), origin, item.metadata["doc"])
                table.add_row(*map(escape, cells))  # [::1]:8000 is no markup
    Console().print(table)


def _text(value: object) -> str:
    return masked(",".join(value) if isinstance(value, tuple) else str(value))
