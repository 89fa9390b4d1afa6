"""gRPC waits two seconds at the end of a process for what is left of it, once TLS was used."""

import subprocess
import sys
from pathlib import Path

from tests import certificates
from tests.contract.security import ended


def test_nothing_of_grpc_is_left_when_a_service_has_ended(tmp_path: Path) -> None:
    certificates.make(tmp_path / "tls")
    done = subprocess.run(
        [sys.executable, "-m", ended.__name__, str(tmp_path)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [r"b'\x08\x01'", "status 0, left: []"], done.stderr
