"""What meshes keep in the user's state folder: the auth database, unsent usage, answers given
before, the key of this machine, and which of them run now.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infermesh.lifecycle import write_whole

PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class StateFolder:
    """The folder of one user on one machine."""

    root: Path

    @classmethod
    def of_user(cls) -> "StateFolder":
        """As the XDG base directory specification places it."""
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
        return cls(Path(base) / "infermesh")

    @property
    def database_url(self) -> str:
        """Tenants, keys, quota and usage."""
        return f"sqlite:///{self.root / 'auth.sqlite3'}"

    @property
    def usage_dir(self) -> Path:
        """Usage that the ledger does not have yet."""
        return self.root / "usage"

    @property
    def cache_dir(self) -> Path:
        """Answers given before."""
        return self.root / "cache"

    @property
    def tls_dir(self) -> Path:
        """The certificates that `up --tls` makes."""
        return self.root / "tls"

    @property
    def key_file(self) -> Path:
        """The key that `up` makes once."""
        return self.root / "dev-key"

    @property
    def run_file(self) -> Path:
        """What this process's mesh says of itself while it runs."""
        return self.root / "run" / f"{os.getpid()}.json"

    def read_key(self) -> str | None:
        """The key of an earlier `up`."""
        try:
            return self.key_file.read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def keep_key(self, api_key: str) -> None:
        """For the next `up`; readable by its owner alone."""
        write_whole(self.key_file, api_key + "\n", PRIVATE)

    def running(self) -> list[dict[str, Any]]:
        """The ready files of the meshes that run now, the one that was started last at the end.

        What a mesh that was killed has left is removed: it names a key, and its pid may be another
        process's one day.
        """
        found = []
        for path in (self.root / "run").glob("*.json"):
            try:
                facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                os.kill(int(path.stem), 0)
                found.append((path.stat().st_mtime_ns, facts))
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (OSError, ValueError):
                continue  # it ends just now
        return [facts for _, facts in sorted(found, key=lambda one: one[0])]
