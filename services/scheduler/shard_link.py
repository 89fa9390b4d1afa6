"""The client of one shard: Describe, Load with progress, and the step stream.

Speaks the wire and keeps no state between calls; every failure comes out as a MeshError. When to
call what is `replica.py`'s affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from infermesh import rpc
from infermesh.config import SchedulerConfig
from infermesh.errors import ProtocolViolation, ReplicaUnavailable, from_rpc_error
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.v1 import model_pb2, shard_service_pb2, shard_service_pb2_grpc
from services.scheduler.ledger import Capacity

# It is asked again and again: a wedged shard must not hold up the others of its kind.
_DESCRIBE_TIMEOUT_S = 1.0
_OPEN_TIMEOUT_S = 30.0

# Stage, and the fraction done where it is known.
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on a shard, with everything that gateways need of it."""

    manifest: model_pb2.ModelManifest
    files: dict[str, bytes]
    capacity: Capacity
    incarnation: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a shard is right now."""

    incarnation: int
    epoch: int
    is_loaded: bool


class StepStream:
    """One epoch of the step stream."""

    def __init__(
        self, call: Any, opened: shard_service_pb2.EpochOpened, capacity: Capacity
    ) -> None:
        self._call = call
        self.epoch: int = opened.epoch
        self.incarnation: int = opened.incarnation
        self.packs_rows: bool = opened.packs_rows
        self.capacity = capacity

    async def send(self, step: shard_service_pb2.StepRequest) -> bool:
        """Waits only for the transport; False where the stream is over: `results` says why."""
        try:
            await self._call.write(shard_service_pb2.ExecuteRequest(step=step))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    async def results(self) -> AsyncIterator[shard_service_pb2.StepResult]:
        """Ends only by an error: a step stream has no natural end."""
        while True:
            response = await _read(self._call)
            if response.WhichOneof("kind") != "result":
                raise ProtocolViolation("expected a step result")
            yield response.result


class ShardLink:
    """Create it inside the event loop that uses it."""

    def __init__(
        self, address: str, config: SchedulerConfig, certificates: Certificates | None = None
    ) -> None:
        self._channel = rpc.channel(address, Identity.SHARD, certificates)
        self._stub: Any = shard_service_pb2_grpc.ShardServiceStub(self._channel)
        self._config = config

    async def describe(self, patient: bool = True) -> Description:
        """What the shard is. `patient`: waits a moment for one that is not there yet."""
        with _as_mesh_errors():
            response = await self._stub.Describe(
                shard_service_pb2.DescribeRequest(),
                timeout=_DESCRIBE_TIMEOUT_S,
                wait_for_ready=patient,
            )
        is_loaded = response.state == shard_service_pb2.SHARD_STATE_LOADED
        return Description(response.incarnation, response.epoch, is_loaded)

    async def load(self, on_progress: OnProgress) -> LoadedModel:
        """Loads the configured model, or joins its loading; no deadline, keepalive watches it."""
        loaded: shard_service_pb2.Loaded | None = None
        files: dict[str, bytearray] = {}
        with _as_mesh_errors():
            async for response in self._stub.Load(self._load_request()):
                kind = response.WhichOneof("kind")
                if kind == "progress":
                    progress = response.progress
                    total = progress.bytes_total
                    on_progress(progress.stage, progress.bytes_done / total if total else 0.0)
                elif kind == "loaded":
                    loaded = response.loaded
                elif kind == "file":
                    files.setdefault(response.file.name, bytearray()).extend(response.file.data)
        if loaded is None:
            raise ProtocolViolation("the shard ended Load without a loaded model")
        return LoadedModel(
            manifest=loaded.manifest,
            files={name: bytes(data) for name, data in files.items()},
            capacity=self._capacity(loaded.capacity),
            incarnation=loaded.incarnation,
        )

    @asynccontextmanager
    async def open(self, epoch: int, window: int) -> AsyncIterator[StepStream]:
        """Opens an epoch with so many steps in flight at most; leaving the block cancels the
        stream and with it the queued steps."""
        call = self._stub.Execute()
        opening = shard_service_pb2.OpenEpoch(epoch=epoch, window=window, packs_rows=True)
        try:
            try:
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        await call.write(shard_service_pb2.ExecuteRequest(open=opening))
                    response = await _read(call)  # also says why a write failed
            except TimeoutError:
                raise ReplicaUnavailable("the shard does not open an epoch") from None
            if response.WhichOneof("kind") != "opened" or response.opened.epoch != epoch:
                raise ProtocolViolation(f"expected epoch {epoch} to be opened")
            opened = response.opened
            yield StepStream(call, opened, self._capacity(opened.capacity))
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends all calls."""
        await self._channel.close()

    def _capacity(self, capacity: shard_service_pb2.ShardCapacity) -> Capacity:
        """The shard's, within what the operator allows."""
        return Capacity(
            num_blocks=capacity.num_blocks,
            block_size=capacity.block_size,
            max_num_seqs=min(capacity.max_num_seqs, self._config.max_num_seqs),
            max_batch_tokens=min(capacity.max_batch_tokens, self._config.max_batch_tokens),
        )

    def _load_request(self) -> shard_service_pb2.LoadRequest:
        config = self._config
        return shard_service_pb2.LoadRequest(
            model=config.model,
            model_id=config.model_id,
            dtype=config.dtype,
            load_format=config.load_format,
            max_model_len=config.max_model_len,
            kv_cache_bytes=config.kv_cache_bytes,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            num_blocks=config.num_blocks,
            quantize=config.quantize,
            kv_cache_dtype=config.kv_cache_dtype,
        )


async def _read(call: Any) -> shard_service_pb2.ExecuteResponse:
    with _as_mesh_errors():
        response = await call.read()
    if response is grpc.aio.EOF:
        raise ReplicaUnavailable("the shard closed the step stream")
    assert isinstance(response, shard_service_pb2.ExecuteResponse)
    return response


@contextmanager
def _as_mesh_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise from_rpc_error(exc) from exc
    except asyncio.InvalidStateError as exc:
        raise ReplicaUnavailable("the shard closed the call") from exc
    except asyncio.CancelledError as exc:
        # grpc.aio raises this also where the peer ended the call as CANCELLED: not our end
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ReplicaUnavailable("the shard cancelled the call") from exc
