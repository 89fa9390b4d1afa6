"""The device benchmark, run small on the CPU: it must not be broken when a GPU comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_engine
from tests.architectures import ARCHITECTURES


@pytest.mark.slow
def test_benchmark_checks_parity_and_times_steps_when_run_quickly_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, gpu_engine.__file__, "--device", "cpu", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [entry["passed"] for entry in result["parity"]] == [True] * len(ARCHITECTURES)
    (speed,) = result["speed"]
    assert [entry["batch"] for entry in speed["decode"]] == [1, 4]
    assert speed["prefill"]["tokens"] == 64
