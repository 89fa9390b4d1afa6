"""A torch engine from a model directory: config → meta model → weights in place → KV pool.

Imports torch and transformers; imported in the worker thread on Load, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from infermesh.errors import InvalidRequest, MeshError, ModelLoadFailed
from services.shard import dtypes, sizing
from services.shard.checkpoint import Checkpoint
from services.shard.domain import LoadSpec
from services.shard.forward import ATTENTION_NAME, ForwardPass, register
from services.shard.host import available_memory_bytes, num_threads, physical_cores
from services.shard.kv_pool import KvPool, KvShape
from services.shard.model_files import ModelFiles
from services.shard.rope import install as install_rope
from services.shard.torch_engine import TorchEngine
from services.shard.weights import dummy_weights, load_weights

_STORED = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}


class TorchLoader:
    """Builds one engine; the caller wraps it with files, hashes and manifest."""

    def __init__(self, device: str, fixed_threads: int, local_shards: int) -> None:
        """Raises InvalidRequest for a device that is not here."""
        self._fixed_threads = fixed_threads
        self._local_shards = local_shards
        torch.set_num_threads(fixed_threads or max(1, physical_cores() // local_shards))
        self.device = choose_device(device)

    def choose_dtype(
        self, spec: LoadSpec, files: ModelFiles, checkpoint: Checkpoint | None
    ) -> torch.dtype:
        """See `dtypes`. Raises InvalidRequest."""
        declared = files.config.get("dtype") or files.config.get("torch_dtype")
        first = next(iter(checkpoint.tensors.values()), None) if checkpoint else None
        stored = declared or (_STORED.get(first.dtype) if first else None) or "float32"
        stored = str(stored).removeprefix("torch.")
        host = dtypes.Host(
            self.device, torch.backends.cpu.get_cpu_capability(), available_memory_bytes()
        )
        size = 0 if spec.dtype != "auto" else num_parameters(_meta_model(files, torch.float32))
        return dtypes.choose_dtype(spec.dtype, stored, size, host)

    def build(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint | None,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None],
    ) -> nn.Module:
        """The model on the device, with its weights; dummy ones without a checkpoint.

        Raises:
            ModelLoadFailed, OutOfMemory, UnsupportedModel
        """
        model = _meta_model(files, dtype)
        tied = _tied(model)
        with torch.no_grad():
            if checkpoint is None:
                std = float(getattr(model.config, "initializer_range", 0.02))
                dummy_weights(model, tied, std, dtype, self.device, on_bytes)
            else:
                load_weights(model, checkpoint, tied, dtype, self.device, on_bytes)
            _fill_buffers(model, self.device)
        model.eval()
        return model  # type: ignore[no-any-return]

    def engine(
        self, model: nn.Module, spec: LoadSpec, files: ModelFiles, dtype: torch.dtype
    ) -> tuple[TorchEngine, sizing.Sizing]:
        """The engine with its KV pool. Raises OutOfMemory or UnsupportedModel."""
        weight_bytes = num_parameters(model) * dtype.itemsize
        torch.set_num_threads(self._fixed_threads or num_threads(weight_bytes, self._local_shards))
        config: Any = model.config
        shape = KvShape(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            spec.block_size,
            dtype,
        )
        sized = sizing.size(
            spec,
            model_len=files.max_model_len,
            block_bytes=shape.block_bytes,
            budget_bytes=self._kv_budget(),
        )
        pool = KvPool(shape, sized.capacity.num_blocks, self.device)
        rope = install_rope(model)
        forward = ForwardPass(model, pool, config.num_attention_heads, self.device, rope)
        switch_len = rope.switch_len if rope else 0
        return TorchEngine(forward, pool, spec.block_size, switch_len), sized

    def _kv_budget(self) -> int:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            own = torch.cuda.memory_reserved(self.device)
            return sizing.cuda_kv_budget(total, free, own, self._local_shards)
        return sizing.cpu_kv_budget(available_memory_bytes(), self._local_shards)


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU. Raises InvalidRequest."""
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda:0" if available else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if available else 0
    if kind != "cuda" or not (index or "0").isdigit() or int(index or 0) >= count:
        raise InvalidRequest(f"device is {name!r}; this host has cpu and {count} CUDA devices")
    return torch.device("cuda", int(index or 0))


def _meta_model(files: ModelFiles, dtype: torch.dtype) -> Any:
    """The model without memory. Raises ModelLoadFailed."""
    register()
    try:
        config = transformers.AutoConfig.from_pretrained(files.directory, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION_NAME, dtype=dtype
            )
    except MeshError:
        raise
    except Exception as exc:  # a wrong field raises anything, from anywhere in the model code
        path = files.directory / "config.json"
        raise ModelLoadFailed(f"{path} can't be used: {exc}") from exc


def _tied(model: Any) -> Mapping[str, str]:
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return dict(model._tied_weights_keys or {})  # transformers 5: parameter → source


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds, computed as the modules themselves do.

    Raises ModelLoadFailed for anything that is still without memory after that.
    """
    for module in model.modules():
        names = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        if not names:
            continue
        if "RotaryEmbedding" in type(module).__name__:
            fresh = type(module)(model.config)
            values = {name: getattr(fresh, name) for name in names}
        elif names == ["embed_scale"]:
            values = {"embed_scale": torch.tensor(model.config.hidden_size**0.5)}
        else:
            raise ModelLoadFailed(f"{type(module).__name__} has unknown buffers {names}")
        for name, value in values.items():
            module.register_buffer(name, value.to(device), persistent=False)
    for name, value in model.named_parameters():
        if value.is_meta:
            raise ModelLoadFailed(f"parameter {name} was given no weights")


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
