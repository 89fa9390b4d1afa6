"""A model packed before, or packed now and kept. Whatever goes wrong with files costs time alone:
the model is then packed from its checkpoint, and stays in memory of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from typing import Any

from infermesh.telemetry import logs, metrics
from services.shard.host import release_freed_memory
from services.shard.kernels.library import Library
from services.shard.packed_cache.entry import Damaged, draft, read
from services.shard.packed_cache.folder import Folder
from services.shard.surgery.stored import CannotStore, StoredModel, describe, restore

# Longer than packing takes; a process that is stopped meanwhile must not stop others.
_PATIENCE_S = 300.0
_log = logs.get(__name__)
_lookups = metrics.counter(
    "packed_cache_lookups_total",
    "Packed models looked for on disk: hit, miss, damaged.",
    ("found",),
)


class PackedCache:
    """Of one model.

    Attributes:
        mapped_bytes: of the model that was got last, which the page cache holds for all processes.
    """

    def __init__(
        self, folder: Folder, key: str, library: Library, is_current: Callable[[], bool]
    ) -> None:
        """`is_current` says whether the checkpoint is still the one that the key names."""
        self._folder, self._key, self._library = folder, key, library
        self._is_current = is_current
        self.mapped_bytes = 0

    def get(
        self,
        empty: Callable[[], Any],
        packed: Callable[[], Any],
        on_stage: Callable[[str], None],
    ) -> Any:
        """The packed model, not fused.

        Args:
            empty: makes it without weights, but for its buffers.
            packed: makes it from its checkpoint.
            on_stage: told what happens.
        """
        start_s = time.perf_counter()
        stored, _ = self._read()
        if stored is not None:
            return self._mapped(stored, empty, on_stage, start_s)
        with ExitStack() as stack:
            file = self._alone(stack, on_stage)
            # others may have kept it, or mended it, meanwhile
            stored, damage = self._read()
            if stored is not None:
                return self._mapped(stored, empty, on_stage, start_s)
            if damage is not None:
                _lookups.labels("damaged").inc()
                _warn("packed weights are damaged", damage)
            _lookups.labels("miss").inc()
            on_stage("reading weights")
            model = packed()
            if file is not None and self._is_current():
                on_stage("keeping packed weights")
                self._keep(model, file)
            return model

    def _alone(self, stack: ExitStack, on_stage: Callable[[str], None]) -> FileIO | None:
        """A file to write; None where there can't be one."""
        waiting = "waiting for a shard that packs the same weights"
        alone = self._folder.alone(self._key, _PATIENCE_S, lambda: on_stage(waiting))
        try:
            return stack.enter_context(alone)
        except OSError as exc:
            _warn("packed weights are not kept", exc)
            return None

    def _mapped(
        self,
        stored: StoredModel,
        empty: Callable[[], Any],
        on_stage: Callable[[str], None],
        start_s: float,
    ) -> Any:
        on_stage("mapping packed weights")
        model = empty()
        self._adopt(model, stored)
        self._folder.used(self._key)
        _lookups.labels("hit").inc()
        _log.info("packed weights are mapped", extra=self._facts(start_s))
        return model

    def _read(self) -> tuple[StoredModel | None, Damaged | None]:
        """What is kept; nothing, perhaps because it is damaged."""
        try:
            return read(self._folder.entry(self._key), self._key), None
        except Damaged as exc:
            return None, exc

    def _keep(self, model: Any, file: FileIO) -> None:
        """Writes the model, and lets what was written take the place of its own memory."""
        start_s = time.perf_counter()
        try:
            outline = draft(self._key, describe(model))
            if not self._folder.make_room(outline.num_bytes):
                _log.info("packed weights are larger than shard.packed_cache_gib allows")
                return
            outline.write(file)
            self._folder.publish(self._key, file)
        except (OSError, CannotStore) as exc:
            _warn("packed weights are not kept", exc)
            return
        del outline
        stored, _ = self._read()
        if stored is not None:
            self._adopt(model, stored)
            release_freed_memory()
            _log.info("packed weights are kept", extra=self._facts(start_s))

    def _adopt(self, model: Any, stored: StoredModel) -> None:
        restore(model, stored, self._library)
        self.mapped_bytes = sum(tensor.nbytes for tensor in stored.tensors.values())

    def _facts(self, start_s: float) -> dict[str, object]:
        return {
            "file": str(self._folder.entry(self._key)),
            "bytes": self.mapped_bytes,
            "seconds": round(time.perf_counter() - start_s, 3),
        }


def _warn(what: str, why: Exception) -> None:
    _log.warning(what, extra={"reason": str(why)})
