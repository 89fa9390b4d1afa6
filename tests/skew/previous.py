"""Meshes whose processes run the previous version's code, each as the test says.

Owns which module runs from where. The archive is `freeze.py`'s.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.skew.freeze import ROOT, unpack

MODULES = ("gateway", "services.auth", "services.cache", "services.scheduler", "services.shard")

# Runs as each process of Python begins; `-m services.auth` is in what it was started with.
_SHIM = """\
import json, pathlib, sys
folders = json.loads(pathlib.Path(__file__).with_name("folders.json").read_text())
words = sys.orig_argv
module = words[words.index("-m") + 1] if "-m" in words else ""
if module in folders:
    sys.path.insert(0, folders[module])
"""


class Installation:
    """A folder for PYTHONPATH that says, for each module of a mesh, which version starts next.

    Args:
        folder: its own, and where the previous version is unpacked.
    """

    def __init__(self, folder: Path) -> None:
        self.previous = unpack(folder / "previous")
        self.path = folder / "shim"
        self.path.mkdir()
        (self.path / "sitecustomize.py").write_text(_SHIM)
        self.install(())

    def install(self, previous: Iterable[str], others: Mapping[str, Path] | None = None) -> None:
        """From now on these modules start in the previous version, all others in the present.

        Args:
            others: modules that start from another folder still.
        """
        folders = {name: str(ROOT) for name in MODULES} | {
            name: str(self.previous) for name in previous
        }
        folders |= {name: str(folder) for name, folder in (others or {}).items()}
        whole = self.path / "folders.new"
        whole.write_text(json.dumps(folders))
        whole.replace(self.path / "folders.json")
