"""`python -m gateway`: the gateway as a process of its own."""

import sys

from gateway.server import GatewayService
from infermesh import lifecycle
from infermesh.config import ConfigError, load


def main() -> int:
    """Runs until SIGTERM; its exit status."""
    try:
        settings = load(sys.argv[1:])
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    gateway = settings.gateway
    return lifecycle.run(lambda: GatewayService(gateway), settings.telemetry, gateway.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
