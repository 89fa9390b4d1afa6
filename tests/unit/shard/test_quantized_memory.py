"""What a quantizing load takes of memory at its peak, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_tokenizer

# 40 million parameters, 157 MiB in float32; no tensor has more than a twelfth of them.
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": 3,
}
# Imports and a first small load come first: what is measured is the second alone.
SCRIPT = """
import sys
from pathlib import Path
from services.shard import host
host.prepare_process()
from infermesh.config import ShardConfig
from services.shard.domain import LoadSpec
from services.shard.loading import load_model

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

def load(folder):
    spec = LoadSpec(folder, load_format="dummy", num_blocks=1, quantize=sys.argv[3])
    return load_model(spec, ShardConfig(device="cpu", num_threads=1), lambda progress: None)

load(sys.argv[2])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
model = load(sys.argv[1])
print(status("VmHWM") - before, status("VmRSS") - before, model.manifest.weight_bytes)
"""


def _measure(folder: Path, scheme: str) -> tuple[int, int, int]:
    """Bytes over the process as it was before: at the peak, at the end; and of weights."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "model"), str(folder / "small"), scheme],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, end, weights = map(int, done.stdout.split())
    return peak, end, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    small = {**SHAPE, "hidden_size": 96, "intermediate_size": 96, "vocab_size": 512}
    for name, shape in (("model", SHAPE), ("small", small)):
        write_tokenizer(root / name)
        (root / name / "config.json").write_text(json.dumps(shape))
    return root


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[int, int, int]:
    return _measure(folder, "")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("scheme", "share", "peak_share"),
    [
        ("int4", 0.2, 0.65),
        pytest.param("int8", 0.28, 0.65, marks=pytest.mark.slow),
    ],
)
def test_the_float_model_is_never_whole_in_memory(
    folder: Path,
    plain: tuple[int, int, int],
    scheme: str,
    share: float,
    peak_share: float,
) -> None:
    full_peak, _, full = plain
    # the allocator's slack differs from run to run, and only adds
    peak, end, weights = min(_measure(folder, scheme) for _ in range(2))
    print(scheme, full_peak / full, peak / full, end / full, weights / full)
    assert full_peak > 0.95 * full
    assert weights < share * full
    # codes, one tensor in float32 and what is computed from it, the allocator's slack
    assert peak < peak_share * full
    assert end < 0.4 * full
