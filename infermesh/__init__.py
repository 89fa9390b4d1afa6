"""infermesh: the client, the wire contract, and the kit that every service is built with.

from infermesh import Client

with Client("127.0.0.1:8002") as client:
    for delta in client.chat("What is the capital of France?"):
        print(delta.text, end="", flush=True)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infermesh.client import Client

__all__ = ["Client"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports the client when it is asked for: services start without it."""
    if name == "Client":
        from infermesh.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
