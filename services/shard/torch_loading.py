"""A torch engine from a model directory: config → meta model → weights in place → KV pool.

Imports torch and transformers; imported in the worker thread on Load, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infermesh.errors import InvalidRequest
from infermesh.telemetry import logs
from services.shard import dtypes, sizing, tiles
from services.shard.checkpoint import Checkpoint
from services.shard.domain import LoadSpec
from services.shard.footprint import footprint
from services.shard.forward import ForwardPass
from services.shard.host import (
    available_memory_bytes,
    num_threads,
    physical_cores,
    processor_name,
    release_freed_memory,
)
from services.shard.kernels.compiling import CannotCompile
from services.shard.kernels.library import Library
from services.shard.kernels.library import load as load_kernels
from services.shard.kv_pool import KvPool, KvShape
from services.shard.model_files import ModelFiles
from services.shard.packed_cache.cache import PackedCache
from services.shard.quantization import Scheme, stored_scheme
from services.shard.quantized_checkpoint import load_codes
from services.shard.quantized_layers import pack_codes
from services.shard.quantizing import Quantizer
from services.shard.rope import install as install_rope
from services.shard.skeleton import (
    check_filled,
    fill_buffers,
    meta_model,
    num_parameters,
    tied_parameters,
)
from services.shard.surgery.operation import find_shortcut, fuse, pack
from services.shard.torch_engine import TorchEngine
from services.shard.weights import dummy_weights, load_weights

DEFAULT_FOLDER = "~/.cache/infermesh/kernels"
_log = logs.get(__name__)
_STORED = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}


class TorchLoader:
    """Builds one engine; the caller wraps it with files, hashes and manifest."""

    def __init__(
        self, device: str, fixed_threads: int, local_shards: int, deterministic: bool = False
    ) -> None:
        """Raises InvalidRequest for a device that is not here, or not proven deterministic."""
        self._fixed_threads = fixed_threads
        self._local_shards = local_shards
        torch.set_num_threads(fixed_threads or max(1, physical_cores() // local_shards))
        self.device = choose_device(device)
        self._deterministic = deterministic
        if deterministic and self.device.type != "cpu":
            raise InvalidRequest(
                f"deterministic mode is proven on a CPU alone, and the device is {self.device}: "
                "choose the device cpu, or go without the mode"
            )
        # None where there are none, or none are wanted.
        self.kernels: Library | None = None
        # What beside the model decides its bits; empty where nothing is promised of them.
        self.arithmetic = ""
        # weights that are files of the page cache, which counts as available
        self._mapped_bytes = 0

    def use_kernels(self, folder: str, on_compile: Callable[[], None]) -> None:
        """Compiles or finds the C++ kernels for this processor; says what it costs to lack them.

        Deterministic mode has its own arithmetic, and CUDA its own kernels.
        """
        if self.device.type != "cpu" or self._deterministic:
            return
        try:
            self.kernels = load_kernels(Path(folder or DEFAULT_FOLDER).expanduser(), on_compile)
        except (CannotCompile, RuntimeError) as exc:  # the second: nobody's home is known
            _log.warning(
                "no C++ kernels: torch computes a token in up to several times the time",
                extra={"reason": str(exc)},
            )

    def choose_dtype(
        self,
        spec: LoadSpec,
        files: ModelFiles,
        checkpoint: Checkpoint | None,
        scheme: Scheme | None = None,
    ) -> torch.dtype:
        """See `dtypes`; of codes it is the type of what is computed between them.

        Raises InvalidRequest.
        """
        stored = _stored_dtype(files, checkpoint)
        if scheme is not None and self.device.type != "cpu":
            raise InvalidRequest("quantize is for CPUs", param="quantize")
        if scheme is not None and self._deterministic:
            raise InvalidRequest(
                "deterministic mode is not proven with quantized weights: go without one of them",
                param="quantize",
            )
        host = dtypes.Host(
            self.device,
            torch.backends.cpu.get_cpu_capability(),
            available_memory_bytes(),
            self.kernels is not None,
        )
        # codes take the same room beside either type
        auto = spec.dtype == "auto" and scheme is None
        size = num_parameters(meta_model(files, torch.float32)) if auto else 0
        return dtypes.choose_dtype(spec.dtype, stored, size, host)

    def build(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint | None,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None],
        scheme: Scheme | None = None,
        cache: PackedCache | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> nn.Module:
        """The model on the device, with its weights; dummy ones without a checkpoint.

        Args:
            scheme: how weights are quantized, or were where the checkpoint says so.
            cache: where packed weights are found, or kept.
            on_stage: told what happens, where it is not that weights are read.

        Raises:
            ModelLoadFailed, OutOfMemory, UnsupportedModel
        """

        def filled() -> nn.Module:
            return self._filled(files, checkpoint, dtype, on_bytes, scheme)

        kernels = self.kernels
        if kernels is None:
            model = filled()
            pack_codes(model)
        else:
            model = _packed(files, dtype, kernels, filled, cache, on_stage)
            fuse(model, kernels)
        self._mapped_bytes = 0 if cache is None else cache.mapped_bytes
        check_filled(model)
        if scheme is not None:
            release_freed_memory()
        return model

    def _filled(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint | None,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None],
        scheme: Scheme | None,
    ) -> nn.Module:
        model = meta_model(files, dtype)
        tied = tied_parameters(model)
        quantize = None if scheme is None else partial(Quantizer, model, scheme, tied, dtype)
        with torch.no_grad():
            if checkpoint is None:
                std = float(getattr(model.config, "initializer_range", 0.02))
                dummy_weights(model, tied, std, dtype, self.device, on_bytes, quantize)
            elif quantize is not None and stored_scheme(files.config) is not None:
                load_codes(model, checkpoint, tied, dtype, on_bytes, quantize)
            else:
                load_weights(model, checkpoint, tied, dtype, self.device, on_bytes, quantize)
            fill_buffers(model, self.device)
        check_filled(model)
        return model.eval()  # type: ignore[no-any-return]

    def engine(
        self, model: nn.Module, spec: LoadSpec, files: ModelFiles, kv_dtype: torch.dtype
    ) -> tuple[TorchEngine, sizing.Sizing]:
        """The engine with its KV pool of that type. Raises OutOfMemory or UnsupportedModel."""
        _, weight_bytes = footprint(model)
        threads = self._fixed_threads or num_threads(weight_bytes, self._local_shards)
        torch.set_num_threads(threads)
        if self._deterministic:
            tiles.install(model, threads)
            self.arithmetic = _arithmetic(threads)
        config: Any = model.config
        shape = KvShape(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            spec.block_size,
            kv_dtype,
        )
        sized = sizing.size(
            spec,
            model_len=files.max_model_len,
            block_bytes=shape.block_bytes,
            budget_bytes=self._kv_budget(),
        )
        pool = KvPool(shape, sized.capacity.num_blocks, self.device)
        rope = install_rope(model)
        forward = ForwardPass(
            model,
            pool,
            config.num_attention_heads,
            self.device,
            rope,
            self._deterministic,
            self.kernels,
            None if self.kernels is None else find_shortcut(model, self.kernels),
        )
        switch_len = rope.switch_len if rope else 0
        return TorchEngine(forward, pool, spec.block_size, switch_len, self.kernels), sized

    def _kv_budget(self) -> int:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            own = torch.cuda.memory_reserved(self.device)
            return sizing.cuda_kv_budget(total, free, own, self._local_shards)
        available = available_memory_bytes(self._mapped_bytes)
        return sizing.cpu_kv_budget(available, self._local_shards)


def _stored_dtype(files: ModelFiles, checkpoint: Checkpoint | None) -> str:
    declared = files.config.get("dtype") or files.config.get("torch_dtype")
    first = next(iter(checkpoint.tensors.values()), None) if checkpoint else None
    stored = declared or (_STORED.get(first.dtype) if first else None) or "float32"
    return str(stored).removeprefix("torch.")


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


def _packed(
    files: ModelFiles,
    dtype: torch.dtype,
    kernels: Library,
    filled: Callable[[], nn.Module],
    cache: PackedCache | None,
    on_stage: Callable[[str], None],
) -> nn.Module:
    """The model with its matrices packed, from its checkpoint or from what was kept of it."""

    def empty() -> nn.Module:
        model = meta_model(files, dtype)
        fill_buffers(model, torch.device("cpu"))
        return model.eval()  # type: ignore[no-any-return]

    def packed() -> nn.Module:
        model = filled()
        pack(model, kernels)
        return model

    return packed() if cache is None else cache.get(empty, packed, on_stage)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _arithmetic(threads: int) -> str:
    """What the bits of a product depend on beside its operands: library, kernels and threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    parts = (torch.__version__, capability, processor_name(), f"{threads} threads")
    return ", ".join(str(part) for part in parts)
