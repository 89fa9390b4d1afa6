"""The shard on a host with nothing but grpcio, protobuf, numpy, torch and transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.shard import bare_host
from tests.tiny_models import write_tiny_model


@pytest.mark.parametrize("engine", ["torch", "simulated"])
def test_shard_serves_when_only_the_five_packages_are_there(engine: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, bare_host.__file__, engine, str(model), str(tmp_path / "s.sock")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "served", done.stderr
