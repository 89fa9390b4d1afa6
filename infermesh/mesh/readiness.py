"""When the mesh can answer: every replica serves its model, and the gateway lists it."""

import asyncio
import contextlib
from collections.abc import Callable, Collection

import grpc
import httpx

from infermesh import rpc
from infermesh.errors import from_detail, from_rpc_error
from infermesh.security.certificates import Certificates
from infermesh.security.identities import Identity
from infermesh.v1 import scheduler_service_pb2 as pb
from infermesh.v1 import scheduler_service_pb2_grpc as pb_grpc

RETRY_S = 0.05
# (replica, fraction done, what is being done)
Progress = Callable[[str, float, str], None]


async def wait_replica(
    address: str, on_progress: Progress, certificates: Certificates | None = None
) -> None:
    """Returns once the replica serves.

    Raises:
        MeshError: its model can't be served; the message says why.
    """
    async with rpc.channel(address, Identity.SCHEDULER, certificates) as channel:
        stub = pb_grpc.SchedulerServiceStub(channel)
        while True:
            try:
                if await _watch(stub, on_progress):
                    return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise from_rpc_error(error) from None
            await asyncio.sleep(RETRY_S)  # its socket is not there yet


async def _watch(stub: pb_grpc.SchedulerServiceStub, on_progress: Progress) -> bool:
    async for seen in stub.WatchReplica(pb.WatchReplicaRequest()):
        if seen.state == pb.REPLICA_STATE_FAILED:
            raise from_detail(seen.error)
        if seen.state == pb.REPLICA_STATE_SERVING:
            on_progress(seen.replica_id, 1.0, "ready")
            return True
        on_progress(seen.replica_id, seen.load_progress, seen.load_stage)
    return False


async def wait_routable(admin_url: str, address: str) -> None:
    """Returns once the gateway sends requests to the replica at this address."""
    async with httpx.AsyncClient() as client:
        while True:
            with contextlib.suppress(httpx.TransportError, ValueError, StopIteration):
                response = await client.get(f"{admin_url}/debug/replicas", timeout=5.0)
                seen = next(one for one in response.json() if one["address"] == address)
                if seen["routable"] and seen["state"] == "serving":
                    return
            await asyncio.sleep(RETRY_S)


async def wait_gateway(url: str, api_key: str, wanted: Collection[str]) -> list[str]:
    """The names that generate, once those wanted are among them."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"}) as client:
        while True:
            try:
                response = await client.get(f"{url}/v1/models", timeout=5.0)
                listed = response.json()["data"]
                models = [model["id"] for model in listed if model.get("kind") != "embed"]
            except (httpx.TransportError, ValueError, KeyError):
                models = []
            if models and set(wanted) <= set(models):
                return models
            await asyncio.sleep(RETRY_S)
