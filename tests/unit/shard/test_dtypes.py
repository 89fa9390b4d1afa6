"""The float type that a model is served in."""

from __future__ import annotations

import pytest
import torch

from infermesh.errors import InvalidRequest
from services.shard.dtypes import Host, choose_dtype, choose_kv_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("asked", "stored", "device", "capability", "served"),
    [
        ("auto", "bfloat16", CPU, "AVX512", torch.bfloat16),
        ("auto", "bfloat16", CPU, "AVX2", torch.float32),
        ("bfloat16", "float32", CPU, "AVX2", torch.bfloat16),
        ("auto", "float16", CPU, "AVX512", torch.float32),
        ("float16", "float32", CPU, "AVX2", torch.float32),
        ("auto", "float32", CPU, "AVX2", torch.float32),
        ("auto", "float16", CUDA, "AVX2", torch.float16),
        ("auto", "bfloat16", CUDA, "DEFAULT", torch.bfloat16),
    ],
)
def test_dtype_is_what_the_device_computes_well(
    asked: str, stored: str, device: torch.device, capability: str, served: torch.dtype
) -> None:
    host = Host(device, capability, 8 * GIB)
    assert choose_dtype(asked, stored, 1_000_000, host) is served


def test_dtype_stays_bfloat16_when_float32_would_not_fit() -> None:
    host = Host(CPU, "AVX2", 8 * GIB)
    assert choose_dtype("auto", "bfloat16", GIB, host) is torch.float32
    assert choose_dtype("auto", "bfloat16", GIB + 1, host) is torch.bfloat16


@pytest.mark.parametrize(("asked", "stored"), [("int3", "float32"), ("auto", "float8_e4m3fn")])
def test_dtype_is_refused_by_name_when_it_is_not_served(asked: str, stored: str) -> None:
    with pytest.raises(InvalidRequest, match="float8" if asked == "auto" else "int3"):
        choose_dtype(asked, stored, 1, Host(CPU, "AVX512", GIB))


@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_and_values_follow_the_model_unless_asked_otherwise(served: torch.dtype) -> None:
    assert choose_kv_dtype("auto", served) is served
    assert choose_kv_dtype("bfloat16", served) is torch.bfloat16
    assert choose_kv_dtype("float32", served) is torch.float32


@pytest.mark.parametrize("asked", ["float16", "fp8", ""])
def test_keys_and_values_are_refused_by_name_in_another_type(asked: str) -> None:
    with pytest.raises(InvalidRequest, match=f"kv_cache_dtype is '{asked}'"):
        choose_kv_dtype(asked, torch.float32)
