"""The model that this process holds, or is loading: Empty → Loading → Loaded | Failed → Loading.

Owned by the event loop; the load itself runs in the worker thread. Every caller joins the same
load, which goes on when callers leave.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from infermesh.errors import InvalidRequest, MeshError, as_mesh_error
from infermesh.telemetry import logs, metrics
from services.shard.domain import LoadSpec, Progress
from services.shard.worker import Worker

if TYPE_CHECKING:  # it brings numpy, which must not delay the process's first answer
    from services.shard.engine import LoadedModel

Report = Callable[[Progress], None]
Load = Callable[[LoadSpec, Report], "LoadedModel"]

_REPORT_INTERVAL_S = 0.05
_log = logs.get(__name__)
_load_seconds = metrics.gauge("model_load_seconds", "How long the last model load took.")

_model_info = metrics.model_info()
_weight_bytes = metrics.gauge("shard_weight_bytes", "Bytes of weights on the device.")
_kv_bytes = metrics.gauge("shard_kv_cache_bytes", "Bytes of KV blocks on the device.")
_kv_tokens = metrics.gauge("shard_kv_cache_tokens", "Tokens whose K and V fit those blocks.")


class LoadState(enum.Enum):
    """Where the model is."""

    EMPTY = "empty"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


class Residency:
    """At most one model, loaded once."""

    def __init__(self, worker: Worker, load: Load) -> None:
        self._worker = worker
        self._load = load
        self._loop = asyncio.get_running_loop()
        self._spec: LoadSpec | None = None
        self._progress = Progress("starting")
        self._changed = asyncio.Event()
        self.state = LoadState.EMPTY
        self.model: LoadedModel | None = None
        self.error: MeshError | None = None

    def begin(self, spec: LoadSpec) -> None:
        """Starts the load, or joins it; a failed one is tried again.

        Raises InvalidRequest where another model is loaded, or being loaded.
        """
        if self.state in (LoadState.LOADING, LoadState.LOADED):
            self._check_same(spec)
            return
        self._spec = spec
        self._progress = Progress("starting")
        self._move(LoadState.LOADING)
        self._worker.submit(lambda: self._run(spec))

    async def progress(self) -> AsyncIterator[Progress]:
        """Progress until the model is loaded, the latest first.

        Raises MeshError where the load fails.
        """
        seen: Progress | None = None
        while self.state is LoadState.LOADING:
            changed = self._changed
            if self._progress is not seen:
                seen = self._progress
                yield seen
            else:
                await changed.wait()
        if self.error is not None:
            raise self.error.with_traceback(None)

    def _check_same(self, spec: LoadSpec) -> None:
        held = self._spec
        if held is None or spec == held:
            return
        names = [f.name for f in fields(spec) if getattr(spec, f.name) != getattr(held, f.name)]
        verb = "loaded" if self.state is LoadState.LOADED else "being loaded"
        name = names[0]
        raise InvalidRequest(
            f"{held.model} is {verb} with {name} {getattr(held, name)!r}, "
            f"asked for {getattr(spec, name)!r}",
            param=name,
        )

    def _run(self, spec: LoadSpec) -> None:
        """In the worker thread."""
        start_s = time.perf_counter()
        reporter = _Reporter(lambda progress: self._post(lambda: self._on_progress(progress)))
        model: LoadedModel | None = None
        error: MeshError | None = None
        try:
            model = self._load(spec, reporter)
        except Exception as exc:
            error = as_mesh_error(exc)
            if not isinstance(exc, MeshError):
                _log.exception("loading failed unexpectedly")
            # Frames hold the half-loaded model.
            error.__cause__ = error.__context__ = error.__traceback__ = None
        self._post(lambda: self._on_end(model, error, time.perf_counter() - start_s))

    def _post(self, callback: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _on_progress(self, progress: Progress) -> None:
        self._progress = progress
        self._move(LoadState.LOADING)

    def _on_end(self, model: LoadedModel | None, error: MeshError | None, took_s: float) -> None:
        self.model, self.error = model, error
        if model is None:
            _log.error("the model was not loaded", extra={"error": str(error)})
            self._move(LoadState.FAILED)
            return
        _load_seconds.set(took_s)
        manifest = model.manifest
        labels = (manifest.model_id, manifest.dtype, manifest.quantization or "none")
        _model_info.labels(*labels).set(1)
        _weight_bytes.set(manifest.weight_bytes)
        capacity = model.capacity
        _kv_bytes.set(capacity.kv_cache_bytes)
        _kv_tokens.set(capacity.num_blocks * capacity.block_size)
        _log.info(
            "model loaded",
            extra={
                "model_id": manifest.model_id,
                "dtype": manifest.dtype,
                "quantization": manifest.quantization,
                "num_parameters": manifest.num_parameters,
                "num_blocks": capacity.num_blocks,
                "kv_cache_bytes": capacity.kv_cache_bytes,
                "seconds": round(took_s, 3),
            },
        )
        self._move(LoadState.LOADED)

    def _move(self, state: LoadState) -> None:
        self.state = state
        if state is LoadState.LOADING:
            self.error = None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class _Reporter:
    """Passes on at most one progress per interval, and every new stage."""

    def __init__(self, post: Callable[[Progress], None]) -> None:
        self._post = post
        self._stage = ""
        self._last_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.stage != self._stage or now_s - self._last_s >= _REPORT_INTERVAL_S:
            self._stage, self._last_s = progress.stage, now_s
            self._post(progress)
