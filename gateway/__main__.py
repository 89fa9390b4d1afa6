"""`python -m gateway`: the gateway as a process of its own."""

import sys

from gateway.server import GatewayService
from infermesh import lifecycle
from infermesh.config import ConfigError, load
from infermesh.security.identities import Identity
from infermesh.security.posture import Security


def main() -> int:
    """Runs until SIGTERM; its exit status."""
    try:
        settings = load(sys.argv[1:])
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    gateway = settings.gateway

    def make() -> GatewayService:
        return GatewayService(gateway, Security.of(settings.security, Identity.GATEWAY))

    return lifecycle.run(make, settings.telemetry, gateway.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
