"""A program: hides every package but the five of a bare compute host, then serves one step.

Arguments: engine, model directory, socket path. Run by test_bare_host; prints "served".
"""

from __future__ import annotations

import asyncio
import re
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

ALLOWED = ("grpcio", "protobuf", "numpy", "torch", "transformers")
# Found in the checkout, whether or not an editable install also claims it; what its distribution
# requires stays hidden.
OWN = ("infermesh", "services", "tests")
SURELY_BLOCKED = ("prometheus_client", "grpc_health", "opentelemetry", "orjson", "starlette")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure() -> set[str]:
    """The allowed distributions and all that they require."""
    found: set[str] = set()
    todo = list(ALLOWED)
    while todo:
        name = _normal(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in requires:
            match = re.match(r"[\w.-]+", requirement)
            if match and "extra ==" not in requirement:
                todo.append(match[0])
    return found


class HidingFinder:
    """Finds on the path what a bare host would have; the rest is simply not there."""

    def __init__(self) -> None:
        self._allowed = _closure()
        self._owners = metadata.packages_distributions()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        owners = {_normal(dist) for dist in self._owners.get(top, ())}
        is_hidden = owners and not owners & self._allowed and top not in OWN
        if is_hidden or name.startswith("google.rpc"):
            return None
        return PathFinder.find_spec(name, path, target)

    def find_distributions(self, context: Any) -> Any:
        return PathFinder.find_distributions(context)


async def _serve(engine: str, model: str, socket: str) -> None:
    from infermesh.config import ShardConfig
    from infermesh.v1 import shard_service_pb2 as pb
    from services.shard.service import ShardService
    from tests.contract.shard.harness import Stream, connected, first_step, load

    early = {"numpy", "torch", "transformers"} & set(sys.modules)
    assert not early, f"imported before a model is wanted: {early}"
    config = ShardConfig(address=f"unix:{socket}", engine=engine, device="cpu", num_threads=1)
    async with asyncio.TaskGroup() as tasks:
        service = ShardService(config)
        await service.start(tasks)
        async with connected(service) as stub:
            await stub.Describe(pb.DescribeRequest())
            await load(stub, Path(model))
            stream = Stream(stub)
            await stream.open(1)
            result = await stream.step(first_step([5, 6, 7]))
            assert result.rows[0].status == pb.ROW_STATUS_OK
            await stream.call.done_writing()
        await service.stop()
    assert ("torch" in sys.modules) == (engine == "torch")


def main() -> None:
    """Hides, checks that it does, serves."""
    sys.path.insert(0, str(Path(__file__).parents[3]))
    sys.meta_path[sys.meta_path.index(PathFinder)] = HidingFinder()
    for name in SURELY_BLOCKED:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} was not blocked")
    asyncio.run(_serve(*sys.argv[1:]))
    sys.stdout.write("served\n")


if __name__ == "__main__":
    main()
