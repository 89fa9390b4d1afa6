"""What `infermesh up` shows: loading progress, then where the mesh listens."""

import shlex
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from infermesh.mesh.supervisor import Endpoints


class LoadingDisplay:
    """A bar per replica in a terminal; a line per stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, str] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[replica]}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bars away; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def update(self, replica: str, fraction: float, stage: str) -> None:
        """One report of a replica."""
        if self._progress is not None:
            if replica not in self._bars:
                self._bars[replica] = self._progress.add_task(stage, total=1.0, replica=replica)
            self._progress.update(self._bars[replica], completed=fraction, description=stage)
        elif stage and self._stages.get(replica) != stage:
            self._stages[replica] = stage
            self._console.print(f"{replica}: {stage}", highlight=False)


def curl_command(endpoints: Endpoints, question: str) -> str:
    """A ready-to-paste streaming request."""
    body = (
        f'{{"model": "{endpoints.models[0]}", "stream": true, '
        f'"messages": [{{"role": "user", "content": "{question}"}}]}}'
    )
    return (
        f"curl -N {endpoints.url}/v1/chat/completions "
        f"-H 'Authorization: Bearer {endpoints.api_key}' "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def show_endpoints(console: Console, endpoints: Endpoints, question: str) -> None:
    """The URL and the curl to paste; the curl as one line however narrow the terminal is."""
    where = escape(f"{', '.join(endpoints.models)} at {endpoints.url}")
    others = escape(f"gRPC {endpoints.grpc} · admin {endpoints.admin_url}")
    console.print(f"\n[bold green]Serving[/] {where}")
    console.print(f"[dim]{others} · Ctrl-C stops[/]\n")
    console.print(curl_command(endpoints, question), highlight=False, soft_wrap=True, markup=False)
