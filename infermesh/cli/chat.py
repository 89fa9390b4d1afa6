"""`infermesh chat`: a conversation in the terminal, through the gateway's HTTP front door."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from infermesh.cli.sse import Message, list_models, stream_chat
from infermesh.errors import MeshError, ModelLoading
from infermesh.mesh.state import StateFolder
from infermesh.mesh.supervisor import ANY_KEY

DEFAULT_URL = "http://127.0.0.1:8000"
_console = Console()


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Ask this and exit; else a dialogue.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Default: this machine's mesh.", envvar="INFERMESH_URL"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the gateway's first.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Default: the key of this machine.", envvar="INFERMESH_API_KEY"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
) -> None:
    """Talk to a model served by a mesh."""
    meshes = StateFolder.of_user().running()
    url = url or (meshes[-1]["url"] if meshes else DEFAULT_URL)
    # a key goes to the mesh that it belongs to, and nowhere else
    api_key = api_key or next((m["api_key"] for m in meshes if m["url"] == url), ANY_KEY)
    served = list_models(url, api_key)
    if not served:
        raise ModelLoading(f"the mesh at {url} has no model ready yet")
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    options: dict[str, object] = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    target = (url, model or served[0], api_key)
    if message is not None:
        _answer(target, [*history, {"role": "user", "content": message}], options)
        return
    _console.print(f"[dim]{escape(f'{target[1]} at {url}')}; an empty line or Ctrl-D ends[/dim]")
    _dialogue(target, history, options)


def _dialogue(
    target: tuple[str, str, str], history: list[Message], options: dict[str, object]
) -> None:
    while question := _read():
        turn: Message = {"role": "user", "content": question}
        try:
            text = _answer(target, [*history, turn], options)
        except MeshError as error:
            _console.print(f"[red]error:[/red] {escape(str(error))}")
            continue
        except KeyboardInterrupt:  # stops this answer, not the dialogue
            _console.print()
            continue
        history += [turn, {"role": "assistant", "content": text}]


def _read() -> str:
    try:
        return _console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        _console.print()
        return ""


def _answer(
    target: tuple[str, str, str], messages: list[Message], options: dict[str, object]
) -> str:
    url, model, api_key = target
    text = ""
    for piece in stream_chat(url, model, messages, api_key, **options):
        _console.out(piece, end="", highlight=False)
        text += piece
    _console.print()
    return text
