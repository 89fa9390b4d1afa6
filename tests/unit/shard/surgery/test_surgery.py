"""What the operation finds in each architecture, and what it leaves alone. That the models compute
the same afterwards is test_parity's and test_quantized_parity's to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infermesh.config import ShardConfig
from services.shard.domain import LoadSpec
from services.shard.kernels.library import Library
from services.shard.kernels.products import Packer
from services.shard.loading import load_model
from services.shard.row_codes import Codes
from services.shard.surgery.fused import FusedLayer
from services.shard.surgery.fusing import Fusing
from services.shard.surgery.operation import _modules
from services.shard.surgery.packed import PackedEmbedding, PackedExperts, PackedLinear, Shared
from services.shard.surgery.watching import groups_of_products
from tests.architectures import ARCHITECTURES
from tests.compiled_kernels import needs_kernels
from tests.tiny_models import write_tiny_model

pytestmark = needs_kernels

# Of tiny models with 3 layers, 4 where windows alternate: what is fused, and into what.
NONE = dict.fromkeys(("norms", "mlps", "attentions", "layers", "stacked", "shortcut"), 0)
ALL = {"norms": 7, "mlps": 3, "attentions": 3, "layers": 3, "stacked": 3, "shortcut": 1}
FOUR = {**NONE, "mlps": 4, "attentions": 4, "layers": 4, "stacked": 4}
FUSED = {
    "cohere": NONE,
    "gemma2": {**FOUR, "norms": 17},
    "gemma3_text": {**FOUR, "norms": 25},
    "glm": {**NONE, "norms": 7, "mlps": 3},
    "gpt2": NONE,
    "granite": {**ALL, "shortcut": 0},  # it scales what it looks up, and logits
    "llama": ALL,
    "mistral": ALL,
    "mixtral": {**NONE, "norms": 7, "attentions": 3},
    "olmo2": {**ALL, "norms": 13},
    "phi3": {**NONE, "norms": 7, "mlps": 3},
    "qwen2": ALL,
    "qwen3": {**ALL, "norms": 13},
    "qwen3_moe": {**NONE, "norms": 13, "mlps": 1, "attentions": 3, "layers": 1},
    "starcoder2": {**NONE, "attentions": 3},
}


def load(directory: Path, **fields: Any) -> Any:
    spec = LoadSpec(str(directory), block_size=4, num_blocks=8, max_num_seqs=2, **fields)
    loaded: Any = load_model(spec, ShardConfig(device="cpu", num_threads=1), lambda progress: None)
    return loaded.engine._forward._model


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_product_is_packed_and_what_is_known_is_fused(
    model_type: str, tmp_path: Path
) -> None:
    model = load(write_tiny_model(tmp_path, model_type))
    assert not count(model, nn.Linear)
    counts = {kind: _modules.labels(kind)._value.get() for kind in FUSED[model_type]}
    assert counts == FUSED[model_type]
    assert count(model, FusedLayer) == counts["layers"]
    moe = model_type in ("mixtral", "qwen3_moe")
    assert bool(count(model, PackedExperts)) == moe


def test_a_tied_model_keeps_one_table(tmp_path: Path) -> None:
    tied = load(write_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True))
    plain = load(write_tiny_model(tmp_path / "plain", "llama", tie_word_embeddings=False))
    assert count(tied, PackedEmbedding) == 1
    assert not count(plain, PackedEmbedding)


def test_bfloat16_stays_in_memory_and_float32_comes_out(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path, "llama", tie_word_embeddings=False)
    model = load(directory, dtype="bfloat16")
    assert model.model.embed_tokens(torch.tensor([1])).dtype is torch.float32
    matrix = model.lm_head.shared.matrix
    assert matrix.num_bytes == 2 * matrix.num_rows * matrix.num_columns


class Parts(nn.Module):
    """Calls its products in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.twice, self.again, self.never = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = torch.ones(1, 2, 8)
        y = self.one(x) + self.two(x) + self.twice(x) + self.again(x)
        return self.twice(x) + self.again(y)


def test_products_share_where_they_are_given_the_same_tensor_once() -> None:
    parts = Parts()
    groups = groups_of_products(parts)
    alone = [[parts.twice], [parts.again], [parts.never]]
    assert groups == [[parts.one, parts.two], *alone]


@pytest.fixture(scope="module")
def packer(kernels: Library) -> Packer:
    return Packer(kernels)


def test_a_shared_matrix_computes_anew_for_another_tensor(packer: Packer) -> None:
    weights = [torch.randn(5, 8), torch.randn(3, 8)]
    shared = Shared(packer.pack(weights))
    one, two = (PackedLinear(shared, index, 0, 0) for index in range(2))
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    for given in (x, y, x, x):
        torch.testing.assert_close(one(given), given @ weights[0].t())
    torch.testing.assert_close(two(y), y @ weights[1].t())
    torch.testing.assert_close(two(y), y @ weights[1].t())
    assert one(torch.empty(0, 8)).shape == (0, 5)


class Mlp(nn.Module):
    """gate and up, with something that the fused one would not do."""

    def __init__(self, both: Shared, down: Shared, extra: float) -> None:
        super().__init__()
        self.gate, self.up = PackedLinear(both, 0, 0, 0), PackedLinear(both, 1, 0, 0)
        self.down = PackedLinear(down, 0, 0, 0)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * (self.up(x) + self.extra))


@pytest.mark.parametrize(("extra", "num_fused"), [(0.0, 1), (0.01, 0)])
def test_a_module_of_the_same_parts_stays_where_it_computes_otherwise(
    kernels: Library, packer: Packer, extra: float, num_fused: int
) -> None:
    both = Shared(packer.pack([torch.randn(16, 8), torch.randn(16, 8)]))
    mlp = Mlp(both, Shared(packer.pack([torch.randn(8, 16)])), extra)
    model: Any = nn.Sequential(mlp)
    fusing = Fusing(kernels)
    fusing.run(model)
    assert fusing.counts["mlps"] == num_fused


def test_a_module_is_fused_where_its_products_round_what_they_are_given(
    kernels: Library, packer: Packer
) -> None:
    """A value that is rounded another way, because torch computed it a little differently, changes
    a product by more than modules may differ."""
    parts = []
    for size in ((4096, 64), (4096, 64), (64, 4096)):
        parts.append(Codes.empty(*size, group_size=32))
        assert parts[-1].quantize_(torch.randn(size))
    both, down = Shared(packer.pack(parts[:2])), Shared(packer.pack(parts[2:]))
    model: Any = nn.Sequential(Mlp(both, down, extra=1e-4))
    fusing = Fusing(kernels)
    fusing.run(model)
    assert fusing.counts["mlps"] == 1
