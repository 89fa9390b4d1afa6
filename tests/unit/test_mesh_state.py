"""What meshes leave in the user's state folder."""

import json
import os
import subprocess
from pathlib import Path

from infermesh.mesh.state import StateFolder


def test_file_of_a_killed_mesh_is_removed_and_not_found(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = tmp_path / "run"
    folder.mkdir()
    for pid in (ended.pid, os.getpid()):
        (folder / f"{pid}.json").write_text(json.dumps({"url": str(pid)}))
    assert [facts["url"] for facts in StateFolder(tmp_path).running()] == [str(os.getpid())]
    assert [path.name for path in folder.iterdir()] == [f"{os.getpid()}.json"]
