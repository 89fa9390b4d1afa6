"""From a LoadSpec to a LoadedModel: the order in which a load happens, and its progress.

Runs in the worker thread. Torch-free itself: the torch side is imported when it is wanted, so that
the simulated engine never imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infermesh.config import ShardConfig
from infermesh.errors import InvalidRequest
from services.shard import simulated, sizing
from services.shard.checkpoint import Checkpoint, read_checkpoint
from services.shard.domain import LoadSpec, Progress
from services.shard.engine import LoadedModel
from services.shard.fingerprint import WeightHashes, digest, fingerprint
from services.shard.manifest import make_manifest
from services.shard.model_files import TOKENIZER_NAME, ModelFiles, read_model_files
from services.shard.packed_cache.folder import Folder, folder_path
from services.shard.packed_cache.hashes import RememberedHashes
from services.shard.packed_cache.key import PackedKey
from services.shard.quantization import Scheme, served_scheme
from services.shard.residency import Report
from services.shard.source import Source, resolve
from services.shard.supported import check_supported

if TYPE_CHECKING:  # they bring torch
    from services.shard.packed_cache.cache import PackedCache
    from services.shard.torch_loading import TorchLoader


def load_model(spec: LoadSpec, config: ShardConfig, report: Report) -> LoadedModel:
    """Loads the model.

    Raises:
        MeshError: UnsupportedModel, ModelLoadFailed, OutOfMemory or InvalidRequest.
    """
    if spec.load_format not in ("safetensors", "dummy"):
        raise InvalidRequest(
            f"load_format is {spec.load_format!r}, allowed are safetensors and dummy",
            param="load_format",
        )
    sizing.check_spec(spec)
    simulate = config.engine == "simulated"
    with_weights = spec.load_format == "safetensors" and not simulate
    report(Progress("finding the model"))
    source = resolve(spec.model, with_weights=with_weights)
    files = read_model_files(source.directory)
    if simulate:
        return _simulated(spec, config, source, files)
    check_supported(files.config)
    scheme = served_scheme(spec.quantize, files.config)
    checkpoint = read_checkpoint(source.directory) if with_weights else None
    folder = _packed_folder(config)
    remembered = RememberedHashes(folder) if folder is not None else None
    hashes = WeightHashes(checkpoint.files if checkpoint else (), remembered)
    try:
        return _torch(spec, config, source, files, checkpoint, scheme, hashes, report)
    finally:
        hashes.cancel()


def _simulated(
    spec: LoadSpec, config: ShardConfig, source: Source, files: ModelFiles
) -> LoadedModel:
    sized = sizing.size(spec, model_len=files.max_model_len, block_bytes=0, budget_bytes=0)
    manifest = make_manifest(
        spec,
        source,
        files,
        fingerprint=fingerprint(
            [("simulated", str(config.simulated_seed))],
            files.config_bytes,
            "simulated",
            files.tokenizer,
            files.eos_token_ids,
            "simulated" if config.deterministic else "",
        ),
        dtype="simulated",
        max_model_len=sized.max_model_len,
        num_parameters=0,
        weight_bytes=0,
    )
    engine = simulated.SimulatedEngine(
        simulated.read_profile(config.simulated_profile),
        simulated.printable_token_ids(files),
        config.simulated_seed,
    )
    return LoadedModel(
        engine, manifest, sized.capacity, "simulated", [(TOKENIZER_NAME, files.tokenizer)]
    )


def _torch(
    spec: LoadSpec,
    config: ShardConfig,
    source: Source,
    files: ModelFiles,
    checkpoint: Checkpoint | None,
    scheme: Scheme | None,
    hashes: WeightHashes,
    report: Report,
) -> LoadedModel:
    report(Progress("importing torch"))
    from services.shard import dtypes, footprint, torch_loading

    loader = torch_loading.TorchLoader(
        config.device, config.num_threads, config.local_shards, config.deterministic
    )
    if config.kernels == "auto":
        loader.use_kernels(config.kernels_dir, lambda: report(Progress("compiling kernels")))
    dtype = loader.choose_dtype(spec, files, checkpoint, scheme)
    kv_dtype = dtypes.choose_kv_dtype(spec.kv_cache_dtype, dtype)
    progress = _Bytes(report, checkpoint)
    cache = _packed_cache(loader, config, files, hashes, torch_loading.dtype_name(dtype), scheme)
    model = loader.build(files, checkpoint, dtype, progress.add, scheme, cache, progress.stage)
    progress.stage("allocating the KV cache")
    engine, sized = loader.engine(model, spec, files, kv_dtype)
    progress.stage("hashing weights")
    weights = hashes.wait() or [("dummy", "1")]
    num_parameters, weight_bytes = footprint.footprint(model)
    quantization = str(scheme or "")
    manifest = make_manifest(
        spec,
        source,
        files,
        fingerprint=fingerprint(
            weights,
            files.config_bytes,
            torch_loading.dtype_name(dtype),
            files.tokenizer,
            files.eos_token_ids,
            loader.arithmetic,
            quantization,
            torch_loading.dtype_name(kv_dtype),
        ),
        dtype=torch_loading.dtype_name(dtype),
        max_model_len=sized.max_model_len,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        quantization=quantization,
        rope_switch_len=engine.rope_switch_len,
    )
    return LoadedModel(
        engine, manifest, sized.capacity, str(loader.device), [(TOKENIZER_NAME, files.tokenizer)]
    )


def _packed_cache(
    loader: TorchLoader,
    config: ShardConfig,
    files: ModelFiles,
    hashes: WeightHashes,
    dtype: str,
    scheme: Scheme | None,
) -> PackedCache | None:
    """None where nothing is packed, or kept."""
    folder = _packed_folder(config)
    weights = hashes.wait() if folder is not None and loader.kernels is not None else None
    if folder is None or loader.kernels is None or not weights:
        return None
    from services.shard.packed_cache.cache import PackedCache

    key = PackedKey(
        weights=weights,
        config=digest(files.config_bytes),
        dtype=dtype,
        quantization=str(scheme or ""),
        kernels=loader.kernels.path.stem,
    )
    budget_bytes = int(config.packed_cache_gib * (1 << 30))
    return PackedCache(Folder(folder, budget_bytes), str(key), loader.kernels, hashes.are_current)


def _packed_folder(config: ShardConfig) -> Path | None:
    return folder_path(config.packed_cache_dir) if config.packed_cache_gib else None


class _Bytes:
    """Progress in bytes through the stages that follow one another."""

    def __init__(self, report: Report, checkpoint: Checkpoint | None) -> None:
        self._report = report
        self._done = 0
        self._total = checkpoint.num_bytes if checkpoint else 0
        self._stage = "reading weights" if checkpoint else "making random weights"
        self.add(0)

    def stage(self, name: str) -> None:
        self._stage = name
        self.add(0)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._report(Progress(self._stage, self._done, max(self._total, self._done)))
