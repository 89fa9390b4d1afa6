"""What this replica is, and what it has room for: constants to hold its other metrics against."""

from __future__ import annotations

from infermesh.telemetry import metrics
from services.scheduler.ledger import Capacity


class Served:
    """The gauges; one per process."""

    def __init__(self) -> None:
        gauge = metrics.gauge
        self._model = metrics.model_info()
        self._serving = gauge("replica_serving", "1: its device computes, and it takes requests.")
        self._seqs = gauge("max_num_seqs", "Sequences that can have a place at once.")
        self._tokens = gauge("max_batch_tokens", "Query tokens that a step can hold.")
        self._blocks = gauge("kv_blocks", "KV blocks in all.")
        self._block_size = gauge("kv_block_size_tokens", "Tokens per KV block.")
        self._labels: tuple[str, ...] = ()

    def model(self, model_id: str, dtype: str, quantization: str) -> None:
        """Another model is served from now on."""
        if self._labels:
            self._model.remove(*self._labels)
        self._labels = (model_id, dtype, quantization or "none")
        self._model.labels(*self._labels).set(1)

    def capacity(self, capacity: Capacity) -> None:
        """A device is there."""
        self._seqs.set(capacity.max_num_seqs)
        self._tokens.set(capacity.max_batch_tokens)
        self._blocks.set(capacity.num_blocks)
        self._block_size.set(capacity.block_size)

    def serving(self, is_serving: bool) -> None:
        self._serving.set(is_serving)
